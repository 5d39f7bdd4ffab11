"""Hold rows out from training: the same ones in every run on the same rows, whatever the seed of the run."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from betterhalf.config.schema import RowsConfig
from betterhalf.errors import InputError
from betterhalf.tasks.dataset import DatasetTask, Problems, Subset


def take_part(task: DatasetTask, config: RowsConfig) -> DatasetTask:
    """Restrict a task to the part of its rows that the configuration asks for.

    Raises:
        InputError: the part would have no rows.
    """
    if not config.held_out or config.part == "all":
        return task
    held_out = held_out_rows(task.problems, config.held_out, config.held_out_seed)
    wanted = config.part == "held_out"
    indices = [index for index in range(len(task)) if (index in held_out) == wanted]
    return replace(task, problems=Subset(base=task.problems, indices=indices))


def held_out_rows(problems: Problems, held_out: float, seed: int) -> frozenset[int]:
    """Return the indices of the rows that are held out: those whose questions come first in a seeded order.

    Rows with the same question go together, so that no question is on both sides; there may therefore be a few more
    than asked for.

    Raises:
        InputError: no row would be left to train on.
    """
    by_question: dict[str, list[int]] = {}
    for index in range(len(problems)):
        row = problems.row(index)
        by_question.setdefault(row.question or row.place, []).append(index)
    wanted = held_out_count(held_out, len(problems))
    chosen: list[int] = []
    for question in sorted(by_question, key=lambda text: _place(text, seed)):
        if len(chosen) >= wanted:
            return frozenset(chosen)
        chosen += by_question[question]
    raise InputError(
        f"task.held_out={held_out:g} leaves none of {len(problems)} rows ({len(by_question)} different questions) to "
        "train on; hold out fewer"
    )


def held_out_count(held_out: float, rows: int) -> int:
    """Return the number of rows that `task.held_out` asks for; a share is at least one row."""
    return int(held_out) if held_out >= 1 else max(1, round(held_out * rows))


def _place(question: str, seed: int) -> bytes:
    text = f"{seed},{question}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()
