"""A base task restricted to its perfectible prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from betterhalf.config.schema import PerfectibleTask
from betterhalf.errors import InputError
from betterhalf.run_dir import plain_json
from betterhalf.tasks.dataset import DatasetTask, Problems, Subset
from betterhalf.tasks.fingerprint import DataRecord
from betterhalf.tasks.perfectible import SAME_DATA_KEYS, Provenance, SolvedRow, differences, read_kept, with_defaults


def restrict(config: PerfectibleTask, base: DatasetTask) -> DatasetTask:
    """Restrict `base` to the prompts that the file keeps; the result shares the grader of `base`, and closes it.

    Raises:
        InputError: the file is missing, unfinished, or was counted on another task or other rows.
    """
    path = Path(config.path).expanduser()
    provenance, rows = read_kept(path)
    _require_same_task(path, provenance, config)
    indices = _places(path, rows, base.problems)
    task = replace(base, problems=Subset(base=base.problems, indices=indices))
    if not config.base.allow_changed_data:
        require_same_rows(path, rows, task.record(), task.place, "task.base.")
    return task


def require_same_rows(
    path: Path, rows: Sequence[SolvedRow], data: DataRecord, place: Callable[[int], str], prefix: str
) -> None:
    """Refuse a task whose rows are not those that were counted.

    Args:
        path: the file with the counts.
        rows: rows of that file.
        data: digests of the task's rows; row i of the file is row i of the task.
        place: function that names a row of the task.
        prefix: prefix of the task's configuration keys, for the message.

    Raises:
        InputError: rows differ; the message names the first, and how many there are.
    """
    different = [index for index, row in enumerate(rows) if row.digest and row.digest != data.row(index)]
    if different:
        raise InputError(
            f"{len(different)} of {len(rows)} prompts of {path} are not those that were counted; the first is "
            f"{place(different[0])}. Restore the data, count again in another run_dir, or set "
            f"{prefix}allow_changed_data=true"
        )


def _require_same_task(path: Path, provenance: Provenance, config: PerfectibleTask) -> None:
    wanted = plain_json(config.base.model_dump())
    assert isinstance(wanted, dict)
    found = differences(with_defaults(provenance.task), wanted, ignored=SAME_DATA_KEYS)
    if found:
        raise InputError(f"{path} was counted on another task ({'; '.join(found)}); set task.base to that task")


def _places(path: Path, rows: Sequence[SolvedRow], problems: Problems) -> list[int]:
    """Return the index of each prompt in the base task, by its id: candidates are numbered without skipped rows."""
    if all(row.index < len(problems) and problems.row(row.index).prompt_id == row.prompt_id for row in rows):
        return [row.index for row in rows]
    known = {problems.row(index).prompt_id: index for index in range(len(problems))}
    for row in rows:
        if row.prompt_id not in known:
            raise InputError(
                f"{path} keeps prompt {row.index} as {row.prompt_id!r}, which the base task does not have; "
                "point task.base at the data that was counted"
            )
    return [known[row.prompt_id] for row in rows]
