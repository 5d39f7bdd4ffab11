"""One pair of `probe.json`, by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from betterhalf.diagnostics.logprob_gap import mismatch_metrics
from betterhalf.diagnostics.pair_report import MAX_POINTS, PairReport, failed_pair, pair_report, temperature_fit
from betterhalf.errors import EngineError, NumericsError

BEHAVIOR = [-0.5, -2.0, -1.0, -0.25, -3.0]
RATIO = [0.01, -0.02, 0.0, 0.03, -0.3]
INDEX = [0, 0, 1, 1, 1]


def report(behavior: list[float] = BEHAVIOR, ratio: list[float] = RATIO, index: list[int] = INDEX) -> PairReport:
    mu = torch.tensor(behavior, dtype=torch.float64)
    pi = mu + torch.tensor(ratio, dtype=torch.float64)
    return pair_report(
        "fp16",
        "bf16",
        pi,
        mu,
        torch.tensor(index),
        max(index) + 1,
        seconds=1.5,
        bootstrap=50,
        confidence=0.95,
        seed=0,
    )


def exact_k3(d: float) -> float:
    return math.exp(d) - 1 - d


def test_the_numbers_are_those_of_the_definitions() -> None:
    found = report()
    gaps = [math.exp(b + d) - math.exp(b) for b, d in zip(BEHAVIOR, RATIO, strict=True)]
    assert found.k3 == pytest.approx(sum(map(exact_k3, RATIO)) / 5, rel=1e-10)
    assert found.sequence_kl == pytest.approx(sum(map(exact_k3, RATIO)) / 2, rel=1e-10)
    assert found.mean_abs == pytest.approx(sum(map(abs, gaps)) / 5, rel=1e-12)
    assert found.max_abs == pytest.approx(max(map(abs, gaps)), rel=1e-12)
    # Sums -0.01 over 2 tokens, -0.27 over 3: the line falls by 0.26 a token.
    assert found.slope_per_1k == pytest.approx(-260)
    assert [length for length, _ in found.completions] == [2, 3]
    assert [d for _, d in found.completions] == pytest.approx([-0.01, -0.27])
    assert found.tokens == 5


def test_every_metric_has_the_value_of_mismatch_metrics_and_an_interval_or_a_reason() -> None:
    found = report()
    mu = torch.tensor(BEHAVIOR, dtype=torch.float64)
    expected = mismatch_metrics(mu + torch.tensor(RATIO, dtype=torch.float64), mu, torch.tensor(INDEX), 2)
    assert {f"mismatch/{name}": metric.value for name, metric in found.metrics.items()} == expected
    assert all((metric.low <= metric.high) is (metric.reason is None) for metric in found.metrics.values())
    assert found.metrics["prob_gap/max"].reason and not found.metrics["log_ratio/mean"].reason
    assert found.k3_ci == (found.metrics["k3/mean"].low, found.metrics["k3/mean"].high)


def test_bins_hold_every_token_once() -> None:
    found = report()
    assert [(b.lower, b.upper, b.tokens) for b in found.by_position] == [(0, 1, 2), (1, 2, 2), (2, 4, 1)]
    # mu: 0.61, 0.14, 0.37, 0.78, 0.05
    assert [b.tokens for b in found.by_probability] == [0, 0, 1, 2, 2, 0, 0]


def test_points_are_thinned_evenly_over_all_tokens() -> None:
    behavior = [-1.0 - i / 5000 for i in range(5000)]
    found = report(behavior, [0.0] * 5000, [0] * 5000)
    assert len(found.points) == MAX_POINTS
    assert found.points[0][0] == pytest.approx(math.exp(-1.0), rel=1e-8)
    assert found.points[-1][0] == pytest.approx(math.exp(behavior[-1]), rel=1e-8)
    steps = [math.log(a[0] / b[0]) * 5000 for a, b in zip(found.points, found.points[1:], strict=False)]
    assert min(steps) > 3.5 and max(steps) < 6.5
    assert all(mu == pi for mu, pi in found.points)


def test_json_has_the_documented_keys_and_no_error() -> None:
    data = json.loads(json.dumps(report().to_json()))
    assert list(data) == [
        *("train", "rollout", "seconds", "k3", "k3_ci", "mean_abs", "max_abs", "sequence_kl", "slope_per_1k", "tokens"),
        *("metrics", "budget", "points", "completions", "by_position", "by_probability", "temperature"),
    ]
    assert data["metrics"]["k3/mean"].keys() == {"value", "low", "high", "reason"}
    assert data["budget"].keys() == {"sigma2", "correlation", "predicted_ess", "observed_ess", "max_length"}
    assert data["by_position"][0]["tokens"] == 2


def test_logprobs_are_raw_where_temperature_1_fits_ten_times_better() -> None:
    mu = torch.tensor(BEHAVIOR, dtype=torch.float64)
    gap = torch.tensor(RATIO, dtype=torch.float64)

    def raw(stated: float, at_1: float) -> bool:
        return temperature_fit(0.7, mu, mu + stated * gap, mu + at_1 * gap).raw

    # k3 grows as the square of the log-ratio.
    assert raw(1.0, 0.0) and raw(1.0, 0.3)
    assert not raw(1.0, 0.4) and not raw(0.3, 1.0)
    assert not raw(1e-4, 0.0), "rounding decides nothing"
    fit = temperature_fit(0.7, mu, mu + gap, mu)
    assert (fit.k3_at_1, fit.tokens, fit.stated) == (0.0, 5, 0.7)
    assert fit.k3_at_stated == pytest.approx(sum(map(exact_k3, RATIO)) / 5)


def test_a_failed_pair_says_why_and_nothing_else() -> None:
    failed = failed_pair("fp16", "fp32", "overflow", seconds=2.0)
    assert failed.to_json() == {"train": "fp16", "rollout": "fp32", "seconds": 2.0, "error": "overflow"}
    assert math.isnan(failed.k3)


def test_logprobs_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(NumericsError, match="1 of 5 trainer logprobs"):
        report(ratio=[0.0, math.nan, 0.0, 0.0, 0.0])
    with pytest.raises(EngineError, match="1 of 5 behavior logprobs"):
        report(behavior=[-math.inf, -1.0, -1.0, -1.0, -1.0])
