"""The state of several ranks as one, and the rows that each rank takes from it."""

from __future__ import annotations

import torch

from betterhalf.cluster.whole_state import RankState, rows_of, whole_state
from betterhalf.distributed.shard_range import ShardRange
from betterhalf.training.trainer import TrainerState


def whole() -> TrainerState:
    """A state of two parameters, one of them with fewer rows than ranks, after a refreshed reference."""
    draws = torch.Generator().manual_seed(0)
    model = {"wide": torch.randn(5, 3, generator=draws), "short": torch.randn(2, generator=draws)}
    moments = {f"exp_avg/{name}": torch.randn_like(value) for name, value in model.items()}
    steps = {f"step/{name}": torch.tensor(7.0) for name in model}
    reference = {name: value.bfloat16() for name, value in model.items()}
    return TrainerState(
        model=model,
        optimizer={**moments, **steps},
        loss_scaler={"scale": 4.0},
        policy_version=3,
        reference=reference,
        reference_digest="r",
    )


RANGES = [
    {
        "wide": ShardRange(first=2 * rank, count=count, shape=(5, 3)),
        "short": ShardRange(first=rank, count=n, shape=(2,)),
    }
    for rank, (count, n) in enumerate([(2, 1), (2, 1), (1, 0)])
]
"""Rows of three ranks."""


def test_each_rank_takes_its_rows_and_the_whole_is_made_of_them() -> None:
    state = whole()
    ranks = [RankState(state=rows_of(state, ranges), ranges=ranges) for ranges in RANGES]
    torch.testing.assert_close(ranks[1].state.model["wide"], state.model["wide"][2:4], rtol=0, atol=0)
    assert ranks[2].state.optimizer["exp_avg/short"].shape == (0,)
    assert all(rank.state.optimizer["step/wide"] == 7 for rank in ranks)
    found = whole_state(ranks)
    assert (found.loss_scaler, found.policy_version, found.reference_digest) == ({"scale": 4.0}, 3, "r")
    for name in ("model", "optimizer", "reference"):
        expected, got = getattr(state, name), getattr(found, name)
        assert list(got) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=0, atol=0)


def test_a_single_rank_holds_the_whole_state() -> None:
    state = whole()
    assert whole_state([RankState(state=state, ranges={})]) is state
    assert rows_of(state, {}) == state
