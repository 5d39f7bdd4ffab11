"""The task of a run: read its data, check every row, and show and record the rows that are left out."""

from __future__ import annotations

import json

from betterhalf.config.schema import PerfectibleTask, PromptConfig, RunConfig
from betterhalf.metrics.console import progress as show_progress
from betterhalf.metrics.console import show_note
from betterhalf.models.description import ModelFacts
from betterhalf.run_dir import RunDir, write_text_atomic
from betterhalf.tasks.build import build_task
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.screening import BadRowRule, PromptLimits, listing, screen
from betterhalf.tasks.task import Task


def load_task(
    model: ModelFacts,
    config: RunConfig,
    *,
    rows: int | None = None,
    will_grade: bool = True,
    key: str = "task",
    max_tokens_key: str = "sampling.max_tokens",
) -> Task:
    """Build the task of the configuration, check every row, and show the rows that are left out.

    Args:
        model: gives tokenizer, context and vocabulary.
        config: gives task, length limit and `task.bad_rows`.
        rows: number of rows that will be used, from the first on; all by default.
        will_grade: true if completions will be graded; the grader is then tested before anything else.
        key: key of the task's settings, for messages.
        max_tokens_key: key of the length limit, for messages.

    Raises:
        RewardError: the grader cannot work.
        InputError: the data cannot be read, or rows cannot be used and are not to be left out; the message names file
            and row number.
        MissingExtraError: the task needs a package that is not installed.
    """
    task = build_task(config.task, model.tokenizer)
    try:
        limits = _limits(model, config, max_tokens_key)
        screened = _screened(task, limits, config, rows, will_grade=will_grade, key=key)
    except BaseException:
        task.close()
        raise
    for note in _notes(screened, bad_rows_rule(config, key).key):
        show_note(note, mode=config.logging.console)
    return screened


def _notes(task: DatasetTask, key: str) -> list[str]:
    """Return a note on the rows that are unusable, and one on those that the configuration's filters leave out."""
    rows = len(task.left_out) + len(task)
    unusable = [row for row in task.left_out if not row.filtered]
    filtered = [row for row in task.left_out if row.filtered]
    groups = ((f"{key}=skip leaves out", unusable), ("the task's filters leave out", filtered))
    return ["\n".join([f"{text} {len(left)} of {rows} rows:", *listing(left)]) for text, left in groups if left]


def write_left_out(run: RunDir, *tasks: Task) -> None:
    """Write the rows that were left out to `bad_rows.jsonl`; no file if there are none."""
    run.bad_rows.unlink(missing_ok=True)
    if left_out := [bad for task in tasks for bad in task.left_out]:
        rows = ({"row": bad.place, "reason": bad.reason} for bad in left_out)
        write_text_atomic(run.bad_rows, "".join(json.dumps(row) + "\n" for row in rows))


def _screened(
    task: DatasetTask, limits: PromptLimits, config: RunConfig, rows: int | None, *, will_grade: bool, key: str
) -> DatasetTask:
    rule, total = bad_rows_rule(config, key), len(task) if rows is None else min(rows, len(task))
    if total < _ROWS_WITHOUT_PROGRESS:
        return screen(task, limits, rule, count=rows, will_grade=will_grade)
    with show_progress("check rows", total, mode=config.logging.console) as bar:
        return screen(task, limits, rule, count=rows, will_grade=will_grade, advance=bar.advance)


def _limits(model: ModelFacts, config: RunConfig, max_tokens_key: str) -> PromptLimits:
    prompts = _prompt_config(config)
    return PromptLimits(
        context_length=model.context_length,
        max_tokens=config.sampling.max_tokens,
        max_tokens_key=max_tokens_key,
        vocab_size=int(model.hf_config.vocab_size),
        max_prompt_tokens=prompts.max_prompt_tokens if prompts else None,
        filters=prompts is not None and (prompts.max_prompt_tokens is not None or prompts.filter is not None),
    )


def _prompt_config(config: RunConfig) -> PromptConfig | None:
    """Return the task's prompt settings, those of its base for a perfectible set; None if it has none."""
    task = config.task.base if isinstance(config.task, PerfectibleTask) else config.task
    return task if isinstance(task, PromptConfig) else None


_ROWS_WITHOUT_PROGRESS = 10_000
"""Number of rows below which there is no progress bar, because checking them is quick."""


def bad_rows_rule(config: RunConfig, key: str = "task") -> BadRowRule:
    """Return the configured rule for rows that cannot be used; a perfectible set follows its base."""
    if isinstance(config.task, PerfectibleTask):
        return BadRowRule(action=config.task.base.bad_rows, key=f"{key}.base.bad_rows")
    return BadRowRule(action=config.task.bad_rows, key=f"{key}.bad_rows")
