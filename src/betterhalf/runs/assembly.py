"""Build the parts of a run from its configuration: the two wings, the task between them, and what they agree on."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from betterhalf.algorithms.advantage import check_group_size, check_overlong_buffer
from betterhalf.algorithms.presets import Algorithm, resolve_algorithm
from betterhalf.config.sampling import require_whole_distribution
from betterhalf.config.schema import RunConfig
from betterhalf.errors import MissingExtraError
from betterhalf.models.description import describe_model
from betterhalf.models.loading import load_weights
from betterhalf.models.stop_tokens import TurnEnd
from betterhalf.precision.roles import Precision, build_precision
from betterhalf.rollout.build import build_engine, check_engine, require_engine
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.setup.data import load_task
from betterhalf.setup.device import choose_device
from betterhalf.setup.model_checks import check_model, check_roles, require_stop_token, show_notes
from betterhalf.tasks.fingerprint import DataRecord
from betterhalf.tasks.task import Task
from betterhalf.training.policy_trainer import PolicyTrainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything one run is made of."""

    config: RunConfig
    precision: Precision
    algorithm: Algorithm
    tokenizer: Any
    """transformers tokenizer: decodes completions."""
    task: Task
    data: DataRecord
    """Digests of the task's rows and of its reward."""
    trainer: PolicyTrainer
    """The wing of pi."""
    engine: RolloutEngine
    """The wing of mu; holds no weights before the first sync."""
    turn_end: TurnEnd | None = None
    """The token with which the model's chat template ends a turn, if it shows one."""

    def close(self) -> None:
        """End worker processes and the engine."""
        self.task.close()
        self.engine.close()


def assemble(config: RunConfig, *, rows: int | None = None, evaluating: bool = False) -> Parts:
    """Load the model once and build trainer, engine and task around it.

    What is wrong is said in this order, so that it is said early and alike on every machine: the configuration, the
    model's own configuration, the data, what this machine lacks, and last the weights.

    Args:
        config: of the run.
        rows: rows of the task that will be used, from the first on; all if absent.
        evaluating: the engine only samples, and nobody compares its logprobs with the trainer's, so it may sample from
            a truncated distribution.

    Raises:
        InputError: a model, data set or combination of settings that cannot work.
    """
    if not evaluating:
        require_whole_distribution(config.sampling)
    algorithm = resolve_algorithm(config.algorithm)
    check_group_size(algorithm.advantage, config.training.group_size)
    check_overlong_buffer(algorithm.overlong_tokens(config.sampling.max_tokens), config.sampling.max_tokens)
    check_engine(config)
    check_roles(config)
    described = describe_model(config.model)
    check_model(described, config)
    require_stop_token(described, config.model)
    task = load_task(described, config, rows=rows)
    try:
        device = choose_device(config)
        require_logging(config)
        require_engine(config, device)
        model = load_weights(described)
        show_notes(model, config.logging.console)
        precision = build_precision(config.precision, device)
        engine = build_engine(config, model.hf_config, model.stop_token_ids, precision)
        trainer = PolicyTrainer(model, config=config, precision=precision, algorithm=algorithm)
    except BaseException:
        task.close()
        raise
    return Parts(
        config=config,
        precision=precision,
        algorithm=algorithm,
        tokenizer=model.tokenizer,
        task=task,
        data=task.record(),
        trainer=trainer,
        engine=engine,
        turn_end=model.turn_end,
    )


def require_logging(config: RunConfig) -> None:
    """Refuse TensorBoard events without the package before the run has left anything on disk.

    Raises:
        MissingExtraError: `tensorboard` is not installed.
    """
    if config.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError(
            "logging.tensorboard=true needs the package tensorboard; install it with "
            "`pip install 'betterhalf[tensorboard]'`"
        )


def with_precision(config: RunConfig, precision: str) -> RunConfig:
    """The same run in another precision: nothing else differs."""
    data = config.model_dump()
    data["precision"]["preset"] = precision
    return RunConfig.model_validate(data)


def algorithm_record(algorithm: Algorithm) -> dict[str, Any]:
    """The algorithm's resolved choices, for `environment.json`."""
    return {
        "preset": algorithm.preset,
        "advantage": algorithm.advantage,
        "surrogate": algorithm.surrogate.model_dump(),
        "correction": algorithm.correction.model_dump(),
        "aggregation": algorithm.aggregation,
        "denominator": algorithm.denominator,
    }
