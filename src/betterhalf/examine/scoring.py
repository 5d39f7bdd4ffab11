"""Trainer logprobs of completions that are already there: the packs and the forward pass of training, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from betterhalf.config.schema import RunConfig
from betterhalf.training.pack import by_rollout, pack_measured
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, Prompt, Rollout

Item = tuple[Sequence[int], Completion]
"""The prompt's token ids, and what was sampled after them."""


def score_completions(
    trainer: PolicyTrainer, items: Sequence[Item], config: RunConfig, *, temperature: float | None = None
) -> list[list[float]]:
    """Score each token of each completion by log pi, at the trainer's weights and temperature.

    Args:
        trainer: computes pi.
        items: prompts of at least one token, completions of at least one.
        config: `training.tokens_per_micro_batch` bounds a forward pass.
        temperature: replaces the trainer's.

    Returns:
        For each item, in order, one FP32 logprob for each token; not finite where the forward pass was not.
    """
    rollouts = [_as_rollout(token_ids, completion) for token_ids, completion in items]
    scores: dict[int, list[float]] = {}
    for pack in pack_measured(rollouts, config):
        (found,) = trainer.measure([pack], temperature)
        scores |= by_rollout(pack, found.logprobs_C)
    return [scores[index] for index in range(len(items))]


def _as_rollout(token_ids: Sequence[int], completion: Completion) -> Rollout:
    prompt = Prompt(prompt_id="", text="", token_ids=tuple(token_ids), answer="")
    return Rollout(prompt=prompt, completion=completion, text="", reward=0.0)
