"""`rollout/*`: what the engine sampled in a step, and what of it the step trains on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from betterhalf.algorithms.advantage import zero_advantage_groups
from betterhalf.runs.collect import Collected
from betterhalf.types import Rollout


def rollout_metrics(collected: Collected, advantages: Sequence[float]) -> dict[str, float]:
    """Describe the rollouts of one step; rewards are those before any overlong penalty.

    Args:
        collected: the step's groups, and those that dynamic sampling left out.
        advantages: one for each rollout of the step's own groups.
    """
    zero = zero_advantage_groups(torch.tensor(advantages).view(len(collected.groups), -1))
    kept, sampled = float(zero.double().sum()), len(collected.sampled)
    return {
        **_described("rollout", [rollout for group in collected.sampled for rollout in group.rollouts]),
        "rollout/zero_advantage_fraction": (kept + collected.dropped) / sampled,
        "rollout/reward_timeouts": float(collected.timeouts),
        "rollout/unparsed_answers": float(collected.unparsed_answers),
        "rollout/groups_dropped": float(collected.dropped),
        "rollout/groups_surplus": float(collected.surplus),
        "rollout/engine_restarts": float(collected.restarts),
        **_described("rollout/kept", collected.rollouts),
        "rollout/kept/zero_advantage_fraction": kept / len(collected.groups),
    }


def _described(area: str, rollouts: Sequence[Rollout]) -> dict[str, float]:
    rewards = [rollout.reward for rollout in rollouts]
    lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
    return {
        f"{area}/reward/mean": statistics.fmean(rewards),
        f"{area}/reward/std": statistics.pstdev(rewards),
        f"{area}/length/mean": statistics.fmean(lengths),
        f"{area}/length/max": float(max(lengths)),
        f"{area}/truncated_fraction": statistics.fmean(r.completion.finish_reason == "length" for r in rollouts),
    }
