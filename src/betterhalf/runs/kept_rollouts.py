"""Rollouts kept for reading: the rows of `rollouts.jsonl`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from betterhalf.batches import StepBatch
from betterhalf.config.schema import RunConfig
from betterhalf.runs.measure import Measured
from betterhalf.training.pack import by_rollout
from betterhalf.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRollout:
    """A rollout with its per-token columns."""

    rollout: Rollout
    advantage: float
    trainer_logprobs: list[float] | None
    """log pi of each token at the weights that sampled it; None when the rollout was not measured."""


def keep_rollouts(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    batch: StepBatch,
    measured: Measured,
    config: RunConfig,
    step: int,
) -> tuple[KeptRollout, ...]:
    """Choose `logging.rollouts_per_step` rollouts of a step, by a seeded draw.

    Args:
        rollouts: rollouts of the step's own groups, in the order of the packs' `rollout_index_S`.
        advantages: one for each rollout.
        batch: their packs.
        measured: scores of the packs, from the sample of the mismatch.
        config: number of rollouts, and seed.
        step: seeds the draw.
    """
    count = min(config.logging.rollouts_per_step, len(rollouts))
    chosen = sorted(random.Random(f"keep-{config.seed}-{step}").sample(range(len(rollouts)), count))
    logprobs: dict[int, list[float]] = {}
    for index in measured.sample:
        pack = batch.packs[index]
        if set(pack.rollout_index_S) & set(chosen):
            logprobs.update(by_rollout(pack, measured.scores[index].logprobs_C))
    return tuple(
        KeptRollout(rollout=rollouts[i], advantage=advantages[i], trainer_logprobs=logprobs.get(i)) for i in chosen
    )


def rollout_row(step: int, kept: KeptRollout, tokenizer: Any) -> dict[str, Any]:
    """Return one row of `rollouts.jsonl`."""
    rollout = kept.rollout
    row = {
        "step": step,
        "prompt_id": rollout.prompt.prompt_id,
        "prompt": rollout.prompt.text,
        "completion": rollout.text,
        "answer": rollout.prompt.answer,
        "reward": rollout.reward,
        "advantage": kept.advantage,
        "finish_reason": rollout.completion.finish_reason,
        "policy_version": rollout.completion.policy_version,
        "token_ids": list(rollout.completion.token_ids),
        "tokens": [tokenizer.decode([token_id]) for token_id in rollout.completion.token_ids],
        "behavior_logprobs": list(rollout.completion.behavior_logprobs),
        "trainer_logprobs": kept.trainer_logprobs,
        "support_sizes": None if (support := rollout.completion.support) is None else list(support.counts),
    }
    return row if rollout.episode_end is None else row | _episode(rollout, tokenizer)


def _episode(rollout: Rollout, tokenizer: Any) -> dict[str, Any]:
    """Return the columns of an episode: `before` is the index in `tokens` of the token that follows an observation."""
    observations = [
        {"before": each.before, "text": tokenizer.decode(list(each.token_ids)), "token_ids": list(each.token_ids)}
        for each in rollout.completion.observations
    ]
    return {"episode_end": rollout.episode_end, "observations": observations}
