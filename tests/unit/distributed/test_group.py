"""Ranks in processes of their own reduce and gather in rank order, and a missing rank is an error in time."""

from __future__ import annotations

import pytest
import torch
from tests.ranks import run_ranks

from betterhalf.distributed.group import GroupCollective, Membership, free_address, join
from betterhalf.errors import TrainerDiedError

CPU = torch.device("cpu")


def _reduced(ranks: GroupCollective) -> list[list[float]]:
    mine = ranks.membership.rank
    summed = torch.tensor([1.0 + mine, 1e16 if mine == 0 else 1.0], dtype=torch.float64)
    ranks.sum_(summed)
    largest = torch.tensor([float(mine), -float(mine)], dtype=torch.float64)
    ranks.max_(largest)
    parts = ranks.gather(torch.arange(2 * mine, dtype=torch.uint8))
    nothing = ranks.gather(torch.zeros(0))
    assert [part.numel() for part in nothing] == [0, 0, 0]
    return [summed.tolist(), largest.tolist(), *(part.tolist() for part in parts)]


def test_three_ranks_sum_in_rank_order_and_gather_other_lengths() -> None:
    for found in run_ranks(_reduced, 3):
        # (1e16 + 1) + 1 stays 1e16 in float64; 1 + 1 first would give 1e16 + 2
        assert found == [[6.0, 1e16], [2.0, 0.0], [], [0, 1], [0, 1, 2, 3]]


def _after_the_other_left(ranks: GroupCollective) -> str:
    if ranks.membership.rank == 0:
        ranks.leave()
        return "left"
    try:
        ranks.sum_(torch.zeros(1, dtype=torch.float64))
    except RuntimeError:
        ranks.leave()
        ranks.leave()
        return "failed"
    return "hung"


def test_a_rank_that_left_fails_the_collective_of_the_others_and_they_can_leave() -> None:
    assert run_ranks(_after_the_other_left, 2) == ["left", "failed"]


def test_a_rank_that_never_joins_is_named_in_time() -> None:
    host, port = free_address()
    alone = Membership(rank=1, world_size=2, host=host, port=port, seconds=0.3)
    with pytest.raises(TrainerDiedError, match=f"rank 1 of 2 could not join the others through {host}:{port} within"):
        join(alone, CPU)


def test_every_port_is_free_and_the_address_is_numeric() -> None:
    host, port = free_address()
    assert host.count(".") == 3 and 1024 <= port < 65536
