"""The gradient of everything at once equals float64 autograd of the plain model.

Episodes of two turns, sampled from a truncated distribution; a clipped surrogate, a KL penalty and an entropy bonus.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.tiny_models import SMALL, loaded_model, tiny_config, tiny_module
from torch import Tensor, nn

from betterhalf.algorithms.advantage import rollout_advantages
from betterhalf.algorithms.presets import resolve_algorithm
from betterhalf.config.schema import RunConfig
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.token_support import decode, joined
from betterhalf.training.pack import pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, GenerateRequest, Observation, Prompt, Rollout, RolloutGroup

TEMPERATURE, BETA, ENTROPY, LIMIT = 0.8, 0.3, 0.05, 7
CONFIG = RunConfig.model_validate(
    {
        "precision": {"preset": "fp32"},
        "sampling": {"max_tokens": LIMIT, "temperature": TEMPERATURE, "top_p": 0.9, "top_k": 12},
        "training": {"tokens_per_micro_batch": 25, "optimizer_steps": 1},
        "algorithm": {"kl": {"coefficient": BETA}, "entropy_coefficient": ENTROPY},
    }
)
PROMPTS = [(3, 17, 5), (9, 4)]
OBSERVATION = (21, 8)


def plain_model() -> nn.Module:
    return tiny_module(tiny_config("qwen2", SMALL), seed=4, biases=0.3, norms=0.3)


def moved(trainer: PolicyTrainer, seed: int) -> dict[str, Tensor]:
    """Add noise to the weights, and return a float64 copy of them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, master in trainer.weights.trainable():
            master += 0.03 * torch.randn(master.shape, generator=generator)
    trainer.weights.publish()
    return {name: value.double().clone() for name, value in trainer.weights.state().items()}


def episodes(trainer: PolicyTrainer) -> list[RolloutGroup]:
    """Sample two turns of three siblings with an observation between them, from the trainer's weights."""
    model = loaded_model(plain_model(), stop_token_ids=(1,))
    engine = build_engine(CONFIG, model.hf_config, model.stop_token_ids, trainer.precision)
    engine.load_weights(trainer.weight_stream(), policy_version=0)
    groups = []
    for number, ids in enumerate(PROMPTS):
        first = GenerateRequest(token_ids=ids, group_size=3, key=(0, 1, number), with_support=True, max_tokens=3)
        rollouts = []
        for sibling, turn in enumerate(engine.generate([first], CONFIG.sampling)[0]):
            so_far = (*ids, *turn.token_ids, *OBSERVATION)
            done = len(turn.token_ids)
            after = replace(
                first,
                token_ids=so_far,
                group_size=1,
                first_sibling=sibling,
                first_position=done,
                max_tokens=LIMIT - done,
            )
            ((second,),) = engine.generate([after], CONFIG.sampling)
            rollouts.append(episode(ids, turn, second, reward=float(sibling == number)))
        groups.append(RolloutGroup(prompt=rollouts[0].prompt, rollouts=tuple(rollouts)))
    engine.close()
    return groups


def episode(ids: tuple[int, ...], first: Completion, second: Completion, reward: float) -> Rollout:
    assert first.support is not None and second.support is not None
    completion = replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        behavior_logprobs=first.behavior_logprobs + second.behavior_logprobs,
        support=joined([first.support, second.support]),
        observations=(Observation(before=len(first.token_ids), token_ids=OBSERVATION),),
    )
    prompt = Prompt(prompt_id="", text="", token_ids=ids, answer="")
    return Rollout(prompt=prompt, completion=completion, text="", reward=reward)


def scores(model: nn.Module, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Return logprobs and entropies of the sampled tokens, by one pass over the whole sequence."""
    completion, start = rollout.completion, len(rollout.prompt.token_ids)
    (observation,) = completion.observations
    assert completion.support is not None
    ids = [*rollout.prompt.token_ids, *completion.token_ids]
    ids[start + observation.before : start + observation.before] = observation.token_ids
    late = len(observation.token_ids)
    rows = [start + k - 1 + (late if k >= observation.before else 0) for k in range(len(completion.token_ids))]
    logits = model(torch.tensor([ids])).logits[0, rows] / TEMPERATURE
    kept = torch.zeros(logits.shape, dtype=torch.bool)
    for row, token_ids in enumerate(decode(completion.support)):
        kept[row, list(token_ids)] = True
    every = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    entropies = -(every.exp() * every.masked_fill(~kept, 0.0)).sum(-1)
    return every.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1), entropies


def plain_loss(groups: list[RolloutGroup], reference: nn.Module, proximal: nn.Module, current: nn.Module) -> Tensor:
    """Return the loss of docs/algorithms.md for `grpo` with both terms, one sequence at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        mean = sum(group.rewards) / len(group.rewards)
        for rollout in group.rollouts:
            with torch.no_grad():
                before, _ = scores(proximal, rollout)
                anchor, _ = scores(reference, rollout)
            now, entropies = scores(current, rollout)
            ratio, advantage, gap = torch.exp(now - before), rollout.reward - mean, anchor - now
            surrogate = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
            total = total + (surrogate + BETA * (torch.exp(gap) - 1 - gap) - ENTROPY * entropies).sum()
    return total / (sum(len(group.rollouts) for group in groups) * LIMIT)


def in_float64(weights: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(plain_model()).double()
    model.load_state_dict(weights, strict=False)
    return model


def test_the_gradient_of_everything_at_once_is_that_of_float64_autograd() -> None:
    model = loaded_model(plain_model(), stop_token_ids=(1,))
    roles = build_precision(CONFIG.precision, torch.device("cpu"))
    trainer = PolicyTrainer(model, config=CONFIG, precision=roles, keep_reference=True)
    algorithm = resolve_algorithm(CONFIG.algorithm)
    reference = {name: value.double().clone() for name, value in trainer.weights.state().items()}
    proximal = moved(trainer, seed=1)
    groups = episodes(trainer)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    advantages = rollout_advantages(groups, algorithm, LIMIT)
    batch = pack_step(rollouts, advantages, CONFIG, 1, train_all=True)
    packs = [
        replace(pack, proximal_logprobs_C=own.logprobs_C, reference_logprobs_C=other.logprobs_C)
        for pack, own, other in zip(
            batch.packs, trainer.measure(batch.packs), trainer.measure_reference(batch.packs), strict=True
        )
    ]
    current = moved(trainer, seed=2)
    (train_batch,) = batch.train_batches
    stats = trainer.forward_backward(packs, algorithm, train_batch.denominators)

    assert len(packs) > 1 and any(pack.num_sequences > 1 for pack in packs)
    assert stats.clipped > 0 and stats.bounded == 0
    plain = in_float64(current)
    loss = plain_loss(groups, in_float64(reference), in_float64(proximal), plain)
    loss.backward()
    assert float(stats.loss) == pytest.approx(loss.item(), rel=1e-4)
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, gradient in trainer.weights.gradients():
        assert expected[name] is not None
        largest = float(expected[name].abs().max())
        assert largest > 0 and float((gradient - expected[name]).abs().max()) < 2e-5 * largest, name
