"""One rank in a process of its own: a `PolicyTrainer` over the rank's shards, whose methods exchange host tensors."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import betterhalf
from betterhalf.algorithms.loss_path import OwnLoss
from betterhalf.algorithms.loss_stats import LossStats
from betterhalf.algorithms.presets import Algorithm, resolve_algorithm
from betterhalf.batches import Denominators, MicroBatch
from betterhalf.cluster.locked_folder import LockedFolder
from betterhalf.cluster.trained import LoadTrained, policy_trainer
from betterhalf.cluster.weight_outbox import Outbox
from betterhalf.cluster.weight_versions import Sent, StoredPart, store_parts
from betterhalf.cluster.whole_state import RankState, rows_of
from betterhalf.config.schema import RunConfig
from betterhalf.diagnostics.trainer_memory import is_sharded
from betterhalf.distributed.group import GroupCollective, Membership, free_address, join
from betterhalf.models.description import ModelDescription, describe_model
from betterhalf.models.loading import LoadedModel, SkeletonModel, load_weights, open_weights
from betterhalf.models.skeleton import compute_buffers, skeleton
from betterhalf.precision.contract import SideReport
from betterhalf.precision.device import choose_device
from betterhalf.precision.merge import MergeCount
from betterhalf.precision.roles import build_precision
from betterhalf.precision.weight_range import require_weights_fit
from betterhalf.reduction import declared_reductions
from betterhalf.rollout.weight_group import WireWeight
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.training.shards import ShardFile
from betterhalf.training.split import empty_pack
from betterhalf.training.trainer import OptimReport, TokenScores, TrainerState, WrittenState
from betterhalf.training.weights.sent_rows import SentRows


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """Facts that a rank reports after loading the model; the run does not start if ranks disagree."""

    machine: dict[str, str]
    """Name -> value of everything that affects how packs are rounded: versions, threads, CPU features, device, reader
    of the weights, and digest of the user's loss."""
    model_config: Any
    """transformers configuration that matches the weights; None if rank 0 will send them."""
    notes: tuple[str, ...]
    """Notes on the model's files for the user."""
    parameters: int | None
    """Number of the model's parameters, counting a tied head once; None if rank 0 will send them."""


class RankProcess:
    """One rank. Methods marked collective are called on all ranks at the same time, in the same order.

    Every method may raise what the method of `Trainer` with the same name raises. A collective that exceeds
    `cluster.collective_seconds`, or whose peer has ended, raises RuntimeError.
    """

    def __init__(self, config: RunConfig, *, keep_reference: bool, trained: LoadTrained | None = None) -> None:
        """Store the arguments; `load` loads the model."""
        self._config, self._keep_reference, self._trained = config, keep_reference, trained
        self._described: ModelDescription
        self._model: LoadedModel | SkeletonModel | None = None
        self._loss: OwnLoss | None = None
        self._rank = 0
        self._temporary: LockedFolder | None = None

    def address(self) -> tuple[str, int]:
        """Return this host's address and a free port, for a TCP store on this rank; called on rank 0."""
        return free_address()

    def load(self, rank: int) -> RankFacts:
        """Check the model's files, and the user's own loss, on this host.

        A rank that shards the model reads its rows later, in `build`. Weights that cannot be read in parts are loaded
        by rank 0 alone, which then sends the rows of the others.

        Args:
            rank: rank of this process, from 0.

        Raises:
            InputError: this host lacks the model, the device or the loss.
        """
        config = self._config
        self._precision = build_precision(config.precision, choose_device(config), exact=config.exact)
        self._loss = resolve_algorithm(config.algorithm, with_loss=self._trained is None).loss
        self._described = described = describe_model(config.model)
        model: LoadedModel | SkeletonModel | None
        model = open_weights(described) if is_sharded(config) else load_weights(described)
        reader = "each rank" if model is not None else "rank 0"
        if model is None and rank == 0:
            model = load_weights(described)
        self._model = model
        facts = _machine(self._precision.device) | {"weights": f"read by {reader}"}
        return RankFacts(
            machine=facts if self._loss is None else facts | {"loss": self._loss.digest},
            model_config=None if model is None else model.hf_config,
            notes=() if model is None else model.notes,
            parameters=None if model is None else sum(each.numel() for each in model.module.parameters()),
        )

    def build(self, membership: Membership, model_config: Any, restores: bool) -> None:
        """Join the other ranks, and read this rank's shard of the model; collective.

        A single rank keeps all weights, as a trainer in one process does, unless it offloads the optimizer's states.

        Args:
            membership: rank of this process, and size and address of the group.
            model_config: transformers configuration on which the ranks agree.
            restores: True if `read_state` follows, which replaces all weights.

        Raises:
            TrainerDiedError: a rank did not join in time.
            InputError: the model cannot be trained, or not by this many ranks, or a weight does not fit its format.
        """
        self._rank, ranks = membership.rank, None
        model, self._model = self._model, None
        if is_sharded(self._config):
            ranks = join(membership, self._precision.device)
            if not isinstance(model, SkeletonModel):
                model = self._sent_model(ranks, model, model_config)
        assert model is not None, "build before load"
        self._trainer: PolicyTrainer = policy_trainer(
            model,
            self._config,
            self._precision,
            trained=self._trained,
            keep_reference=self._keep_reference,
            ranks=ranks,
            restores=restores,
        )
        own = ((name, rows) for name, rows in self._trainer.weights.state().items() if rows.numel())
        require_weights_fit(own, self._precision.roles)
        self._outbox = Outbox(self._trainer, self._config)

    def _sent_model(self, ranks: GroupCollective, whole: LoadedModel | None, model_config: Any) -> SkeletonModel:
        """Return the skeleton of `whole`, the model that rank 0 has loaded and the others have not."""
        source, module = SentRows(ranks, whole and whole.module), skeleton(model_config).eval()
        compute_buffers(module)
        source.send_buffers(module)
        facts = self._described.fields() | {"hf_config": model_config}
        return SkeletonModel(**facts, module=module, weights=source)

    def measure(self, packs: Sequence[MicroBatch], passes: int, temperature: float | None) -> list[TokenScores]:
        """Score this rank's packs, then run empty passes up to `passes`; collective."""
        return self._trainer.measure(_filled(packs, passes), temperature)[: len(packs)]

    def measure_reference(self, packs: Sequence[MicroBatch], passes: int) -> list[TokenScores]:
        """Score with the reference policy; collective."""
        return self._trainer.measure_reference(_filled(packs, passes))[: len(packs)]

    def measure_kept(self, packs: Sequence[MicroBatch], passes: int) -> list[TokenScores]:
        """Score at the weights of the last `keep_version`; collective."""
        return self._trainer.measure_kept(_filled(packs, passes))[: len(packs)]

    def forward_backward(
        self, packs: Sequence[MicroBatch], passes: int, algorithm: Algorithm, denominators: Denominators
    ) -> LossStats:
        """Add the gradients of this rank's packs, then run empty passes up to `passes`; collective.

        Args:
            packs: packs of this rank.
            passes: number of passes of every rank.
            algorithm: the loss, without the user's own function, which each rank has loaded from its host.
            denominators: denominators of the whole train batch.

        Returns:
            The statistics of this rank's packs, in host memory; the group adds those of all ranks.
        """
        algorithm = replace(algorithm, loss=self._loss)
        return _on_host(self._trainer.forward_backward(_filled(packs, passes), algorithm, denominators))

    def optim_step(self, learning_rate: float) -> OptimReport:
        """Take the optimizer step; collective. The report is the same on every rank."""
        return self._trainer.optim_step(learning_rate)

    def refresh_reference(self) -> None:
        """Make the current policy the reference policy; collective."""
        self._trainer.refresh_reference()

    def keep_version(self) -> None:
        """Keep this rank's shards in the compute dtype; collective."""
        self._trainer.keep_version()

    def publish_weights(self, whole: bool) -> tuple[int, tuple[StoredPart, ...]]:
        """Gather the masters, and store them in the wire dtype; collective.

        Args:
            whole: False to leave out weights that are the same in every version, such as the base of LoRA adapters.

        Returns:
            Number of applied updates, and the stored parts; ranks other than 0 store none.
        """
        roles, unchanging = self._precision.roles, self._trainer.outgoing.unchanging
        weights = self._trainer.outgoing.on_the_wire(roles.wire_dtype, () if whole else unchanging)
        if self._rank == 0:
            return self._trainer.policy_version, store_parts(weights, roles.rollout_dtype, unchanging=unchanging)
        for _ in weights:
            pass
        return self._trainer.policy_version, ()

    def policy_version(self) -> int:
        """Return the number of applied updates."""
        return self._trainer.policy_version

    def wire_layout(self) -> tuple[WireWeight, ...]:
        """Return names, dtypes and shapes of the weights on the wire; collective."""
        return self._outbox.layout()

    def join_engines(self, membership: Membership) -> None:
        """Join the engines in a weight group; called on rank 0 only. See `Outbox.join`."""
        self._outbox.join(membership)

    def leave_engines(self) -> None:
        """Leave the weight group; called with `aside=True`, because the rank may be sending."""
        self._outbox.leave()

    def send_weights(self, keep: bool) -> Sent:
        """Send the weights to the weight group; collective. See `Outbox.send`."""
        return self._outbox.send(first=self._rank == 0, keep=keep)

    def next_handles(self, engines: int) -> dict[str, Any] | None:
        """Return handles of the next weights, on the first `engines` ranks; collective. See `Outbox.next_handles`."""
        return self._outbox.next_handles(shown=self._rank < engines)

    def end_handles(self) -> Sent:
        """End an update by handles; collective. See `Outbox.end_handles`."""
        return self._outbox.end_handles()

    def merge_count(self) -> MergeCount | None:
        """Return the counts of the last weights that were published; see `Trainer.merge_count`."""
        return self._trainer.merge_count()

    def report(self) -> SideReport:
        """Report what this rank runs; collective."""
        return self._trainer.report()

    def sees(self, path: Path) -> bool:
        """Return whether this host has the file."""
        return path.exists()

    def write_state(self, folder: Path | None) -> WrittenState:
        """Copy this rank's state to host memory, and start to write it.

        Args:
            folder: exists; None for a temporary folder of this host, from which `take_file` sends the files.
        """
        if folder is None:
            if self._temporary is not None:
                self._temporary.remove()
            self._temporary = LockedFolder("betterhalf-checkpoint-")
            folder = self._temporary.path
        return self._trainer.write_state(folder)

    def wait_written(self) -> tuple[ShardFile, ...]:
        """Wait until this rank's files are written, and list them; called with `aside=True`, so the rank continues."""
        return self._trainer.wait_written()

    def take_file(self, name: str) -> bytes:
        """Return the content of a file in the temporary folder, and remove the file, and the folder with the last one.

        Called with `aside=True`.
        """
        assert self._temporary is not None, "the state was written to a folder that all hosts share"
        path = self._temporary.path / name
        content = path.read_bytes()
        path.unlink()
        if self._temporary.empty:
            self._temporary.remove()
        return content

    def read_state(self, folder: Path, written: WrittenState, source: str) -> None:
        """Continue from this rank's rows of a checkpoint of any number of ranks; collective."""
        self._trainer.read_state(folder, written, source)

    def state(self) -> RankState:
        """Return this rank's part of the state, for `whole_state`."""
        return RankState(state=self._trainer.state(), ranges=self._trainer.weights.ranges())

    def load_state(self, state: TrainerState) -> None:
        """Continue from a whole state, of which this rank takes its rows; collective."""
        self._trainer.load(rows_of(state, self._trainer.weights.ranges()))


def _machine(device: torch.device) -> dict[str, str]:
    """Return everything about this process that affects how it rounds."""
    return {
        "betterhalf": betterhalf.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "threads": str(torch.get_num_threads()),
        "processor features": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _filled(packs: Sequence[MicroBatch], passes: int) -> list[MicroBatch]:
    """Return the packs, followed by empty ones up to the number of passes."""
    return [*packs, *(empty_pack() for _ in range(passes - len(packs)))]


def _on_host(stats: LossStats) -> LossStats:
    values: dict[str, Any] = {name: getattr(stats, name).cpu() for name in declared_reductions(LossStats)}
    return LossStats(**values, own={name: value.cpu() for name, value in stats.own.items()})
