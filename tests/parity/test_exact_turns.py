"""`engine.rounding=exact` with observations: a turn continues as if it had not been cut, and the mismatch stays 0."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.tiny_models import SMALL, loaded_model, tiny_config, tiny_module

from betterhalf.config.schema import RunConfig
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.training.pack import by_rollout, pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, GenerateRequest, Observation, Prompt, Rollout

PROMPTS = [tuple((7 * k + 3 * i) % 55 + 2 for i in range(length)) for k, length in enumerate((1, 3, 8, 21))]


def config_of(precision: str, max_tokens: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "precision": {"preset": precision},
            "engine": {"rounding": "exact"},
            "sampling": {"max_tokens": max_tokens, "temperature": 0.8},
            "training": {"tokens_per_micro_batch": 300, "optimizer_steps": 1},
        }
    )


def sides(config: RunConfig) -> tuple[PolicyTrainer, RolloutEngine]:
    model = loaded_model(tiny_module(tiny_config("qwen2", SMALL), seed=4, biases=0.3, norms=0.3), stop_token_ids=(1,))
    roles = build_precision(config.precision, torch.device("cpu"), exact=config.exact)
    engine = build_engine(config, model.hf_config, model.stop_token_ids, roles)
    trainer = PolicyTrainer(model, config=config, precision=roles)
    engine.load_weights(trainer.weight_stream(), policy_version=0)
    return trainer, engine


def first_turns(engine: RolloutEngine, config: RunConfig) -> list[tuple[GenerateRequest, Completion]]:
    requests = [GenerateRequest(token_ids=ids, group_size=3, key=(0, 1, k)) for k, ids in enumerate(PROMPTS)]
    found = zip(requests, engine.generate(requests, config.sampling), strict=True)
    return [(request, completion) for request, group in found for completion in group]


def test_a_continued_completion_is_the_uninterrupted_one() -> None:
    whole, cut = config_of("fp16", 20), config_of("fp16", 7)
    _, engine = sides(whole)
    expected = [completion for _, completion in first_turns(engine, whole)]
    parts = first_turns(engine, cut)
    going = [(k, request, part) for k, (request, part) in enumerate(parts) if part.finish_reason == "length"]
    requests = [
        replace(
            request,
            token_ids=(*request.token_ids, *part.token_ids),
            group_size=1,
            first_sibling=k % 3,
            first_position=7,
            max_tokens=13,
        )
        for k, request, part in going
    ]
    rest = engine.generate(requests, whole.sampling)
    assert len(going) > 6
    for (k, _, part), (more,) in zip(going, rest, strict=True):
        assert (*part.token_ids, *more.token_ids) == expected[k].token_ids
        assert (*part.behavior_logprobs, *more.behavior_logprobs) == expected[k].behavior_logprobs


def test_a_request_samples_at_most_its_own_limit() -> None:
    config = config_of("fp32", 20)
    _, engine = sides(config)
    requests = [GenerateRequest(token_ids=PROMPTS[1], group_size=2, key=(0, 1, 0), max_tokens=n) for n in (1, 3, 50)]
    groups = engine.generate(requests, config.sampling)
    lengths = [[len(completion.token_ids) for completion in group] for group in groups]
    assert lengths[0] == [1, 1]
    assert max(lengths[1]) == 3
    assert max(lengths[2]) <= 20


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_two_turns_around_an_observation_have_no_mismatch(precision: str) -> None:
    config = config_of(precision, 9)
    trainer, engine = sides(config)
    firsts = first_turns(engine, config)
    observations = [tuple((5 * k + i) % 50 + 3 for i in range(1 + k % 4)) for k in range(len(firsts))]
    requests = [
        replace(
            request,
            token_ids=(*request.token_ids, *first.token_ids, *observation),
            group_size=1,
            first_sibling=k % 3,
            first_position=len(first.token_ids),
        )
        for k, ((request, first), observation) in enumerate(zip(firsts, observations, strict=True))
    ]
    seconds = engine.generate(requests, config.sampling)
    rollouts = [
        joined(request, first, observation, second)
        for (request, first), observation, (second,) in zip(firsts, observations, seconds, strict=True)
    ]
    packs = pack_step(rollouts, [1.0] * len(rollouts), config, step=1).packs
    found: dict[int, list[float]] = {}
    for pack, scores in zip(packs, trainer.measure(packs), strict=True):
        found |= by_rollout(pack, scores.logprobs_C)
    assert any(part.prefix is not None for pack in packs for part in pack.segments)
    assert found == {k: list(each.completion.behavior_logprobs) for k, each in enumerate(rollouts)}
    # The observation is read: without it, the second turn would have other logprobs.
    bare = [replace(each, completion=replace(each.completion, observations=())) for each in rollouts]
    (pack,) = pack_step(bare[:1], [1.0], config, step=1).packs
    assert trainer.measure([pack])[0].logprobs_C.tolist() != list(rollouts[0].completion.behavior_logprobs)


def joined(request: GenerateRequest, first: Completion, observation: tuple[int, ...], second: Completion) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id="", text="", token_ids=request.token_ids, answer=""),
        completion=replace(
            second,
            token_ids=first.token_ids + second.token_ids,
            behavior_logprobs=first.behavior_logprobs + second.behavior_logprobs,
            observations=(Observation(before=len(first.token_ids), token_ids=observation),),
        ),
        text="",
        reward=0.0,
    )
