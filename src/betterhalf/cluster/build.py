"""Build the trainer and the engine of a run; no other module asks which `cluster.backend` is set."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from betterhalf.cluster.delivery import open_delivery
from betterhalf.cluster.engine_process import start_engines
from betterhalf.cluster.placement import placement_of
from betterhalf.cluster.ray_start import check_session
from betterhalf.cluster.session import Session, open_session
from betterhalf.cluster.trained import LoadTrained, policy_trainer
from betterhalf.cluster.trainer_group import TrainerGroup
from betterhalf.config.schema import ClusterConfig, RunConfig
from betterhalf.errors import ConfigError, InputError
from betterhalf.metrics.console import show_note
from betterhalf.models.description import ModelDescription, ModelFacts
from betterhalf.models.loading import load_weights
from betterhalf.precision.roles import Precision
from betterhalf.precision.weight_range import require_weights_fit
from betterhalf.rollout.build import build_engine
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.rollout.pool import EnginePool
from betterhalf.training.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """Both sides of a run, and what they run on."""

    trainer: Trainer
    """Trainer, which holds the policy pi."""
    engine: RolloutEngine
    """Engine, which samples from mu; it holds no weights before the first sync."""
    model: ModelFacts
    """Tokenizer, vocabulary, context and stop tokens, and the facts that only the weights show."""
    parameters: int
    """Number of the model's parameters, counting a tied head once."""
    cluster: Callable[[], dict[str, Any]]
    """Record of what both run on, for `environment.json`; complete once both have answered."""
    close: Callable[[], None]
    """End of both sides and of what they run on; calling it twice is harmless."""


class SidesBuilder(Protocol):
    """Function that builds both sides of a run."""

    def __call__(
        self,
        config: RunConfig,
        described: ModelDescription,
        precision: Precision,
        *,
        keep_reference: bool,
        trained: LoadTrained | None,
        folder: Path | None,
        restores: bool,
    ) -> Sides:
        """Load the model where it is needed, and build the trainer and the engine.

        Args:
            config: configuration of the run.
            described: the model, whose configuration files have been checked.
            precision: formats of both sides, and the device of this process.
            keep_reference: True to keep a reference policy.
            trained: loads weights that replace the model's own.
            folder: run folder, which every process that writes a part of a checkpoint must see; None if none is
                written.
            restores: True if `Trainer.read_state` follows before any weight is used.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Way of running the trainer and the engine: in this process, or in processes of a cluster."""

    check: Callable[[RunConfig, ModelDescription], None]
    """Check of the machine and of the cluster that needs no weights; raises InputError or MissingExtraError."""
    build: SidesBuilder
    """Builder of both sides."""
    computes_here: bool
    """True if the model is in the process that runs the loop, and uses its device."""


def local_sides(
    config: RunConfig,
    described: ModelDescription,
    precision: Precision,
    *,
    keep_reference: bool,
    trained: LoadTrained | None,
    folder: Path | None,
    restores: bool,
) -> Sides:
    """Build both sides in this process, from one loaded copy of the model.

    `folder` needs no check, because this process itself writes to it. The model is loaded even if a checkpoint replaces
    the policy (`restores`), because the engine and a reference policy are built from it.

    Raises:
        CheckpointError: the trained weights are of another model.
        InputError: the weights cannot be read, or a side cannot be built as configured.
    """
    model = load_weights(described)
    require_weights_fit(model.module.named_parameters(), precision.roles)
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    engine = build_engine(config, model.hf_config, model.stop_token_ids, precision)
    try:
        trainer = policy_trainer(model, config, precision, trained=trained, keep_reference=keep_reference)
    except BaseException:
        engine.close()
        raise

    def close() -> None:
        trainer.close()
        engine.close()

    return Sides(
        trainer=trainer,
        engine=engine,
        model=model.facts(),
        parameters=parameters,
        cluster=lambda: {"backend": "local"},
        close=close,
    )


def ray_sides(
    config: RunConfig,
    described: ModelDescription,
    precision: Precision,
    *,
    keep_reference: bool,
    trained: LoadTrained | None,
    folder: Path | None,
    restores: bool,
) -> Sides:
    """Open a session, place all processes, and build a `TrainerGroup` and an `EnginePool` in it.

    The engines start while the ranks load the model. No weights are loaded in this process.

    Raises:
        InputError: see `open_session`, `Session.place` and `TrainerGroup`.
        TrainerDiedError: a rank ended, or was not ready in time.
    """
    cluster = config.cluster
    placement = placement_of(cluster)
    show_note(_start_words(cluster), mode=config.logging.console)
    session = open_session(cluster)
    try:
        session.place(placement, lambda note: show_note(note, mode=config.logging.console))
        engines = start_engines(config, session, placement.engines)
        trainer = TrainerGroup(
            config,
            session,
            placement.ranks,
            keep_reference=keep_reference,
            trained=trained,
            folder=folder,
            restores=restores,
        )
        engine = EnginePool(
            engines,
            max_restarts=cluster.max_restarts,
            rollout_dtype=precision.roles.rollout_dtype,
            delivery=open_delivery(config, trainer, engines),
        )
    except BaseException:
        session.close()
        raise

    def close() -> None:
        with ExitStack() as stack:
            for end in (session.close, trainer.close, engine.close):
                stack.callback(end)

    facts = trainer.facts
    model = replace(described.facts(), hf_config=facts.model_config, notes=facts.notes)
    return Sides(
        trainer=trainer,
        engine=engine,
        model=model,
        parameters=trainer.parameters,
        cluster=lambda: _record(cluster, session),
        close=close,
    )


def _record(cluster: ClusterConfig, session: Session) -> dict[str, Any]:
    """Return sizes and hosts of a run, as JSON values."""
    return {
        "backend": cluster.backend,
        "ray": version("ray"),
        "address": cluster.address,
        "ranks": cluster.trainers,
        "engines": cluster.engines,
        "placement": cluster.placement,
        "hosts": session.hosts(),
    }


def _start_words(cluster: ClusterConfig) -> str:
    """Return a note on what starts: starting processes and loading weights takes seconds to minutes without output."""
    place = "a Ray of this run" if cluster.address is None else f"the Ray cluster at {cluster.address}"
    return f"starting {cluster.processes} on {place}"


def check_ray(config: RunConfig, described: ModelDescription) -> None:
    """Check that Ray is installed, the address answers, GPUs of a local Ray exist, and each rank gets a shard.

    Raises:
        ConfigError: `device=cuda`, but no process would get a GPU.
        InputError: any other check failed; the message names what to change.
        MissingExtraError: Ray is not installed.
    """
    cluster = config.cluster
    if config.device == "cuda" and not cluster.needed_gpus:
        raise ConfigError(
            "device=cuda, but cluster.trainer.gpus and cluster.engine.gpus are 0, so that no process would see a GPU. "
            "Set them, or device=auto."
        )
    rows = max(
        getattr(described.hf_config, size, 0) or 0 for size in ("vocab_size", "hidden_size", "intermediate_size")
    )
    if cluster.trainers > rows:
        raise InputError(
            f"cluster.trainers={cluster.trainers} exceeds the {rows} rows of the largest weight of model "
            f"{described.name!r}, so some ranks would hold no part of any layer. Lower cluster.trainers."
        )
    check_session(cluster)


BACKENDS: dict[str, Backend] = {
    "local": Backend(check=lambda config, described: None, build=local_sides, computes_here=True),
    "ray": Backend(check=check_ray, build=ray_sides, computes_here=False),
}
"""`cluster.backend` -> its declaration."""


def backend_of(config: RunConfig) -> Backend:
    """Return the backend that a configuration names."""
    return BACKENDS[config.cluster.backend]
