"""Check that a resumed run has the rows and the reward that it was started with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from betterhalf.config.schema import PerfectibleTask, RunConfig, TaskConfig
from betterhalf.errors import CheckpointError
from betterhalf.tasks.fingerprint import DataRecord

RESUMABLE_KEYS = frozenset({"bad_rows", "allow_changed_data"})
"""Task settings that a resumed run may change: digests of the rows show their effect."""


def require_same_data(
    where: str,
    saved: Mapping[str, Any] | None,
    data: DataRecord,
    place: Callable[[int], str],
    config: RunConfig,
    key: str = "task",
) -> str | None:
    """Compare a run's data with the data that it was started with.

    Args:
        where: name of the holder of the record, for messages.
        saved: the record as JSON; None in a checkpoint of an older version, which has none.
        data: record of the current task.
        place: returns the name of a row of the current task.
        config: settings of the task.
        key: key of those settings, for messages.

    Returns:
        A note for the user; None if nothing differs.

    Raises:
        CheckpointError: rows or reward differ, and `allow_changed_data` is not set.
    """
    if saved is None:
        return f"note: {where} holds no digest of its data, so changes of the rows cannot be detected"
    found = data_changes(DataRecord.from_json(saved), data, place)
    if not found:
        return None
    setting = f"{task_prefix(config, key)}allow_changed_data=true"
    if allows_changed_data(config):
        return f"note: {setting}: {where} was made with other data; {'; '.join(found)}"
    raise CheckpointError(
        f"{where} was made with other data: {'; '.join(found)}. Restore that data, start a new run in another "
        f"run_dir, or continue with the new data by setting {setting}"
    )


def data_changes(saved: DataRecord, data: DataRecord, place: Callable[[int], str]) -> list[str]:
    """Describe the differences of two records: rows that differ, the number of rows, and the reward."""
    found = []
    if different := saved.rows_that_differ(data):
        found.append(f"{len(different)} of {saved.rows} rows differ, the first is {place(different[0])}")
    if saved.rows != data.rows:
        found.append(f"there were {saved.rows} rows and there are now {data.rows}")
    if changes := saved.reward_changes(data):
        found.append(f"the reward differs ({'; '.join(changes)})")
    return found


def allows_changed_data(config: RunConfig) -> bool:
    """Return whether the task's rows may differ from those the run was started with."""
    task = config.task.base if isinstance(config.task, PerfectibleTask) else config.task
    return task.allow_changed_data


def without_permission(config: RunConfig) -> RunConfig:
    """Return the configuration that a run records: `allow_changed_data` applies to one start, not to every resume."""
    data = {name: _without(task) for name, task in config.evaluate.data.items()}
    evaluate = config.evaluate.model_copy(update={"data": data})
    return config.model_copy(update={"task": _without(config.task), "evaluate": evaluate})


def _without(task: TaskConfig) -> TaskConfig:
    if isinstance(task, PerfectibleTask):
        return task.model_copy(update={"base": task.base.model_copy(update={"allow_changed_data": False})})
    return task.model_copy(update={"allow_changed_data": False})


def permission(config: RunConfig) -> tuple[str, ...]:
    """Return the override that restores what `without_permission` removed."""
    return (f"{task_prefix(config)}allow_changed_data=true",) if allows_changed_data(config) else ()


def task_prefix(config: RunConfig, key: str = "task") -> str:
    """Return the prefix of the keys for the task's rows; a perfectible set has them in its base."""
    return f"{key}.base." if isinstance(config.task, PerfectibleTask) else f"{key}."
