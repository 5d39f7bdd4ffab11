"""Packs go to the rank with the fewest tokens, longest first, and every rank makes the same number of passes."""

from __future__ import annotations

from dataclasses import replace

import torch

from betterhalf.batches import MicroBatch, PackedSegment
from betterhalf.training.split import empty_pack, split_packs


def pack(tokens: int) -> MicroBatch:
    ids = torch.zeros(tokens, dtype=torch.int64)
    return replace(empty_pack(), token_ids_T=ids, position_ids_T=ids, segments=(PackedSegment(length=tokens),))


def test_split_of_five_packs_over_two_ranks_by_hand() -> None:
    split = split_packs([pack(n) for n in (3, 9, 4, 4, 2)], 2)
    # 9 to rank 0; 4, 4 to rank 1; 3 to rank 1, which has 8; 2 to rank 0, which has 9
    assert split.ranks == ((1, 4), (2, 3, 0))
    assert split.tokens == (11, 11) and split.passes == 3 and split.balance == 1.0


def test_a_rank_without_packs_makes_the_passes_of_the_others() -> None:
    split = split_packs([pack(5), pack(6)], 3)
    assert split.ranks == ((1,), (0,), ()) and split.passes == 1
    assert split.tokens == (6, 5, 0) and split.balance == 11 / 18


def test_one_rank_keeps_the_order_of_the_packs() -> None:
    assert split_packs([pack(1), pack(3), pack(2)], 1).ranks == ((0, 1, 2),)


def test_no_packs_make_no_passes() -> None:
    split = split_packs([], 2)
    assert split.ranks == ((), ()) and split.passes == 0 and split.balance == 0.0


def test_an_empty_pack_has_one_token_and_no_loss() -> None:
    empty = empty_pack()
    assert empty.num_tokens == 1 and empty.num_sequences == 0
    assert empty.target_ids_C.shape == empty.loss_rows_C.shape == empty.behavior_logprobs_C.shape == (0,)
