"""The word for a run's reward, and the mean over seeds, by hand."""

from __future__ import annotations

import math

import pytest

from betterhalf.diagnostics.course import mean_over_seeds, reward_course, window_means


def rising(steps: int = 80, top: float = 0.95) -> list[float]:
    return [0.5 + (top - 0.5) * min(1.0, step / 40) for step in range(steps)]


@pytest.mark.parametrize(
    ("rewards", "word"),
    [
        (rising(), "learned"),
        ([*rising(40), *[0.95] * 20, *[0.6] * 10, *[0.95] * 30], "dips"),
        ([*rising(40), *[0.6] * 40], "damaged"),
        ([*rising(40), *[0.1] * 40], "collapsed"),
        ([0.5] * 80, "flat"),
        ([0.0] * 80, "flat"),
        ([0.5 - 0.1 * step / 80 for step in range(80)], "damaged"),
        ([0.4] * 10 + [0.6] * 9, "short"),
        ([0.5], "short"),
    ],
)
def test_each_course_has_its_word(rewards: list[float], word: str) -> None:
    assert reward_course(rewards, 20).outcome == word


def test_the_numbers_of_a_course_are_those_computed_by_hand() -> None:
    rewards = [0.2] * 5 + [0.8] * 10 + [0.4] * 5  # the window is a quarter of 20 steps: 5
    course = reward_course(rewards, 20)
    assert (course.first, course.final, course.lowest, course.best) == pytest.approx((0.2, 0.4, 0.2, 0.8))
    assert course.deepest_fall == pytest.approx(0.5) and course.outcome == "damaged"
    assert window_means([1.0, 2.0, 6.0], 2) == [1.5, 4.0]


def test_the_thresholds_are_where_the_page_says() -> None:
    def ends(final: float) -> str:
        return reward_course([0.2] * 20 + [0.8] * 40 + [final] * 20, 20).outcome

    assert [ends(final) for final in (0.19, 0.21, 0.63, 0.65)] == ["collapsed", "damaged", "damaged", "learned"]
    assert [reward_course([0.4] * 40 + [0.4 + rise] * 40, 20).outcome for rise in (0.04, 0.06)] == ["flat", "learned"]


def test_an_interval_over_three_seeds_is_students() -> None:
    """Mean 2, standard deviation 1, so 4.302653 / sqrt(3) on either side with two degrees of freedom."""
    found = mean_over_seeds([1.0, 2.0, 3.0])
    assert (found.count, found.mean) == (3, 2.0)
    assert (found.low, found.high) == pytest.approx((2 - 2.4841377, 2 + 2.4841377), abs=1e-6)


def test_a_positive_quantity_is_averaged_on_the_logarithmic_scale() -> None:
    found = mean_over_seeds([1e-4, 1e-2], positive=True)
    reach = 12.706205 * math.log(100) / math.sqrt(2) / math.sqrt(2)
    assert found.mean == pytest.approx(1e-3)
    assert math.log(found.high / found.mean) == pytest.approx(reach, rel=1e-6)


def test_a_single_seed_has_no_interval_and_missing_values_do_not_count() -> None:
    one = mean_over_seeds([0.7, math.nan])
    assert (one.count, one.mean) == (1, 0.7) and math.isnan(one.low) and math.isnan(one.high)
    none = mean_over_seeds([])
    assert none.count == 0 and math.isnan(none.mean)
    zero = mean_over_seeds([0.0, 2.0], positive=True)
    assert (zero.count, zero.mean, zero.low) == (2, 1.0, 0.0)


def test_the_interval_of_a_share_ends_at_0_and_1() -> None:
    found = mean_over_seeds([0.9, 1.0], share=True)
    assert found.low == pytest.approx(0.95 - 12.706205 * 0.05, abs=1e-6) and found.high == 1.0
    assert mean_over_seeds([0.9, 1.1], share=True).high > 1.0
