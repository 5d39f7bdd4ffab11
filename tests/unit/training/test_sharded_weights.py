"""Rows of each rank, and worlds that are too large for a model; `tests/integration/test_sharded.py` runs ranks."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import skeleton_model, tiny_model

from betterhalf.distributed.group import GroupCollective, Membership
from betterhalf.errors import InputError
from betterhalf.precision.islands import NO_ISLANDS
from betterhalf.training.weights.rows import rows_of
from betterhalf.training.weights.sharded import sharded_over


@pytest.mark.parametrize(
    ("rows", "world_size", "expected"),
    [
        (7, 2, [(0, 4), (4, 3)]),
        (4, 3, [(0, 2), (2, 2), (4, 0)]),
        (2, 4, [(0, 1), (1, 1), (2, 0), (2, 0)]),
        (9, 1, [(0, 9)]),
    ],
)
def test_rows_are_cut_as_fsdp2_cuts_them(rows: int, world_size: int, expected: list[tuple[int, int]]) -> None:
    found = [rows_of((rows, 3), rank, world_size) for rank in range(world_size)]
    assert [(part.first, part.count) for part in found] == expected
    assert all(part.shape == (rows, 3) for part in found)
    chunks = torch.arange(rows).chunk(world_size)
    assert [part.count for part in found if part.count] == [len(chunk) for chunk in chunks]


def test_more_ranks_than_rows_are_refused_before_anything_is_sharded() -> None:
    # 48 rows of the MLP are the most
    place = Membership(rank=0, world_size=49, host="127.0.0.1", port=1, seconds=1.0)
    ranks = GroupCollective(place, torch.device("cpu"))
    model = skeleton_model(tiny_model(seed=0))
    with pytest.raises(InputError, match=r"cluster\.trainers=49 exceeds the 48 rows.*Set cluster\.trainers=48 or less"):
        sharded_over(ranks, model.weights)(model.module, "fp16", NO_ISLANDS)
