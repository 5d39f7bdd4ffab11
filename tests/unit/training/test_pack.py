"""Packs hold every rollout once, whole, aligned with its own logprobs."""

from __future__ import annotations

import torch

from betterhalf.config.schema import RunConfig
from betterhalf.training.pack import by_rollout, pack_step
from betterhalf.types import Completion, MicroBatch, Prompt, Rollout

CPU = torch.device("cpu")


def rollout(prompt: list[int], completion: list[int]) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id="p", text="", token_ids=tuple(prompt), answer=""),
        completion=Completion(
            token_ids=tuple(completion),
            behavior_logprobs=tuple(-float(token) for token in completion),
            finish_reason="stop",
            policy_version=0,
        ),
        text="",
        reward=1.0,
    )


def config(*, budget: int = 100, optimizer_steps: int = 1) -> RunConfig:
    return RunConfig.model_validate(
        {
            "training": {"tokens_per_micro_batch": budget, "optimizer_steps": optimizer_steps},
            "sampling": {"max_tokens": 9},
        }
    )


def test_one_pack_written_out_by_hand() -> None:
    rollouts = [rollout([7, 8, 9], [1, 2]), rollout([5], [3])]
    batch = pack_step(rollouts, [0.5, -1.0], config(), step=1, device=CPU)
    (pack,) = batch.packs
    # sorted by length: the second rollout (2 tokens) comes first
    assert pack.rollout_index_S == (1, 0)
    assert pack.token_ids_T.tolist() == [5, 3, 7, 8, 9, 1, 2]
    assert pack.position_ids_T.tolist() == [0, 1, 0, 1, 2, 3, 4]
    assert pack.sequence_lengths == (2, 5)
    assert pack.loss_rows_C.tolist() == [0, 4, 5]
    assert pack.target_ids_C.tolist() == [3, 1, 2]
    assert pack.sequence_index_C.tolist() == [0, 1, 1]
    assert pack.behavior_logprobs_C.tolist() == [-3.0, -1.0, -2.0]
    assert pack.advantages_S.tolist() == [-1.0, 0.5]


def test_every_loss_row_predicts_its_target() -> None:
    rollouts = [rollout([11] * (1 + k % 3), [20 + k] * (1 + k % 4)) for k in range(17)]
    batch = pack_step(rollouts, [1.0] * 17, config(budget=12, optimizer_steps=3), step=2, device=CPU)
    for pack in batch.packs:
        assert torch.equal(pack.token_ids_T[pack.loss_rows_C + 1], pack.target_ids_C)


def test_every_rollout_is_packed_once_and_zero_advantages_are_only_measured() -> None:
    advantages = [0.0 if k % 4 == 0 else 1.0 for k in range(20)]
    batch = pack_step([rollout([1], [2, 3])] * 20, advantages, config(optimizer_steps=4), step=1, device=CPU)
    trained = [i for b in batch.train_batches for pack in b.micro_batches for i in pack.rollout_index_S]
    measured = [i for b in batch.train_batches for pack in b.measure_only for i in pack.rollout_index_S]
    assert sorted(trained) == [i for i in range(20) if i % 4]
    assert sorted(measured) == [0, 4, 8, 12, 16]


def test_denominators_count_rollouts_without_advantage_too() -> None:
    batch = pack_step([rollout([1], [2, 3, 4])] * 8, [0.0] * 8, config(optimizer_steps=2), step=1, device=CPU)
    for train_batch in batch.train_batches:
        assert train_batch.micro_batches == ()
        assert train_batch.denominators.sequences == 4
        assert train_batch.denominators.tokens == 12
        assert train_batch.denominators.max_tokens == 9


def test_no_pack_exceeds_the_budget_unless_a_single_sequence_does() -> None:
    rollouts = [rollout([1] * length, [2]) for length in (3, 30, 5, 9, 2, 4)]
    for pack in pack_step(rollouts, [1.0] * 6, config(budget=10), step=1, device=CPU).packs:
        assert pack.num_tokens <= 10 or pack.num_sequences == 1


def test_the_shuffle_depends_on_step_and_seed_alone() -> None:
    rollouts = [rollout([k], [k]) for k in range(1, 33)]

    def order(step: int) -> list[tuple[int, ...]]:
        batch = pack_step(rollouts, [1.0] * 32, config(optimizer_steps=4), step=step, device=CPU)
        return [tuple(sorted(i for pack in b.packs for i in pack.rollout_index_S)) for b in batch.train_batches]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_values_come_back_by_rollout_in_token_order() -> None:
    rollouts = [rollout([1, 1], [4, 5, 6]), rollout([1], [7])]
    (pack,) = pack_step(rollouts, [1.0, 1.0], config(), step=1, device=CPU).packs
    assert isinstance(pack, MicroBatch)
    assert by_rollout(pack, pack.target_ids_C.float()) == {0: [4.0, 5.0, 6.0], 1: [7.0]}
