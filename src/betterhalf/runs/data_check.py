"""A resumed run must go on with the rows and the reward it was started with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from betterhalf.config.schema import PerfectibleTask, RunConfig
from betterhalf.errors import CheckpointError
from betterhalf.tasks.fingerprint import DataRecord

RESUMABLE_KEYS = frozenset({"bad_rows", "allow_changed_data"})
"""Task settings that a resumed run may change: the digests say what they changed."""


def require_same_data(
    where: str, saved: Mapping[str, Any] | None, data: DataRecord, place: Callable[[int], str], config: RunConfig
) -> str | None:
    """Compare a run's data with what it was started with.

    Args:
        where: what holds the record, for messages.
        saved: the record as JSON; None in a checkpoint of an older version, which has none.
        data: of the task as it is now.
        place: names a row of the task as it is now.
        config: settings of the task.

    Returns:
        A note for the user, if there is something to know.

    Raises:
        CheckpointError: rows or reward differ, and `allow_changed_data` is not set.
    """
    if saved is None:
        return f"note: {where} holds no digest of its data; whether the rows are still the same cannot be checked"
    found = data_changes(DataRecord.from_json(saved), data, place)
    if not found:
        return None
    key = f"{task_prefix(config)}allow_changed_data=true"
    if allows_changed_data(config):
        return f"note: {key}: {where} was made with other data; {'; '.join(found)}"
    raise CheckpointError(
        f"{where} was made with other data: {'; '.join(found)}. Restore what it was made with, start a new run in "
        f"another run_dir, or go on with the new data by {key}"
    )


def data_changes(saved: DataRecord, data: DataRecord, place: Callable[[int], str]) -> list[str]:
    """Differences of two records in words: rows that differ, rows more or fewer, and what the reward is made of."""
    found = []
    if different := saved.rows_that_differ(data):
        found.append(f"{len(different)} of {saved.rows} rows differ, the first is {place(different[0])}")
    if saved.rows != data.rows:
        found.append(f"there were {saved.rows} rows and now are {data.rows}")
    if changes := saved.reward_changes(data):
        found.append(f"the reward differs ({'; '.join(changes)})")
    return found


def allows_changed_data(config: RunConfig) -> bool:
    """Return whether the task's rows may differ from those the run was started with."""
    task = config.task.base if isinstance(config.task, PerfectibleTask) else config.task
    return task.allow_changed_data


def without_permission(config: RunConfig) -> RunConfig:
    """The configuration as a run keeps it: `allow_changed_data` is meant for one start, not for every resume."""
    task = config.task
    if isinstance(task, PerfectibleTask):
        base = task.base.model_copy(update={"allow_changed_data": False})
        return config.model_copy(update={"task": task.model_copy(update={"base": base})})
    return config.model_copy(update={"task": task.model_copy(update={"allow_changed_data": False})})


def permission(config: RunConfig) -> tuple[str, ...]:
    """The override that gives back to a kept configuration what `without_permission` took from it."""
    return (f"{task_prefix(config)}allow_changed_data=true",) if allows_changed_data(config) else ()


def task_prefix(config: RunConfig) -> str:
    """Prefix of the keys of the task's rows; a perfectible set has them in its base."""
    return "task.base." if isinstance(config.task, PerfectibleTask) else "task."
