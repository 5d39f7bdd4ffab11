"""Every number of a record is reduced over the ranks as its field declares."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import pytest
import torch
from torch import Tensor

from betterhalf.algorithms.loss_stats import LossStats
from betterhalf.distributed.world import ONE_RANK, reduce_over_ranks
from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.reduction import MAX, MEAN, REDUCTIONS, SUM, declared_reductions


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Record whose field names do not suggest a reduction."""

    tokens_max: float = field(metadata=SUM)
    loss_sum: float = field(metadata=MEAN)
    mean: float = field(metadata=MAX)
    name: str = "own"


class WithTwins:
    """A rank of three; the other two hold the same values plus 1 and plus 2."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def gather(self, values: Tensor) -> tuple[Tensor, ...]:
        # The number of ranks is the last of the sums, and is 1 on each rank.
        return (values, values + 1, values + 2)

    def sum_(self, values: Tensor) -> None:
        self.calls.append("sum")
        count = values[-1].clone()
        values.copy_(sum(self.gather(values.clone())))
        values[-1] = 3 * count

    def max_(self, values: Tensor) -> None:
        self.calls.append("max")
        values.copy_(torch.stack(self.gather(values.clone())).amax(0))


def test_sum_mean_and_max_over_three_ranks_by_hand() -> None:
    ranks = WithTwins()
    found = reduce_over_ranks(Record(tokens_max=10.0, loss_sum=4.0, mean=7.0), ranks)
    assert found == Record(tokens_max=33.0, loss_sum=5.0, mean=9.0, name="own")
    assert ranks.calls == ["sum", "max"]


def test_one_rank_changes_nothing_not_even_large_counts() -> None:
    record = Record(tokens_max=2.0**53, loss_sum=0.1, mean=-3.0)
    assert reduce_over_ranks(record, ONE_RANK) == record


def test_what_is_not_declared_stays_this_ranks_own() -> None:
    assert declared_reductions(Record) == {"tokens_max": "sum", "loss_sum": "mean", "mean": "max"}


def test_every_count_of_the_loss_declares_its_reduction() -> None:
    counts = [one.name for one in fields(LossStats) if one.name != "own"]  # sums already, whatever their names
    assert list(declared_reductions(LossStats)) == counts
    assert [name for name, kind in declared_reductions(LossStats).items() if kind != "sum"] == [
        "ratio_max",
        "ratio_max_negative",
        "gradient_squared_max",
    ]
    one, two = ({name: torch.tensor(value) for name in counts} for value in (2.0, 5.0))
    total = LossStats(**one) + LossStats(**two)
    assert total.loss == total.tokens == 7.0 and total.ratio_max == 5.0


@pytest.mark.parametrize(("kind", "expected"), [("sum", 9.0), ("mean", 3.0), ("max", 5.0), ("last", 1.0)])
def test_each_reduction_by_hand(kind: str, expected: float) -> None:
    assert REDUCTIONS[kind]([3.0, 5.0, 1.0]) == expected  # type: ignore[index]


def test_metrics_of_optimizer_steps_are_reduced_as_the_catalogue_declares() -> None:
    declared = {name: metric.reduction for name, metric in CATALOGUE.items() if metric.reduction != "mean"}
    assert declared == {
        "optim/loss_scale": "last",
        "optim/skipped": "sum",
        "optim/updates_applied": "sum",
        "optim/learning_rate": "last",
        "optim/overflow_fraction": "max",
        "optim/token_share/max": "max",
        "policy/version": "last",
        "policy/ratio/max": "max",
        "policy/ratio/max_negative": "max",
        "policy/reference_kl/max": "max",
    }
