"""The mismatch metrics against exact arithmetic and hand-made cases."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from betterhalf.diagnostics.logprob_gap import (
    PROBABILITY_EDGES,
    completion_positions,
    gap_profile,
    k3,
    mismatch_bins,
    mismatch_metrics,
    position_edges,
)
from betterhalf.errors import EngineNumericsError, RunError
from betterhalf.metrics.catalogue import CATALOGUE

mpmath.mp.dps = 50


def exact_k3(d: float) -> float:
    return float(mpmath.exp(mpmath.mpf(d)) - 1 - mpmath.mpf(d))


def metrics(trainer: list[float], behavior: list[float], index: list[int], sequences: int) -> dict[str, float]:
    def tensor(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    found = mismatch_metrics(tensor(trainer), tensor(behavior), torch.tensor(index), sequences)
    return {name.removeprefix("mismatch/"): value for name, value in found.items()}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(sign=st.sampled_from((-1, 1)), exponent=st.floats(-18, 2.0))
def test_k3_is_exact_to_the_last_digits_at_any_size(sign: int, exponent: float) -> None:
    d = sign * 10.0**exponent
    assert k3(torch.tensor(d, dtype=torch.float64)).item() == pytest.approx(exact_k3(d), rel=2e-14)


def test_k3_is_accurate_on_both_sides_of_the_series() -> None:
    ds = [side * 0.02 * factor for side in (-1, 1) for factor in (0.999999, 1.0, 1.000001)]
    assert k3(torch.tensor(ds, dtype=torch.float64)).tolist() == pytest.approx([exact_k3(d) for d in ds], rel=2e-14)


def test_names_are_those_of_the_catalogue() -> None:
    found = mismatch_metrics(torch.zeros(2), torch.zeros(2), torch.tensor([0, 1]), 2)
    of_a_merge = {"mismatch/lost_update_fraction"}
    assert found.keys() == {name for name in CATALOGUE if name.startswith("mismatch/")} - of_a_merge


def test_estimators_equal_exact_arithmetic() -> None:
    behavior, ds = [-0.5, -2.0, -1e-4, -3.0], [1e-4, -2e-3, 5e-5, 0.3]
    trainer = [b + d for b, d in zip(behavior, ds, strict=True)]
    ds = [t - b for t, b in zip(trainer, behavior, strict=True)]
    found = metrics(trainer, behavior, [0, 0, 1, 1], 2)
    gaps = [float(mpmath.exp(t) - mpmath.exp(b)) for t, b in zip(trainer, behavior, strict=True)]
    assert found["k1/mean"] == pytest.approx(-sum(ds) / 4, rel=1e-13)
    assert found["k2/mean"] == pytest.approx(sum(d * d for d in ds) / 8, rel=1e-13)
    assert found["k3/mean"] == pytest.approx(sum(map(exact_k3, ds)) / 4, rel=1e-13)
    assert found["chi2_token"] == pytest.approx(sum(math.expm1(d) ** 2 for d in ds) / 4, rel=1e-13)
    assert found["prob_gap/mean_abs"] == pytest.approx(sum(map(abs, gaps)) / 4, rel=1e-12)
    assert found["prob_gap/max"] == pytest.approx(max(gaps), rel=1e-12)
    assert found["prob_gap/min"] == pytest.approx(min(gaps), rel=1e-12)
    assert found["log_ratio/mean"] == -found["k1/mean"]
    mean = sum(ds) / 4
    assert found["log_ratio/std"] == pytest.approx(math.sqrt(sum((d - mean) ** 2 for d in ds) / 4), rel=1e-13)
    assert found["log_ratio/max_abs"] == pytest.approx(0.3)
    assert found["log_ratio/max"] == pytest.approx(0.3)
    assert found["log_ratio/min"] == pytest.approx(-2e-3)
    assert found["log_ratio/mean_abs"] == pytest.approx(sum(map(abs, ds)) / 4, rel=1e-13)
    sizes = [abs(gap) for gap in gaps]
    spread = math.sqrt(sum((size - sum(sizes) / 4) ** 2 for size in sizes) / 4)
    assert found["prob_gap/std_abs"] == pytest.approx(spread, rel=1e-12)
    assert found["tokens"] == 4


def test_accidents_are_counted_on_each_side_of_a_factor_of_twenty() -> None:
    # exp(3) = 20.1: of eight tokens one is beyond it above, three below; exactly 3 is not beyond.
    ds = [-3.001, -20.0, -3.25, -3.0, 0.0, 3.0, 2.999, 3.001]
    found = metrics([-30.0 + d for d in ds], [-30.0] * 8, [0, 0, 0, 1, 1, 1, 1, 1], 2)
    assert (found["accident_fraction"], found["accident_fraction_above"]) == (3 / 8, 1 / 8)


def test_identical_logprobs_have_no_mismatch_at_all() -> None:
    found = metrics([-0.5, -2.0, -1.0], [-0.5, -2.0, -1.0], [0, 0, 1], 2)
    perfect = {"ess_fraction": 1.0, "pearson": 1.0, "tokens": 3.0}
    assert found == pytest.approx({name: perfect.get(name, 0.0) for name in found}, abs=1e-15)
    assert math.copysign(1, found["k1/mean"]) == 1


def test_float32_logprobs_are_compared_in_float64() -> None:
    # In float32 exp(d) - 1 - d of one unit in the last place is 0 or noise; the truth is d^2 / 2.
    behavior = torch.tensor([-1.0])
    trainer = torch.nextafter(behavior, torch.zeros(1))
    d = float(trainer.double() - behavior.double())
    found = mismatch_metrics(trainer, behavior, torch.tensor([0]), 1)["mismatch/k3/mean"]
    assert found == pytest.approx(d * d / 2, rel=1e-6) and found > 0


def test_sequence_statistics_by_hand() -> None:
    # Sums 0.3 (two tokens), -0.1 (one), none, 0.4 (one): mean 0.2.
    found = metrics([0.1, 0.2, -0.1, 0.4], [0.0] * 4, [0, 0, 1, 3], 4)
    assert found["sequence_log_ratio/mean"] == pytest.approx(0.2)
    assert found["sequence_log_ratio/std"] == pytest.approx(math.sqrt((0.01 + 0.09 + 0.04) / 3))
    # Linear between ranks: 1% of the way over two gaps, 0.02 of the first of size 0.4 and 0.98 of the second of 0.1.
    assert found["sequence_log_ratio/p1"] == pytest.approx(-0.1 + 0.02 * 0.4)
    assert found["sequence_log_ratio/p99"] == pytest.approx(0.3 + 0.98 * 0.1)
    weights = [math.exp(x) for x in (0.3, -0.1, 0.4)]
    assert found["ess_fraction"] == pytest.approx(sum(weights) ** 2 / 3 / sum(w * w for w in weights))


def test_ess_of_weights_beyond_float64_is_finite() -> None:
    # One sequence outweighs the other by e^4000: one of two samples counts.
    assert metrics([0.0, -2000.0], [-2000.0, 0.0], [0, 1], 2)["ess_fraction"] == pytest.approx(0.5)


def test_percentiles_are_linear_between_ranks() -> None:
    found = metrics([i / 100 for i in range(101)], [0.0] * 101, [0] * 101, 1)
    assert found["log_ratio/p99_abs"] == pytest.approx(0.99)


def test_slope_recovers_a_line_with_an_intercept() -> None:
    # Sums are 0.5 - 0.001 x length, at lengths 1, 2 and 4: -1 nat per 1000 tokens.
    lengths = (1, 2, 4)
    index = [s for s, length in enumerate(lengths) for _ in range(length)]
    trainer = [(0.5 - 0.001 * lengths[s]) / lengths[s] for s in index]
    assert metrics(trainer, [0.0] * 7, index, 3)["slope_per_1k"] == pytest.approx(-1.0)


@pytest.mark.parametrize("index", [[0, 0, 1, 1], [0, 0, 0, 0]])
def test_slope_of_equal_lengths_goes_through_the_origin(index: list[int]) -> None:
    # -0.002 for each token, whatever the sequences: -2 nats per 1000 tokens.
    assert metrics([-0.002] * 4, [0.0] * 4, index, max(index) + 1)["slope_per_1k"] == pytest.approx(-2.0)


def test_pearson_by_hand_and_of_constants() -> None:
    # Probabilities (0.2, 0.4, 0.9) and (0.1, 0.5, 0.9): both centred on 0.5.
    logs = ([math.log(p) for p in (0.2, 0.4, 0.9)], [math.log(p) for p in (0.1, 0.5, 0.9)])
    expected = (0.3 * 0.4 + 0.1 * 0.0 + 0.4 * 0.4) / math.sqrt((0.09 + 0.01 + 0.16) * (0.16 + 0.0 + 0.16))
    assert metrics(*logs, [0, 0, 0], 1)["pearson"] == pytest.approx(expected)
    assert metrics([-1.0, -1.0], [-1.0, -1.0], [0, 0], 1)["pearson"] == 1.0
    assert metrics([-1.0, -1.0], [-1.0, -2.0], [0, 0], 1)["pearson"] == 0.0


def test_values_that_are_not_finite_are_refused_counted_and_attributed() -> None:
    index, fine = torch.tensor([0, 0, 0]), torch.zeros(3)
    broken = torch.tensor([0.0, math.nan, -math.inf])
    with pytest.raises(EngineNumericsError, match="2 of 3 behavior logprobs are not finite"):
        mismatch_metrics(fine, broken, index, 1)
    with pytest.raises(RunError, match="2 of 3 trainer logprobs are not finite"):
        mismatch_metrics(broken, fine, index, 1)


def test_nothing_to_measure_is_an_error() -> None:
    empty = torch.zeros(0)
    with pytest.raises(ValueError, match="no tokens"):
        mismatch_metrics(empty, empty, torch.zeros(0, dtype=torch.int64), 2)


def test_bins_share_out_the_tokens_and_agree_with_the_whole() -> None:
    draw = torch.Generator().manual_seed(1)
    behavior = -torch.rand(500, generator=draw, dtype=torch.float64) * 3
    trainer = behavior + 1e-2 * torch.randn(500, generator=draw, dtype=torch.float64)
    bins = mismatch_bins(trainer, behavior, behavior.exp(), (0.0, 0.1, 0.5, 1.0))
    inside = (behavior.exp() >= 0.1) & (behavior.exp() < 0.5)
    middle = mismatch_metrics(trainer[inside], behavior[inside], torch.zeros(int(inside.sum()), dtype=torch.int64), 1)
    assert sum(part.tokens for part in bins) == 500
    assert bins[1].tokens == middle["mismatch/tokens"]
    assert bins[1].k3 == pytest.approx(middle["mismatch/k3/mean"])
    assert bins[1].log_ratio_mean == pytest.approx(middle["mismatch/log_ratio/mean"])
    assert bins[1].log_ratio_std == pytest.approx(middle["mismatch/log_ratio/std"])
    assert bins[1].prob_gap_mean_abs == pytest.approx(middle["mismatch/prob_gap/mean_abs"])


def test_the_last_bin_includes_its_upper_edge_and_an_empty_one_is_zero() -> None:
    logprobs = torch.tensor([0.0, math.log(0.5)])
    low, high = mismatch_bins(logprobs, logprobs, torch.tensor([1.0, 0.5]), (0.0, 0.5, 1.0))
    assert (low.tokens, high.tokens) == (0, 2)
    assert (low.k3, low.log_ratio_mean, low.log_ratio_std, low.prob_gap_mean_abs) == (0.0, 0.0, 0.0, 0.0)


def test_positions_start_again_in_every_completion() -> None:
    assert completion_positions(torch.tensor([0, 0, 0, 1, 3, 3])).tolist() == [0, 1, 2, 0, 0, 1]


def test_position_edges_are_powers_of_two_that_hold_the_last_position() -> None:
    assert position_edges(1) == (0, 1)
    assert position_edges(4) == (0, 1, 2, 4)
    assert position_edges(5) == (0, 1, 2, 4, 8)
    assert position_edges(64)[-1] == 64


def test_the_usual_bins_leave_no_token_out() -> None:
    behavior = torch.tensor([-30.0, -5.0, -1.0, -0.05, -1e-4, 0.0], dtype=torch.float64)
    positions = completion_positions(torch.zeros(6, dtype=torch.int64))
    by_probability = mismatch_bins(behavior, behavior, behavior.exp(), PROBABILITY_EDGES)
    by_position = mismatch_bins(behavior, behavior, positions, position_edges(6))
    assert [b.tokens for b in by_probability] == [1, 1, 0, 1, 0, 1, 2]
    assert [b.tokens for b in by_position] == [1, 1, 2, 2]


def test_a_profile_holds_every_token_and_every_completion() -> None:
    behavior = torch.tensor([-5.0, -1.0, -0.05, -1e-4], dtype=torch.float64)
    d = torch.tensor([0.1, -0.2, 0.03, 0.0], dtype=torch.float64)
    found = gap_profile(behavior + d, behavior, torch.tensor([0, 0, 0, 2]), 3, max_length=4)
    assert [b.tokens for b in found.by_probability] == [0, 1, 0, 1, 0, 1, 1]
    assert [b.tokens for b in found.by_position] == [2, 1, 1]
    assert found.by_position[1].log_ratio_mean == pytest.approx(-0.2)
    assert [length for length, _ in found.completions] == [3, 1]
    assert [value for _, value in found.completions] == pytest.approx([-0.07, 0.0])
