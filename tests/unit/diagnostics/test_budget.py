"""The budget against hand-made cases, synthetic lognormal data and Monte Carlo."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from betterhalf.diagnostics.budget import (
    CORRELATION_FLOOR,
    Budget,
    budget_metrics,
    fit_budget,
    predict_ess,
)
from betterhalf.run_dir import plain_json


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fit(d_ST: Tensor, **options: float) -> Budget:
    sequences, length = d_ST.shape
    return fit_budget(d_ST.flatten(), torch.arange(sequences).repeat_interleave(length), sequences, **options)


def test_a_small_case_by_hand() -> None:
    # Sequences [0.1, 0.3] and [-0.1]: mean 0.1, squares around it 0, 0.04, 0.04; sums around L mean: 0.2 and -0.2.
    budget = fit_budget(torch.tensor([0.1, 0.3, -0.1], dtype=torch.float64), torch.tensor([0, 0, 2]), 3)
    sigma2, tau = 0.08 / 3, 0.08 / (0.08 / 3 * (3 - 5 / 3))
    assert budget.sigma2 == pytest.approx(sigma2)
    assert budget.correlation == pytest.approx(tau) == pytest.approx(2.25)
    rate = sigma2 * tau
    assert budget.predicted_ess == pytest.approx(2 / (math.exp(2 * rate) + math.exp(rate)))
    weights = [math.exp(0.4), math.exp(-0.1)]
    assert budget.observed_ess == pytest.approx(sum(weights) ** 2 / 2 / sum(w * w for w in weights))
    assert budget.max_length == pytest.approx(math.log(2) / rate)


def test_independent_tokens_have_correlation_one() -> None:
    budget = fit(0.05 * normal(4000, 50, seed=1) - 0.05**2 / 2)
    assert budget.sigma2 == pytest.approx(0.05**2, rel=0.01)
    assert budget.correlation == pytest.approx(1, abs=0.08)


def test_few_sequences_do_not_bias_the_correlation() -> None:
    # Four sequences each: without the correction for the fitted mean, the average would be 0.75.
    found = [fit(normal(4, 20, seed=seed)).correlation for seed in range(600)]
    assert sum(found) / len(found) == pytest.approx(1, abs=0.08)


def test_an_autoregressive_log_ratio_gives_its_known_correlation() -> None:
    # AR(1) with coefficient r: Var(sum) / (L sigma2) = (1 + r) / (1 - r) - 2 r (1 - r^L) / (L (1 - r)^2).
    r, length, sigma = 0.6, 100, 0.03
    noise = normal(4000, length, seed=2)
    d = torch.empty_like(noise)
    d[:, 0] = sigma * noise[:, 0]
    for t in range(1, length):
        d[:, t] = r * d[:, t - 1] + sigma * math.sqrt(1 - r * r) * noise[:, t]
    budget = fit(d)
    tau = (1 + r) / (1 - r) - 2 * r * (1 - r**length) / (length * (1 - r) ** 2)
    assert budget.sigma2 == pytest.approx(sigma**2, rel=0.02)
    assert budget.correlation == pytest.approx(tau, rel=0.08)


def test_an_offset_shared_by_a_sequence_gives_its_known_correlation() -> None:
    # d = offset + noise: the sum has variance L^2 a^2 + L b^2.
    a, b, length = 0.01, 0.05, 60
    d = a * normal(4000, 1, seed=3) + b * normal(4000, length, seed=4)
    budget = fit(d)
    assert budget.sigma2 == pytest.approx(a * a + b * b, rel=0.02)
    assert budget.correlation == pytest.approx((length * a * a + b * b) / (a * a + b * b), rel=0.08)


@pytest.mark.parametrize(("sigma2", "length"), [(8.4e-5, 8192), (2e-3, 256), (2e-3, 50)])
def test_the_prediction_holds_for_lognormal_weights(sigma2: float, length: int) -> None:
    sums = math.sqrt(length * sigma2) * normal(400_000, seed=5) - length * sigma2 / 2
    weights = sums.exp()
    ess = float(weights.sum() ** 2 / (len(weights) * weights.square().sum()))
    budget = Budget(sigma2=sigma2, correlation=1.0, predicted_ess=0.0, observed_ess=0.0, max_length=0.0)
    assert predict_ess(budget, length) == pytest.approx(ess, rel=0.02)


def test_predicted_and_observed_agree_on_correlated_lognormal_data_of_two_lengths() -> None:
    sigma, lengths = 0.04, (40, 160)
    d = torch.cat([sigma * normal(4000 * length, seed=length) - sigma**2 / 2 for length in lengths])
    index = torch.cat(
        [torch.arange(4000).repeat_interleave(lengths[0]), torch.arange(4000, 8000).repeat_interleave(160)]
    )
    budget = fit_budget(d, index, 8000)
    assert budget.predicted_ess == pytest.approx(2 / sum(math.exp(n * sigma**2) for n in lengths), rel=0.02)
    assert budget.observed_ess == pytest.approx(budget.predicted_ess, rel=0.02)


def test_the_prediction_falls_to_the_floor_at_the_longest_length() -> None:
    budget = fit(normal(10, 30, seed=6), floor=0.3)
    assert predict_ess(budget, budget.max_length) == pytest.approx(0.3)
    assert predict_ess(budget, 0) == 1.0


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_without_spread_every_length_is_safe(value: float) -> None:
    budget = fit(torch.full((3, 7), value, dtype=torch.float64))
    assert (budget.sigma2, budget.correlation, budget.predicted_ess, budget.max_length) == (0, 1, 1, math.inf)
    assert budget.observed_ess == pytest.approx(1)
    assert json.dumps(plain_json(budget_metrics(budget)["budget/max_length"])) == "null"


def test_one_token_determines_nothing() -> None:
    assert fit(torch.tensor([[0.7]])) == Budget(
        sigma2=0.0, correlation=1.0, predicted_ess=1.0, observed_ess=1.0, max_length=math.inf
    )


def test_one_sequence_counts_as_independent_tokens() -> None:
    budget = fit(torch.tensor([[0.1, -0.1]], dtype=torch.float64))
    assert (budget.sigma2, budget.correlation) == (pytest.approx(0.01), 1.0)
    assert budget.predicted_ess == pytest.approx(math.exp(-0.02))
    assert budget.observed_ess == 1.0


def test_sums_that_cancel_meet_the_floor_of_the_correlation() -> None:
    assert fit(torch.tensor([[0.1, -0.1]] * 5)).correlation == CORRELATION_FLOOR


def test_a_hopeless_mismatch_predicts_zero_and_overflows_nowhere() -> None:
    budget = fit(30 * normal(8, 4000, seed=7))
    assert budget.predicted_ess == 0.0
    assert 1 / 8 <= budget.observed_ess <= 1
    assert 0 < budget.max_length < 1


def test_single_precision_input_is_fitted_in_double() -> None:
    d = 1 + 1e-5 * normal(50, 20, seed=8)
    assert fit(d.float()).sigma2 == pytest.approx(fit(d.float().double()).sigma2, rel=1e-12)


def test_nothing_to_fit_and_an_impossible_floor_are_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        fit(torch.zeros(1, 0))
    for floor in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="floor"):
            fit(torch.zeros(1, 2), floor=floor)


def test_metric_names_are_those_of_the_fields() -> None:
    names = ("sigma2", "correlation", "predicted_ess", "observed_ess", "max_length")
    assert tuple(budget_metrics(fit(torch.zeros(1, 2)))) == tuple(f"budget/{name}" for name in names)
