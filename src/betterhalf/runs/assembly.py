"""Build the parts of a run from its configuration: the two wings, the task between them, and what they agree on."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from typing import Any

import torch

from betterhalf.algorithms.advantage import check_group_size, check_overlong_buffer
from betterhalf.algorithms.presets import Algorithm, resolve_algorithm
from betterhalf.config.engine import require_whole_distribution
from betterhalf.config.schema import PerfectibleTask, RunConfig
from betterhalf.errors import ConfigError, MissingExtraError
from betterhalf.metrics.console import progress as show_progress
from betterhalf.metrics.console import show_note
from betterhalf.models.description import ModelFacts, describe_model
from betterhalf.models.loading import load_weights
from betterhalf.models.stop_tokens import TurnEnd
from betterhalf.precision.policy import PrecisionPolicy, build_policy
from betterhalf.rollout.build import build_engine, check_engine, require_engine
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.run_dir import RunDir, write_text_atomic
from betterhalf.runs.model_checks import check_model, check_roles, require_stop_token, show_notes
from betterhalf.tasks.build import build_task
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.fingerprint import DataRecord
from betterhalf.tasks.screening import BadRowRule, PromptLimits, listing, screen
from betterhalf.tasks.task import Task
from betterhalf.training.policy_trainer import PolicyTrainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything one run is made of."""

    config: RunConfig
    policy: PrecisionPolicy
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


def choose_device(config: RunConfig) -> torch.device:
    """The device of `config.device`.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU; set device=cpu or device=auto")
    wanted = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)


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
        policy = build_policy(config.precision, device)
        engine = build_engine(config, model.hf_config, model.stop_token_ids, policy)
        trainer = PolicyTrainer(model, config=config, policy=policy, algorithm=algorithm)
    except BaseException:
        task.close()
        raise
    return Parts(
        config=config,
        policy=policy,
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


def load_task(model: ModelFacts, config: RunConfig, *, rows: int | None = None, will_grade: bool = True) -> Task:
    """The task of the configuration, every row checked before anything is sampled; rows left out are shown.

    Args:
        model: gives tokenizer, context and vocabulary.
        config: task, length limit, and `task.bad_rows`.
        rows: rows that will be used, from the first on; all if absent.
        will_grade: whether completions will be graded, so that the grader tries itself out before anything else.

    Raises:
        RewardError: the grader cannot work.
        InputError: rows that cannot be used, named by file and row number, unless they are to be left out.
    """
    task = build_task(config.task, model.tokenizer)
    try:
        screened = _screened(task, model, config, rows, will_grade=will_grade)
    except BaseException:
        task.close()
        raise
    if screened.left_out:
        key, left = bad_rows_rule(config).key, screened.left_out
        lines = [f"{key}=skip leaves out {len(left)} of {len(left) + len(screened)} rows:", *listing(left)]
        show_note("\n".join(lines), mode=config.logging.console)
    return screened


def write_left_out(run: RunDir, task: Task) -> None:
    """Write the rows that were left out to `bad_rows.jsonl`; no file if there are none."""
    run.bad_rows.unlink(missing_ok=True)
    if task.left_out:
        rows = ({"row": bad.place, "reason": bad.reason} for bad in task.left_out)
        write_text_atomic(run.bad_rows, "".join(json.dumps(row) + "\n" for row in rows))


def _screened(
    task: DatasetTask, model: ModelFacts, config: RunConfig, rows: int | None, *, will_grade: bool
) -> DatasetTask:
    limits = PromptLimits(
        context_length=model.context_length,
        max_tokens=config.sampling.max_tokens,
        vocab_size=int(model.hf_config.vocab_size),
    )
    rule, total = bad_rows_rule(config), len(task) if rows is None else min(rows, len(task))
    if total < _ROWS_WITHOUT_PROGRESS:
        return screen(task, limits, rule, count=rows, will_grade=will_grade)
    with show_progress("check rows", total, mode=config.logging.console) as bar:
        return screen(task, limits, rule, count=rows, will_grade=will_grade, advance=bar.advance)


_ROWS_WITHOUT_PROGRESS = 10_000
"""Fewer are checked in the time it takes to read a line."""


def bad_rows_rule(config: RunConfig) -> BadRowRule:
    """Return the configured rule for rows that cannot be used; a perfectible set follows its base."""
    if isinstance(config.task, PerfectibleTask):
        return BadRowRule(action=config.task.base.bad_rows, key="task.base.bad_rows")
    return BadRowRule(action=config.task.bad_rows, key="task.bad_rows")


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
