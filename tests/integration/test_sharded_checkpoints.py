"""A checkpoint of any number of ranks is continued by any other: the same rows, and the same next step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.test_sharded import TIED, UNTIED, Case, Ranked, batch_of
from tests.ranks import run_ranks
from tests.written_checkpoints import load, part_of

from betterhalf.distributed.group import GroupCollective
from betterhalf.training import checkpoint
from betterhalf.training.shards import ShardFile
from betterhalf.training.trainer import OptimReport, TrainerState, WrittenState

STEPS = 2
"""Steps before the checkpoint."""


@dataclass
class Written:
    """Files of one rank, and its next step."""

    written: WrittenState
    files: tuple[ShardFile, ...]
    loss: float
    report: OptimReport


@dataclass
class Continued:
    """State that one rank read, and its next step."""

    state: TrainerState
    loss: float
    report: OptimReport


def next_step(one: Ranked, case: Case) -> tuple[float, OptimReport]:
    return one.learn(batch_of(case, STEPS)), one.trainer.optim_step(3e-4)


def write(ranks: GroupCollective | None, case: Case, partial: Path) -> Written:
    """Train, write a checkpoint, and take the next step while its files are written."""
    one = Ranked(case, ranks)
    for step in range(STEPS):
        one.learn(batch_of(case, step))
        one.trainer.optim_step(3e-4)
        one.trainer.refresh_reference()
    written = one.trainer.write_state(partial)
    loss, report = next_step(one, case)
    return Written(written, one.trainer.wait_written(), loss, report)


def resume(ranks: GroupCollective | None, case: Case, path: Path) -> Continued:
    """Read a checkpoint into a new trainer, and take the next step."""
    one = Ranked(case, ranks)
    saved = checkpoint.load(path)
    one.trainer.read_state(path, saved.written, saved.source)
    state = one.trainer.state()
    copied = {kind: {name: value.clone() for name, value in getattr(state, kind).items()} for kind in KINDS}
    return Continued(replace(state, **copied), *next_step(one, case))


KINDS = ("model", "optimizer", "reference")


def on(count: int, body: Callable[..., Any], case: Case, path: Path) -> list[Any]:
    """Call `body` as one process, or on ranks."""
    case = replace(case, ranks=count)
    return [body(None, case, path)] if count == 1 else run_ranks(body, count, case, path)


@cache
def written_by(count: int, case: Case, folder: Path) -> tuple[Path, list[Written]]:
    partial, path = checkpoint.begin(folder, STEPS), checkpoint.step_folder(folder, STEPS)
    done = on(count, write, case, partial)
    assert all(one.written == done[0].written for one in done)
    files = tuple(chain.from_iterable(one.files for one in done))
    saved = checkpoint.Checkpoint(path=path, step=STEPS, written=done[0].written, values={})
    checkpoint.finish(partial, files, saved, keep=1, best=())
    return path, done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize(
    ("writing", "reading", "case"),
    [(1, 1, TIED), (2, 1, TIED), (2, 2, TIED), (2, 3, TIED), (1, 2, UNTIED)],
    ids=["1-1", "2-1", "2-2", "2-3", "1-2-untied"],
)
def test_another_number_of_ranks_continues(writing: int, reading: int, case: Case, folder: Path) -> None:
    path, done = written_by(writing, case, folder / f"{writing}-{case.family}")
    found: list[Continued] = on(reading, resume, case, path)
    whole = load(path)
    assert whole.reference and whole.optimizer and whole.policy_version == STEPS
    for rank, one in enumerate(found):
        expected = part_of(whole, rank, reading)[0]
        for kind in KINDS:
            read, rows = getattr(one.state, kind), getattr(expected, kind)
            assert read.keys() == rows.keys()
            assert all(torch.equal(read[name], rows[name]) for name in rows)
        assert one.state.reference_digest == whole.reference_digest
        assert one.report == found[0].report
    if writing == reading:
        assert [(one.loss, one.report) for one in found] == [(one.loss, one.report) for one in done]
    assert sum(one.loss for one in found) == pytest.approx(sum(one.loss for one in done), rel=1e-6, abs=1e-9)
    assert found[0].report.grad_norm == pytest.approx(done[0].report.grad_norm, rel=1e-5)
