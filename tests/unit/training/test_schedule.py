"""Learning-rate schedules, compared with values computed by hand."""

from __future__ import annotations

import pytest

from betterhalf.config.schema import OptimizerConfig
from betterhalf.training.schedule import learning_rate


def test_warm_up_already_learns_at_step_one_and_reaches_the_peak() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=3)
    assert [learning_rate(config, step, 10) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


def test_linear_falls_from_the_peak_to_the_floor_at_the_last_step() -> None:
    config = OptimizerConfig(learning_rate=2.0, scheduler="linear", min_ratio=0.5)
    assert [learning_rate(config, step, 5) for step in (1, 3, 5)] == [2.0, 1.5, 1.0]


def test_cosine_is_half_way_in_the_middle() -> None:
    config = OptimizerConfig(learning_rate=1.0, scheduler="cosine")
    assert learning_rate(config, 3, 5) == pytest.approx(0.5)
    assert learning_rate(config, 5, 5) == pytest.approx(0.0)


def test_constant_never_moves() -> None:
    config = OptimizerConfig(learning_rate=3e-4)
    assert {learning_rate(config, step, 7) for step in range(1, 8)} == {3e-4}
