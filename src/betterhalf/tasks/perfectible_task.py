"""A base task restricted to its perfectible prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from betterhalf.config.schema import PerfectibleTask
from betterhalf.errors import InputError
from betterhalf.run_dir import plain_json
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.perfectible import SAME_DATA_KEYS, Provenance, SolvedRow, differences, read_kept
from betterhalf.tasks.task import Task
from betterhalf.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """Some problems of a task."""

    base: Task
    indices: tuple[int, ...]
    """Of the base task, in order."""

    def __len__(self) -> int:
        """Problems kept."""
        return len(self.indices)

    def prompt(self, index: int) -> Prompt:
        """The problem at `index` among those kept."""
        return self.base.prompt(self.indices[index])


def restrict(config: PerfectibleTask, base: Task) -> DatasetTask:
    """The prompts that the file keeps; rewards come from `base`, which this task closes.

    Raises:
        InputError: the file is missing, unfinished, or was counted on another task.
    """
    path = Path(config.path).expanduser()
    provenance, rows = read_kept(path)
    _require_same_task(path, provenance, config)
    _require_same_prompts(path, rows, base)
    return DatasetTask(problems=Subset(base=base, indices=tuple(row.index for row in rows)), grader=base)


def _require_same_task(path: Path, provenance: Provenance, config: PerfectibleTask) -> None:
    wanted = plain_json(config.base.model_dump())
    assert isinstance(wanted, dict)
    found = differences(provenance.task, wanted, ignored=SAME_DATA_KEYS)
    if found:
        raise InputError(f"{path} was counted on another task ({'; '.join(found)}); set task.base to that task")


def _require_same_prompts(path: Path, rows: list[SolvedRow], base: Task) -> None:
    """A shorter or reordered data file under the same settings would train on the wrong prompts."""
    for row in rows:
        if row.index >= len(base) or base.prompt(row.index).prompt_id != row.prompt_id:
            raise InputError(
                f"{path} keeps prompt {row.index} as {row.prompt_id!r}, which the base task does not have there; "
                "point task.base at the data that was counted"
            )
