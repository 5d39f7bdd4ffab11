"""Checkpoints written by any number of ranks, whose rows are cut by hand, in one process."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from betterhalf.distributed.shard_range import ShardRange
from betterhalf.training import checkpoint
from betterhalf.training.shards import ShardFile
from betterhalf.training.state_files import StateFiles, read_state
from betterhalf.training.trainer import TrainerState


def ranges_of(model: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, ShardRange]:
    """Return the rows of one rank as FSDP2 cuts them: chunks of equal size, the last ones shorter or empty."""
    if ranks == 1:
        return {}
    found = {}
    for name, tensor in model.items():
        rows = len(tensor)
        size = -(-rows // ranks)
        first = min(rank * size, rows)
        found[name] = ShardRange(first=first, count=min(size, rows - first), shape=tuple(tensor.shape))
    return found


def rows_of(tensors: Mapping[str, Tensor], ranges: Mapping[str, ShardRange]) -> dict[str, Tensor]:
    """Return one rank's rows; tensors without axes are whole."""
    found = {}
    for name, tensor in tensors.items():
        held = ranges.get(name.rpartition("/")[2])
        found[name] = tensor if held is None or not tensor.dim() else tensor[held.first : held.first + held.count]
    return found


def part_of(state: TrainerState, rank: int, ranks: int) -> tuple[TrainerState, dict[str, ShardRange]]:
    """Return what one rank holds of a state, and its rows."""
    ranges = ranges_of(state.model, rank, ranks)
    kinds = {kind: rows_of(getattr(state, kind), ranges) for kind in ("model", "optimizer", "reference")}
    return replace(state, **kinds), ranges


def save(
    folder: Path,
    step: int,
    state: TrainerState,
    values: dict[str, Any] | None = None,
    *,
    ranks: int = 1,
    keep: int = 2,
    best: Collection[int] = (),
) -> Path:
    """Write a checkpoint as `ranks` ranks do, and return its folder."""
    partial, final = checkpoint.begin(folder, step), checkpoint.step_folder(folder, step)
    try:
        results: list[tuple[ShardFile, ...]] = []
        writers = [StateFiles(rank, ranks) for rank in range(ranks)]
        for rank, writer in enumerate(writers):
            written = writer.write(partial, *part_of(state, rank, ranks))
        with ExitStack() as all_written:  # no rank writes any more when an error of one is raised
            for writer in writers:
                all_written.callback(lambda writer=writer: results.append(writer.wait()))
        saved = checkpoint.Checkpoint(path=final, step=step, written=written, values=values or {})
        checkpoint.finish(partial, tuple(chain(*results)), saved, keep=keep, best=best)
    except BaseException:
        checkpoint.discard(partial)
        raise
    return final


def load(path: Path, model: Mapping[str, Tensor] | None = None, rank: int = 0, ranks: int = 1) -> TrainerState:
    """Read a verified checkpoint as one rank of a trainer of `model` does, or whole."""
    saved = checkpoint.load(path)
    return read_state(path, saved.written, ranges_of(model or {}, rank, ranks), saved.source)
