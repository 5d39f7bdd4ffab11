"""A trainer that died is started again from the last checkpoint, up to a limit."""

from __future__ import annotations

import pytest

from betterhalf.errors import TrainerDiedError
from betterhalf.runs.progress import Progress
from betterhalf.runs.trainer_recovery import TrainerRestarts, retry_on_trainer_death


class Run:
    """Run of six steps with a checkpoint after every third, whose trainer dies in some steps, in this order."""

    def __init__(self, *deaths: int, bad_starts: int = 0) -> None:
        self.deaths, self.bad_starts = list(deaths), bad_starts
        self.finished, self.saved = 0, 0
        self.steps: list[int] = []
        self.notes: list[str] = []

    def train(self, progress: Progress) -> Progress:
        self.finished = progress.step
        while self.finished < 6:
            step = self.finished + 1
            if self.deaths[:1] == [step]:
                del self.deaths[0]
                raise TrainerDiedError("rank 1 was killed")
            self.steps.append(step)
            self.finished = step
            if step % 3 == 0:
                self.saved = step
        return Progress(step=self.finished)

    def begin_again(self) -> Progress:
        if self.bad_starts:
            self.bad_starts -= 1
            raise TrainerDiedError("rank 0 did not start")
        return Progress(step=self.saved)

    def recover(self, limit: int) -> int:
        restarts = TrainerRestarts(limit, self.notes.append)
        return retry_on_trainer_death(
            self.train, Progress(), self.begin_again, lambda: self.finished + 1, restarts
        ).step


def test_a_healthy_trainer_is_left_alone() -> None:
    run = Run()
    assert run.recover(0) == 6
    assert run.steps == [1, 2, 3, 4, 5, 6]
    assert run.notes == []


def test_restarts_are_counted_in_the_step_in_which_the_trainer_died() -> None:
    run = Run(2, 5, 5, bad_starts=1)
    restarts = TrainerRestarts(3, run.notes.append)
    retry_on_trainer_death(run.train, Progress(), run.begin_again, lambda: run.finished + 1, restarts)
    assert [restarts.count_in(step) for step in range(1, 7)] == [0, 2, 0, 0, 2, 0]


def test_the_steps_since_the_checkpoint_are_repeated() -> None:
    run = Run(5)
    assert run.recover(1) == 6
    assert run.steps == [1, 2, 3, 4, 4, 5, 6]
    assert run.notes == [
        "note: rank 1 was killed\nStarting the trainer again (1 of 1) from the last checkpoint; no step is lost."
    ]


def test_each_new_step_may_die_as_often() -> None:
    run = Run(2, 5, 6)
    assert run.recover(1) == 6
    assert run.steps == [1, 1, 2, 3, 4, 4, 5, 4, 5, 6]


def test_a_death_in_a_repeated_step_counts_with_the_first() -> None:
    with pytest.raises(TrainerDiedError, match=r"died 2 times up to step 5 \(cluster.max_restarts=1\); rank 1"):
        Run(5, 4).recover(1)


def test_a_death_while_it_starts_again_counts_as_well() -> None:
    assert Run(5, bad_starts=1).recover(2) == 6
    with pytest.raises(TrainerDiedError, match=r"died 2 times up to step 5 .*; rank 0 did not start"):
        Run(5, bad_starts=1).recover(1)


def test_no_restart_may_be_allowed() -> None:
    with pytest.raises(TrainerDiedError, match=r"died 1 time up to step 1 \(cluster.max_restarts=0\)"):
        Run(1).recover(0)
