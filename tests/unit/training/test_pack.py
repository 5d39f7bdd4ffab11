"""Packs hold every rollout exactly once, complete, and aligned with its logprobs."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import torch

from betterhalf.batches import MicroBatch, PackedSegment
from betterhalf.config.schema import ClusterConfig, RunConfig
from betterhalf.token_support import encode
from betterhalf.training.on_device import on_device
from betterhalf.training.pack import by_rollout, pack_step, with_advantages
from betterhalf.types import Completion, FinishReason, Prompt, Rollout

CPU = torch.device("cpu")


def rollout(prompt: list[int], completion: list[int], reason: FinishReason = "stop") -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id="p", text="", token_ids=tuple(prompt), answer=""),
        completion=Completion(
            token_ids=tuple(completion),
            behavior_logprobs=tuple(-float(token) for token in completion),
            finish_reason=reason,
            policy_version=0,
        ),
        text="",
        reward=1.0,
    )


def config(*, budget: int = 100, optimizer_steps: int = 1, **algorithm: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "training": {"tokens_per_micro_batch": budget, "optimizer_steps": optimizer_steps},
            "sampling": {"max_tokens": 9},
            "algorithm": algorithm,
        }
    )


def test_one_pack_written_out_by_hand() -> None:
    rollouts = [rollout([7, 8, 9], [1, 2]), rollout([5], [3])]
    batch = pack_step(rollouts, [0.5, -1.0], config(), step=1)
    (pack,) = batch.packs
    # sorted by length: the second rollout (2 tokens) comes first; last tokens are left out
    assert pack.rollout_index_S == (1, 0)
    assert pack.token_ids_T.tolist() == [5, 7, 8, 9, 1]
    assert pack.position_ids_T.tolist() == [0, 0, 1, 2, 3]
    assert pack.segments == (PackedSegment(length=1), PackedSegment(length=4))
    assert pack.loss_rows_C.tolist() == [0, 3, 4]
    assert pack.target_ids_C.tolist() == [3, 1, 2]
    assert pack.sequence_index_C.tolist() == [0, 1, 1]
    assert pack.behavior_logprobs_C.tolist() == [-3.0, -1.0, -2.0]
    assert pack.advantages_S.tolist() == [-1.0, 0.5]


def test_siblings_share_their_prompt_written_out_by_hand() -> None:
    rollouts = [rollout([7, 8], [1, 2, 3]), rollout([5, 6, 9], [4]), rollout([7, 8], [10]), rollout([7, 8], [11, 12])]
    (pack,) = pack_step(rollouts, [1.0, 2.0, 3.0, 4.0], config(), step=1).packs
    # sequences are in order of length (3, 4, 4, 5; shuffled among equal ones), segments are heads, then completions
    assert pack.rollout_index_S in {(2, 1, 3, 0), (2, 3, 1, 0)}
    assert pack.token_ids_T.tolist() == [7, 8, 5, 6, 9, 11, 1, 2]
    assert pack.position_ids_T.tolist() == [0, 1, 0, 1, 2, 2, 2, 3]
    assert [(part.length, part.prefix) for part in pack.segments] == [(2, None), (3, None), (1, 0), (2, 0)]
    assert by_rollout(pack, pack.loss_rows_C) == {2: [1], 3: [1, 5], 0: [1, 6, 7], 1: [4]}
    assert by_rollout(pack, pack.target_ids_C) == {2: [10], 3: [11, 12], 0: [1, 2, 3], 1: [4]}
    assert pack.advantages_S.tolist() == [float(index + 1) for index in pack.rollout_index_S]


def shared_and_lone() -> list[Rollout]:
    """Groups of up to four siblings, completions of one to five tokens."""
    return [rollout([40 + k // 4] * (1 + k % 16 // 4), [20 + k + i for i in range(1 + k % 5)]) for k in range(23)]


def test_every_loss_row_stands_before_its_target() -> None:
    rollouts = shared_and_lone()
    batch = pack_step(rollouts, [1.0] * 23, config(budget=25, optimizer_steps=3), step=2)
    assert any(part.prefix is not None for pack in batch.packs for part in pack.segments)
    for pack in batch.packs:
        tokens, positions = by_rollout(pack, pack.token_ids_T[pack.loss_rows_C]), pack.position_ids_T[pack.loss_rows_C]
        for index, before in tokens.items():
            prompt, completion = rollouts[index].prompt.token_ids, rollouts[index].completion.token_ids
            assert before == [prompt[-1], *completion[:-1]]
            first = len(prompt) - 1
            assert by_rollout(pack, positions)[index] == list(range(first, first + len(completion)))


def test_what_is_left_out_of_a_step_is_packed_apart_and_moves_nothing() -> None:
    rollouts, settings = shared_and_lone(), config(budget=25, optimizer_steps=3)
    alone = pack_step(rollouts[:15], [1.0] * 15, settings, step=2)
    batch = pack_step(rollouts[:15], [1.0] * 15, settings, step=2, left_out=rollouts[15:])
    assert repr(batch.train_batches) == repr(alone.train_batches)
    assert repr(batch.packs[: len(alone.packs)]) == repr(alone.packs)
    apart = batch.chosen(batch.left_out)
    assert tuple(range(len(alone.packs), len(batch.packs))) == batch.left_out
    found = {index: tokens for pack in apart for index, tokens in by_rollout(pack, pack.target_ids_C).items()}
    assert found == {index: list(rollouts[index].completion.token_ids) for index in range(15, 23)}
    assert not any(pack.advantages_S.any() for pack in apart)
    assert alone.left_out == ()


def test_a_completion_s_prefix_is_its_own_prompt() -> None:
    rollouts = shared_and_lone()
    (pack,) = pack_step(rollouts, [1.0] * 23, config(budget=1000), step=2).packs
    parts = torch.split(pack.token_ids_T, [part.length for part in pack.segments])
    found = {
        (*parts[part.prefix].tolist(), *ids.tolist())
        for part, ids in zip(pack.segments, parts, strict=True)
        if part.prefix is not None
    }
    expected = {
        (*r.prompt.token_ids, *r.completion.token_ids[:-1]) for r in rollouts if len(r.completion.token_ids) > 1
    }
    assert found == expected


def test_a_shared_prompt_counts_once_in_the_budget() -> None:
    rollouts = [rollout([k % 2] * 50, [1] * 11) for k in range(8)]
    first, second = pack_step(rollouts, [1.0] * 8, config(budget=90), step=1).packs
    # 50 + 4 x 10 tokens: the siblings of a prompt fill a pack
    assert first.num_tokens == second.num_tokens == 90
    assert {index % 2 for index in first.rollout_index_S} != {index % 2 for index in second.rollout_index_S}


def test_a_sibling_that_no_longer_fits_brings_its_prompt_along() -> None:
    packs = pack_step([rollout([3, 4], [1, 2, 5])] * 5, [1.0] * 5, config(budget=6), step=1).packs
    assert [pack.num_sequences for pack in packs] == [2, 2, 1]
    assert [pack.token_ids_T.tolist() for pack in packs] == [[3, 4, 1, 2, 1, 2]] * 2 + [[3, 4, 1, 2]]


def test_every_rollout_is_packed_once_and_zero_advantages_are_only_measured() -> None:
    advantages = [0.0 if k % 4 == 0 else 1.0 for k in range(20)]
    batch = pack_step([rollout([1], [2, 3])] * 20, advantages, config(optimizer_steps=4), step=1)
    trained = [i for b in batch.train_batches for pack in batch.chosen(b.micro_batches) for i in pack.rollout_index_S]
    measured = [i for b in batch.train_batches for pack in batch.chosen(b.measure_only) for i in pack.rollout_index_S]
    assert sorted(trained) == [i for i in range(20) if i % 4]
    assert sorted(measured) == [0, 4, 8, 12, 16]


def test_denominators_count_rollouts_without_advantage_too() -> None:
    batch = pack_step([rollout([1], [2, 3, 4])] * 8, [0.0] * 8, config(optimizer_steps=2), step=1)
    for train_batch in batch.train_batches:
        assert train_batch.micro_batches == ()
        assert train_batch.denominators.sequences == 4
        assert train_batch.denominators.tokens == 12
        assert train_batch.denominators.max_tokens == 9


def test_no_pack_exceeds_the_budget_unless_a_single_sequence_does() -> None:
    rollouts = [rollout([1] * length, [2]) for length in (3, 30, 5, 9, 2, 4)]
    for pack in pack_step(rollouts, [1.0] * 6, config(budget=10), step=1).packs:
        assert pack.num_tokens <= 10 or pack.num_sequences == 1


def test_the_shuffle_depends_on_step_and_seed_alone() -> None:
    rollouts = [rollout([k], [k]) for k in range(1, 33)]

    def order(step: int) -> list[tuple[int, ...]]:
        batch = pack_step(rollouts, [1.0] * 32, config(optimizer_steps=4), step=step)
        return [
            tuple(sorted(i for pack in batch.chosen(b.packs) for i in pack.rollout_index_S))
            for b in batch.train_batches
        ]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_values_come_back_by_rollout_in_token_order() -> None:
    rollouts = [rollout([1, 1], [4, 5, 6]), rollout([1], [7])]
    (pack,) = pack_step(rollouts, [1.0, 1.0], config(), step=1).packs
    assert isinstance(pack, MicroBatch)
    assert by_rollout(pack, pack.target_ids_C.float()) == {0: [4.0, 5.0, 6.0], 1: [7.0]}


def test_masked_completions_are_packed_apart_and_only_measured() -> None:
    rollouts = [rollout([1, k], [5, 6, 7], "length" if k % 3 == 0 else "stop") for k in range(9)]
    advantages = [float(k % 2) for k in range(9)]
    plain = pack_step(rollouts, advantages, config(optimizer_steps=2), step=1)
    assert plain.masked_sequences == 0 and not any(one.masked for one in plain.train_batches)
    batch = pack_step(rollouts, advantages, config(optimizer_steps=2, mask_truncated=True), step=1)
    found = {
        kind: sorted(
            index
            for one in batch.train_batches
            for pack in batch.chosen(getattr(one, kind))
            for index in pack.rollout_index_S
        )
        for kind in ("micro_batches", "measure_only", "masked", "packs")
    }
    assert found == {
        "micro_batches": [1, 5, 7],
        "measure_only": [2, 4, 8],
        "masked": [0, 3, 6],
        "packs": list(range(9)),
    }
    assert batch.masked_sequences == 3
    # The denominators of `all` count them.
    assert [one.denominators for one in batch.train_batches] == [one.denominators for one in plain.train_batches]
    assert sum(one.denominators.sequences for one in batch.train_batches) == 9


def test_each_epoch_has_its_own_order_of_the_same_rollouts() -> None:
    rollouts, settings = shared_and_lone(), config(budget=25, optimizer_steps=3)
    orders = []
    for epoch in range(3):
        batch = pack_step(rollouts, [1.0] * 23, settings, step=2, epoch=epoch)
        again = pack_step(rollouts, [1.0] * 23, settings, step=2, epoch=epoch)
        assert repr(batch) == repr(again)
        orders.append([index for pack in batch.packs for index in pack.rollout_index_S])
    assert repr(pack_step(rollouts, [1.0] * 23, settings, step=2).packs) != repr(batch.packs)
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_rollouts_without_advantage_can_be_trained_on_and_get_their_advantages_later() -> None:
    rollouts = [rollout([k % 3], [2, 3, k]) for k in range(10)]
    settings = config(budget=20, optimizer_steps=2)
    batch = pack_step(rollouts[:8], [0.0] * 8, settings, step=1, left_out=rollouts[8:], train_all=True)
    assert all(not train_batch.measure_only for train_batch in batch.train_batches)
    advantages = [0.5 * k for k in range(8)]
    later = with_advantages(batch, advantages)
    for index, (pack, before) in enumerate(zip(later.packs, batch.packs, strict=True)):
        left_out = index in later.left_out
        expected = [0.0 if left_out else advantages[i] for i in pack.rollout_index_S]
        assert pack.advantages_S.tolist() == expected
        assert torch.equal(pack.token_ids_T, before.token_ids_T)
    assert later.train_batches == batch.train_batches


def test_supports_are_packed_in_the_order_of_the_completion_tokens() -> None:
    sets = {1: [1], 2: [2, 0], 3: range(40), 4: [4, 5, 6], 5: [5]}
    rollouts = [rollout([7, 8], [1, 2, 3]), rollout([5, 6, 9], [4]), rollout([7, 8], [5])]
    truncated = [
        replace(r, completion=replace(r.completion, support=encode([sets[t] for t in ids], [1.0] * len(ids), 40)))
        for r in rollouts
        if (ids := r.completion.token_ids)
    ]
    (pack,) = pack_step(truncated, [1.0, 2.0, 3.0], config(), step=1).packs
    assert pack.support is not None and pack.support.vocabulary == 40
    expected = [sorted(sets[token]) for token in pack.target_ids_C.tolist()]
    assert pack.support.counts_C.tolist() == [len(token_ids) for token_ids in expected]
    words = struct.unpack(f"={len(pack.support.words_K)}i", pack.support.words_K.numpy().tobytes())
    bitmap = 1 << 4 | 1 << 5 | 1 << 6
    by_token = {1: [1], 2: [0, 2], 3: [], 4: [bitmap, 0], 5: [5]}  # two words hold the bits of 40 tokens
    assert list(words) == [word for token in pack.target_ids_C.tolist() for word in by_token[token]]
    moved = on_device(pack, torch.device("meta"))
    assert moved.support is not None and moved.support.words_K.device.type == moved.target_ids_C.device.type == "meta"
    assert pack_step(rollouts, [1.0] * 3, config(), step=1).packs[0].support is None


def test_supports_of_whole_vocabularies_take_no_words() -> None:
    one = rollout([7], [3])
    one = replace(one, completion=replace(one.completion, support=encode([range(40)], [1.0], 40)))
    (pack,) = pack_step([one], [1.0], config(), step=1).packs
    assert pack.support is not None and pack.support.words_K.shape == (0,)


def _ranks(trainers: int, **changes: Any) -> RunConfig:
    return config(**changes).model_copy(
        update={"cluster": ClusterConfig(backend="ray", trainers=trainers)},
    )


def test_a_train_batch_has_a_pack_of_similar_length_for_every_rank() -> None:
    rollouts = [rollout([k], [1] * (2 + k % 3)) for k in range(12)]
    advantages = [1.0] * 12
    (whole,) = pack_step(rollouts, advantages, config(), step=1).packs
    for trainers in (2, 3, 4):
        packs = pack_step(rollouts, advantages, _ranks(trainers), step=1).packs
        assert len(packs) == trainers
        assert max(pack.num_tokens for pack in packs) <= 1.5 * whole.num_tokens / trainers + 4
        assert sorted(i for pack in packs for i in pack.rollout_index_S) == list(range(12))


def test_siblings_are_spread_over_ranks_down_to_one_for_each() -> None:
    rollouts = [rollout([7, 8], [1]) for _ in range(3)]
    assert len(pack_step(rollouts, [1.0] * 3, config(), step=1).packs) == 1
    assert len(pack_step(rollouts, [1.0] * 3, _ranks(3), step=1).packs) == 3
    # more ranks than sequences: the others run empty passes
    assert len(pack_step(rollouts, [1.0] * 3, _ranks(5), step=1).packs) == 3


def test_enough_packs_are_left_as_they_are() -> None:
    rollouts = [rollout([k], [1, 2, 3]) for k in range(9)]
    cut = [
        pack_step(rollouts, [1.0] * 9, make(budget=7), step=1).packs for make in (config, lambda **k: _ranks(2, **k))
    ]
    assert [pack.rollout_index_S for pack in cut[0]] == [pack.rollout_index_S for pack in cut[1]] and len(cut[0]) == 5


def test_rollouts_that_are_only_measured_need_no_pack_for_every_rank() -> None:
    rollouts = [rollout([k], [1]) for k in range(6)]
    (train,) = pack_step(rollouts, [1.0] * 4 + [0.0] * 2, _ranks(2), step=1).train_batches
    assert len(train.micro_batches) == 2 and len(train.measure_only) == 1
