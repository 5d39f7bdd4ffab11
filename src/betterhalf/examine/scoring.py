"""Score given completions, and pack them into one train batch, as training does."""

from __future__ import annotations

from collections.abc import Sequence

from betterhalf.config.schema import RunConfig
from betterhalf.training.pack import by_rollout, pack_measured
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, Prompt, Rollout

Item = tuple[Sequence[int], Completion]
"""(token ids of the prompt, completion)."""


def score_completions(
    trainer: PolicyTrainer, items: Sequence[Item], config: RunConfig, *, temperature: float | None = None
) -> list[list[float]]:
    """Return log pi of each token of each completion, at the trainer's weights and temperature.

    Args:
        trainer: trainer that computes pi.
        items: prompts and completions of at least one token each.
        config: settings; `training.tokens_per_micro_batch` limits the size of a forward pass.
        temperature: temperature to use instead of the trainer's.

    Returns:
        For each item, in order, one FP32 logprob for each token; not finite if the forward pass was not.
    """
    rollouts = [_as_rollout(token_ids, completion) for token_ids, completion in items]
    scores: dict[int, list[float]] = {}
    for pack in pack_measured(rollouts, config):
        (found,) = trainer.measure([pack], temperature)
        scores |= by_rollout(pack, found.logprobs_C)
    return [scores[index] for index in range(len(items))]


def in_one_batch(config: RunConfig) -> RunConfig:
    """Return settings with which `pack_step` puts all given completions into one train batch, truncated ones too."""
    training = config.training.model_copy(update={"optimizer_steps": 1})
    algorithm = config.algorithm.model_copy(update={"mask_truncated": False})
    return config.model_copy(update={"training": training, "algorithm": algorithm})


def _as_rollout(token_ids: Sequence[int], completion: Completion) -> Rollout:
    prompt = Prompt(prompt_id="", text="", token_ids=tuple(token_ids), answer="")
    return Rollout(prompt=prompt, completion=completion, text="", reward=0.0)
