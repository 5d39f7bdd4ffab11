"""Observations in packs: context at the right places, and never a target."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests import tiny_models

from betterhalf.algorithms.presets import PRESETS
from betterhalf.config.schema import RunConfig
from betterhalf.precision.roles import build_precision
from betterhalf.training.pack import by_rollout, pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, Observation, Prompt, Rollout

ALGORITHM = PRESETS["pg_seq_is"]


def rollout(prompt: list[int], *turns: list[int], observations: tuple[list[int], ...] = ()) -> Rollout:
    """Build a rollout of some turns, with an observation between each two."""
    starts = list(itertools.accumulate(len(turn) for turn in turns))
    tokens = tuple(token for turn in turns for token in turn)
    between = zip(starts[:-1], observations, strict=True)
    return Rollout(
        prompt=Prompt(prompt_id="p", text="", token_ids=tuple(prompt), answer=""),
        completion=Completion(
            token_ids=tokens,
            behavior_logprobs=tuple(-float(token) for token in tokens),
            finish_reason="stop",
            policy_version=0,
            observations=tuple(Observation(before=at, token_ids=tuple(ids)) for at, ids in between),
        ),
        text="",
        reward=1.0,
    )


def config(**training: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "precision": {"preset": "fp32"},
            "training": {"tokens_per_micro_batch": 100, "optimizer_steps": 1} | training,
            "sampling": {"max_tokens": 9},
        }
    )


def test_observations_are_inserted_where_they_were_made() -> None:
    found = rollout([9], [1, 2], [3], [4, 5], observations=([21, 22], [23])).completion
    assert found.with_observations() == (1, 2, 21, 22, 3, 23, 4, 5)
    assert rollout([9], [1, 2]).completion.with_observations() == (1, 2)


def test_a_lone_rollout_of_two_turns_written_out_by_hand() -> None:
    (pack,) = pack_step([rollout([7, 8], [1, 2], [3, 4], observations=([21, 22],))], [0.5], config(), step=1).packs
    assert pack.token_ids_T.tolist() == [7, 8, 1, 2, 21, 22, 3]
    assert pack.position_ids_T.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert [(part.length, part.prefix) for part in pack.segments] == [(7, None)]
    # 1 after the prompt, 2 after 1, 3 after the observation's last token, 4 after 3
    assert pack.loss_rows_C.tolist() == [1, 2, 5, 6]
    assert pack.target_ids_C.tolist() == [1, 2, 3, 4]
    assert pack.behavior_logprobs_C.tolist() == [-1.0, -2.0, -3.0, -4.0]


def test_siblings_of_one_and_two_turns_share_their_prompt() -> None:
    rollouts = [rollout([7, 8], [1], [2, 3], observations=([21],)), rollout([7, 8], [4, 5])]
    (pack,) = pack_step(rollouts, [1.0, 2.0], config(), step=1).packs
    assert pack.rollout_index_S == (1, 0)
    assert pack.token_ids_T.tolist() == [7, 8, 4, 1, 21, 2]
    assert pack.position_ids_T.tolist() == [0, 1, 2, 2, 3, 4]
    assert [(part.length, part.prefix) for part in pack.segments] == [(2, None), (1, 0), (3, 0)]
    assert by_rollout(pack, pack.loss_rows_C) == {1: [1, 2], 0: [1, 4, 5]}
    assert by_rollout(pack, pack.target_ids_C) == {1: [4, 5], 0: [1, 2, 3]}


def test_observations_count_in_the_budget_and_not_in_the_denominators() -> None:
    rollouts = [rollout([7], [1], [2], observations=([21] * 6,)) for _ in range(4)]
    batch = pack_step(rollouts, [1.0] * 4, config(tokens_per_micro_batch=16), step=1)
    # prompt 1, inputs 7: two siblings fill 15 of 16 tokens
    assert [pack.num_sequences for pack in batch.packs] == [2, 2]
    assert batch.train_batches[0].denominators.tokens == 8


def sequences() -> list[Rollout]:
    """Rollouts over a vocabulary of 32: sampled tokens below 20, observations from 20 on."""
    return [
        rollout([3, 4, 5], [6, 7], [8, 9, 10], [11], observations=([20, 21, 22], [23])),
        rollout([3, 4, 5], [12], [13, 14], observations=([24, 25],)),
        rollout([3, 4, 5], [15, 16, 17]),
        rollout([1, 2], [18, 19], [6], observations=([26, 27, 28, 29],)),
    ]


ADVANTAGES = [1.0, -0.5, 0.25, -1.5]


def test_no_target_is_an_observation_and_every_sampled_token_is_one() -> None:
    packs = pack_step(sequences(), ADVANTAGES, config(tokens_per_micro_batch=12), step=3).packs
    targets = {index: ids for pack in packs for index, ids in by_rollout(pack, pack.target_ids_C).items()}
    assert targets == {index: list(each.completion.token_ids) for index, each in enumerate(sequences())}
    assert max(max(ids) for ids in targets.values()) < 20
    assert max(int(pack.token_ids_T.max()) for pack in packs) >= 20


@pytest.mark.parametrize("budget", [12, 100])
def test_logprobs_and_gradients_are_those_of_each_sequence_alone_in_float64(budget: int) -> None:
    """A reference in float64 masks the loss of observation tokens: sum of ratio x advantage / (S x max_tokens)."""
    settings = config(tokens_per_micro_batch=budget)
    trainer = PolicyTrainer(
        tiny_models.tiny_model("llama", seed=0, tie_word_embeddings=True),
        config=settings,
        precision=build_precision(settings.precision, torch.device("cpu")),
    )
    module = tiny_models.tiny_model("llama", seed=0, tie_word_embeddings=True, attn_implementation="eager").module
    module.double()
    batch = pack_step(sequences(), ADVANTAGES, settings, step=1)
    scored: dict[int, list[float]] = {}
    for pack, scores in zip(batch.packs, trainer.measure(batch.packs), strict=True):
        scored |= by_rollout(pack, scores.logprobs_C)
    loss = torch.zeros((), dtype=torch.float64)
    for index, (each, advantage) in enumerate(zip(sequences(), ADVANTAGES, strict=True)):
        logprobs = reference(module, each)
        found = torch.tensor(scored[index], dtype=torch.float64)
        torch.testing.assert_close(found, logprobs.detach(), rtol=0, atol=1e-5)
        behavior = torch.tensor(each.completion.behavior_logprobs, dtype=torch.float64)
        weight = (logprobs.detach() - behavior).sum().clamp(-20, 20).exp()
        loss = loss - weight * advantage * logprobs.sum() / (4 * 9)
    loss.backward()
    trainer.forward_backward(batch.packs, ALGORITHM, batch.train_batches[0].denominators)
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    for name, gradient in trainer.weights.gradients():
        wanted = expected[name]
        assert wanted is not None
        assert float((gradient.double() / trainer.scaler.scale - wanted).norm() / wanted.norm()) < 1e-4


def reference(module: Any, each: Rollout) -> torch.Tensor:
    """Return the float64 logprobs of the sampled tokens; a mask over the whole sequence removes the observations."""
    prompt, completion = each.prompt.token_ids, each.completion.with_observations()
    logits = module(torch.tensor([(*prompt, *completion)])).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.double().log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)
    return logprobs[torch.tensor([token < 20 for token in completion])]
