"""Build the parts of a run from its configuration: trainer, rollout engine, task, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from betterhalf.algorithms.advantage import check_dynamic_sampling, check_group_size, check_overlong_buffer
from betterhalf.algorithms.own_loss import try_own_loss
from betterhalf.algorithms.presets import Algorithm, resolve_algorithm
from betterhalf.cluster.build import Sides, backend_of
from betterhalf.cluster.trained import LoadTrained
from betterhalf.config.schema import ModelConfig, RunConfig
from betterhalf.errors import ConfigError
from betterhalf.models.description import ModelDescription, ModelFacts, describe_model
from betterhalf.precision.device import choose_device
from betterhalf.precision.roles import Precision, build_precision
from betterhalf.rollout.build import capabilities, check_engine, check_replay, check_training_sampling, require_engine
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.setup.data import load_task
from betterhalf.setup.evaluation import EvaluationSet, evaluation_config, load_evaluation_sets
from betterhalf.setup.model_checks import check_model, check_roles, require_stop_token, show_notes
from betterhalf.tasks.fingerprint import DataRecord
from betterhalf.tasks.task import Task
from betterhalf.training.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Parts of one run."""

    config: RunConfig
    precision: Precision
    """Formats of both sides, and the device."""
    algorithm: Algorithm
    model: ModelFacts
    """Tokenizer, vocabulary, context and stop tokens."""
    task: Task
    data: DataRecord
    """Digests of the task's rows and of its reward."""
    sides: Sides
    """Trainer and engine, and what they run on."""
    evaluation: tuple[EvaluationSet, ...] = ()
    """Data sets to evaluate; empty without evaluations."""

    @property
    def trainer(self) -> Trainer:
        """Trainer, which holds the policy pi."""
        return self.sides.trainer

    @property
    def engine(self) -> RolloutEngine:
        """Engine, which samples from mu; it holds no weights before the first sync."""
        return self.sides.engine

    @property
    def parameters(self) -> int:
        """Number of the model's parameters; a tied head counts once."""
        return self.sides.parameters

    def close(self) -> None:
        """Stop the worker processes of the tasks, the engine and the trainer."""
        for task in unique_tasks(self):
            task.close()
        self.sides.close()


def assemble(
    config: RunConfig,
    *,
    rows: int | None = None,
    evaluating: bool = False,
    sets: bool = False,
    trained: LoadTrained | None = None,
    folder: Path | None = None,
    restores: bool = False,
) -> Parts:
    """Load the data, and build trainer and engine where `cluster.backend` puts them.

    Errors are raised in the same order on every machine, the cheapest check first: the configuration, the model's own
    configuration, the data, the machine or cluster, and last the weights.

    Args:
        config: the configuration of the run.
        rows: number of rows of the task to use, from the first on; all by default.
        evaluating: True if the engine only samples: it may then truncate, since nothing is trained.
        sets: True to load the data sets of `[evaluate]` in place of the task, which is then the first of them. A run
            with evaluations during training loads them besides its task.
        trained: loads weights that replace the model's own.
        folder: run folder, which every process that writes a part of a checkpoint must see; None if none is written.
        restores: True if the caller restores a checkpoint before it uses the trainer.

    Raises:
        CheckpointError: the trained weights are of another model.
        InputError, MissingExtraError, RewardError: the model, the data, the grader or the settings cannot work.
    """
    algorithm = checked_algorithm(config, evaluating=evaluating)
    described = _checked_model(config, starts=trained is None)
    task, evaluation = load_data(described, config, rows, sets=sets, evaluating=evaluating)
    try:
        precision = build_precision(config.precision, checked_machine(config, described), exact=config.exact)
        keep_reference = algorithm.reads_reference and not evaluating
        sides = backend_of(config).build(
            config,
            described,
            precision,
            keep_reference=keep_reference,
            trained=trained,
            folder=folder,
            restores=restores,
        )
    except BaseException:
        close_data(task, evaluation)
        raise
    show_notes(sides.model, config.logging.console, config.lora)
    return Parts(
        config=config,
        precision=precision,
        algorithm=algorithm,
        model=sides.model,
        task=task,
        data=task.record(),
        sides=sides,
        evaluation=evaluation,
    )


def unique_tasks(parts: Parts) -> list[Task]:
    """Return the run's task, and the tasks of the data sets to evaluate that are not the same object."""
    return [parts.task, *(data.task for data in parts.evaluation if data.task is not parts.task)]


def load_data(
    described: ModelDescription,
    config: RunConfig,
    rows: int | None = None,
    *,
    sets: bool = False,
    evaluating: bool = False,
) -> tuple[Task, tuple[EvaluationSet, ...]]:
    """Load and check the task and the data sets to evaluate; see `assemble` for the arguments.

    Raises:
        InputError, MissingExtraError, RewardError: the data or the grader cannot be used.
    """
    if sets:
        evaluation = load_evaluation_sets(described, config, None)
        return evaluation[0].task, evaluation
    task = load_task(described, config, rows=rows)
    if evaluating or not config.evaluate.every:
        return task, ()
    try:
        return task, load_evaluation_sets(described, config, task)
    except BaseException:
        task.close()
        raise


def close_data(task: Task, evaluation: tuple[EvaluationSet, ...]) -> None:
    """Stop the worker processes of the tasks that `load_data` returned."""
    for loaded in (task, *(data.task for data in evaluation)):
        loaded.close()


def check_before_weights(
    config: RunConfig,
    *,
    describe: Callable[[ModelConfig], ModelDescription] = describe_model,
    check_data: Callable[[ModelDescription, RunConfig], None] | None = None,
) -> ModelDescription:
    """Run the checks of `assemble` that need no weights, in its order, and return the model's description.

    Args:
        config: the configuration of a training run.
        describe: reads the model's configuration files, unless the caller has them already.
        check_data: loads the data, as `load_data` does, and closes it; by default the data is not checked.

    Raises:
        InputError, MissingExtraError, RewardError: the settings contradict each other, or the model, the data or the
            machine cannot run them.
    """
    checked_algorithm(config, evaluating=False)
    described = _checked_model(config, describe=describe)
    if check_data is not None:
        check_data(described, config)
    checked_machine(config, described)
    return described


def checked_machine(config: RunConfig, described: ModelDescription) -> torch.device:
    """Return the device of this process, after every check of the machine and of the cluster.

    Raises:
        InputError: the engine cannot run on the device, or the cluster cannot be used.
        MissingExtraError: a package is missing.
    """
    backend = backend_of(config)
    device = choose_device(config) if backend.computes_here else torch.device("cpu")
    require_engine(config, device)
    backend.check(config, described)
    return device


def checked_algorithm(config: RunConfig, *, evaluating: bool) -> Algorithm:
    """Return the resolved algorithm, after every check that needs the configuration alone.

    Raises:
        InputError: the settings contradict each other, or the engine or a user-defined loss cannot work with them.
    """
    algorithm = resolve_algorithm(config.algorithm, with_loss=not evaluating)
    if not evaluating:
        check_training_sampling(config)
        check_replay(config)
        check_group_size(algorithm.advantage, config.training.group_size)
        check_dynamic_sampling(algorithm, config.training.group_size)
        check_overlong_buffer(algorithm.overlong_tokens(config.sampling.max_tokens), config.sampling.max_tokens)
        if algorithm.score_centering:
            _check_centering(config)
        if config.evaluate.every:
            check_engine(evaluation_config(config))
    if algorithm.loss is not None:
        try_own_loss(algorithm.loss, algorithm)
    check_engine(config)
    check_roles(config)
    return algorithm


def _check_centering(config: RunConfig) -> None:
    """Refuse Score Centering with an engine that does not report its distribution, or that samples from a part of it.

    Raises:
        ConfigError: the message says what to set.
    """
    if not capabilities(config).reports_top_tokens:
        raise ConfigError(
            f"algorithm.score_centering={config.algorithm.score_centering} needs the most likely tokens at each "
            f"position, which engine.type={config.engine.type} does not report; set engine=native, or leave it out."
        )
    if config.sampling.truncates:
        raise ConfigError(
            "algorithm.score_centering needs samples of the whole distribution; leave out sampling.top_p, "
            "sampling.top_k and sampling.min_p."
        )


def _checked_model(
    config: RunConfig, *, starts: bool = True, describe: Callable[[ModelConfig], ModelDescription] = describe_model
) -> ModelDescription:
    """Read the model's configuration files, and check them against the run's."""
    described = describe(config.model)
    check_described(described, config, starts=starts)
    return described


def check_described(described: ModelDescription, config: RunConfig, *, starts: bool = True) -> None:
    """Check the model's configuration files against the run's.

    Set `starts` to False if trained weights replace the model's own.

    Raises:
        InputError: the model cannot be trained or sampled as configured.
        MissingExtraError: a package is missing.
    """
    check_model(described, config, starts=starts)
    _check_experts(described, config)
    require_stop_token(described, config.model)


def _check_experts(described: ModelDescription, config: RunConfig) -> None:
    """Refuse routing replay for a model without experts.

    Raises:
        ConfigError: the message says what to set.
    """
    if config.algorithm.routing_replay and not described.has_experts:
        raise ConfigError(
            f"algorithm.routing_replay=true is for a mixture of experts, and model {described.name!r} "
            f"({described.hf_config.model_type}) has none; set algorithm.routing_replay=false"
        )


def algorithm_record(algorithm: Algorithm) -> dict[str, Any]:
    """Return the algorithm's resolved choices, for `environment.json`."""
    return {
        "preset": algorithm.preset,
        "advantage": algorithm.advantage,
        "surrogate": algorithm.surrogate.model_dump(),
        "correction": algorithm.correction.model_dump(),
        "aggregation": algorithm.aggregation,
        "denominator": algorithm.denominator,
        "score_centering": algorithm.score_centering,
        "loss": None if algorithm.loss is None else {"path": algorithm.loss.path, "digest": algorithm.loss.digest},
        "kl": algorithm.kl.model_dump(),
        "entropy_coefficient": algorithm.entropy_coefficient,
    }
