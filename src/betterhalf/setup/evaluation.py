"""The data sets of an evaluation, loaded and checked before anything is sampled."""

from __future__ import annotations

from dataclasses import dataclass

from betterhalf.config.schema import RunConfig, TaskConfig
from betterhalf.errors import ConfigError
from betterhalf.models.description import ModelFacts
from betterhalf.setup.data import load_task
from betterhalf.tasks.answers import Extract, answer_extractor
from betterhalf.tasks.fingerprint import DataRecord
from betterhalf.tasks.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """One data set to evaluate."""

    name: str
    """Name in `[evaluate.data]`, or the type of the run's own task."""
    task: Task
    data: DataRecord
    """Digests of the rows and of the reward."""
    config: RunConfig
    """Settings of the run, with this task and the sampling of the evaluation."""
    extract: Extract | None
    """Function that extracts the answer of a completion; None if there is none, and so no maj@k."""
    key: str
    """Key of the task's settings, such as `evaluate.data.NAME`."""

    @property
    def prompts(self) -> int:
        """Number of prompts to evaluate."""
        return min(len(self.task), self.config.evaluate.max_prompts or len(self.task))


def evaluation_config(config: RunConfig, task: TaskConfig | None = None) -> RunConfig:
    """Return the settings of an evaluation: the sampling of `[evaluate]`, and another task if one is given."""
    given = config.evaluate
    changes = {"temperature": given.temperature, "top_p": given.top_p, "top_k": given.top_k}
    changes |= {"min_p": given.min_p, "max_tokens": given.max_tokens}
    sampling = config.sampling.model_copy(update={key: value for key, value in changes.items() if value is not None})
    return config.model_copy(update={"sampling": sampling, "task": task or config.task})


def require_gap_can_be_measured(config: RunConfig) -> None:
    """Refuse to weight completions of a truncated distribution, which never samples some tokens that pi may.

    Raises:
        ConfigError: `evaluate.deployment_gap` is set, and top-p, top-k or min-p truncates.
    """
    if config.evaluate.deployment_gap and evaluation_config(config).sampling.truncates:
        raise ConfigError(
            "evaluate.deployment_gap=true weights the engine's completions by pi/mu, which needs samples from the "
            "whole distribution. Set evaluate.top_p=1, evaluate.top_k=-1 and evaluate.min_p=0, or leave the gap out."
        )


def load_evaluation_sets(model: ModelFacts, config: RunConfig, own: Task | None) -> tuple[EvaluationSet, ...]:
    """Load the data sets of `[evaluate.data]`, or else the run's own task.

    Args:
        model: gives tokenizer, context and vocabulary.
        config: settings of the run.
        own: the run's task if it is loaded already; it is shared where that changes nothing.

    Raises:
        InputError: a data set cannot be read, or rows cannot be used and are not to be left out.
    """
    tasks = config.evaluate.data or {config.task.type: config.task}
    found: list[EvaluationSet] = []
    try:
        for name, task in tasks.items():
            found.append(_load(model, config, name, task, own))
    except BaseException:
        for one in found:
            one.task.close()
        raise
    return tuple(found)


def _load(model: ModelFacts, config: RunConfig, name: str, chosen: TaskConfig, own: Task | None) -> EvaluationSet:
    settings = evaluation_config(config, chosen)
    key = f"evaluate.data.{name}" if config.evaluate.data else "task"
    # A prompt that fits with a short completion may not fit with a longer one.
    if own is not None and chosen == config.task and settings.sampling.max_tokens <= config.sampling.max_tokens:
        task = own
    else:
        task = load_task(
            model,
            settings,
            rows=config.evaluate.max_prompts,
            key=key,
            max_tokens_key="sampling.max_tokens" if config.evaluate.max_tokens is None else "evaluate.max_tokens",
        )
    return EvaluationSet(
        name=name,
        task=task,
        data=task.record(),
        config=settings,
        extract=answer_extractor(task, chosen, model.tokenizer),
        key=key,
    )
