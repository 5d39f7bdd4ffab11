"""Staleness by hand, and its relation to the mismatch."""

from __future__ import annotations

import math

import pytest
import torch

from betterhalf.diagnostics.logprob_gap import mismatch_metrics
from betterhalf.diagnostics.staleness import staleness_metrics
from betterhalf.errors import NumericsError
from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.metrics.names import check_known

SAMPLED = torch.tensor([-1.0, -2.0, -0.5])
NEWEST = torch.tensor([-0.75, -2.5, -0.5])
"""Log-ratios 0.25, -0.5 and 0, of which the first two are one completion."""
INDEX = torch.tensor([0, 0, 2])


def test_every_metric_by_hand() -> None:
    found = staleness_metrics(NEWEST, SAMPLED, INDEX, 3, versions=4)

    d, k3 = (0.25, -0.5, 0.0), [math.exp(x) - 1 - x for x in (0.25, -0.5, 0.0)]
    weights = [math.exp(0.25 - 0.5), 1.0]
    mean = sum(d) / 3
    assert found == pytest.approx(
        {
            "staleness/versions": 4.0,
            "staleness/k1/mean": 0.25 / 3,
            "staleness/k3/mean": sum(k3) / 3,
            "staleness/log_ratio/mean": -0.25 / 3,
            "staleness/log_ratio/std": math.sqrt(sum((x - mean) ** 2 for x in d) / 3),
            "staleness/log_ratio/max_abs": 0.5,
            "staleness/sequence_log_ratio/std": 0.125,
            "staleness/ess_fraction": sum(weights) ** 2 / (2 * sum(w * w for w in weights)),
        },
        rel=1e-12,
    )


def test_the_catalogue_describes_exactly_what_is_measured() -> None:
    found = staleness_metrics(NEWEST, SAMPLED, INDEX, 3, versions=1)
    check_known(found)
    assert set(found) == {name for name in CATALOGUE if name.startswith("staleness/")}


def test_without_updates_staleness_is_exactly_zero() -> None:
    logprobs = torch.randn(50, generator=torch.Generator().manual_seed(1)) - 3
    found = staleness_metrics(logprobs, logprobs.clone(), torch.arange(50) // 5, 10, versions=0)
    assert found.pop("staleness/ess_fraction") == pytest.approx(1.0, abs=1e-12)
    assert set(found.values()) == {0.0}


def test_mismatch_and_staleness_add_up_to_the_whole_log_ratio() -> None:
    behavior = torch.tensor([-1.01, -1.98, -0.5003])
    total = mismatch_metrics(NEWEST, behavior, INDEX, 3)["mismatch/log_ratio/mean"]
    mismatch = mismatch_metrics(SAMPLED, behavior, INDEX, 3)["mismatch/log_ratio/mean"]
    staleness = staleness_metrics(NEWEST, SAMPLED, INDEX, 3, versions=1)["staleness/log_ratio/mean"]
    assert mismatch + staleness == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(("which", "message"), [(0, "1 of 3 .* newest weights"), (1, "1 of 3 .* sampling weights")])
def test_logprobs_that_are_not_finite_name_their_weights(which: int, message: str) -> None:
    sides = [NEWEST.clone(), SAMPLED.clone()]
    sides[which][1] = math.nan
    with pytest.raises(NumericsError, match=message):
        staleness_metrics(sides[0], sides[1], INDEX, 3, versions=1)


def test_no_tokens_is_an_error_of_the_caller() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        staleness_metrics(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.int64), 0, versions=0)
