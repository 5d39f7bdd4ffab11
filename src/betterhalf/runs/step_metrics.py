"""Metrics of one step: `rollout/*`, `task/*`, `optim/*`, `policy/*`, `loss/*` and `system/*`.

`mismatch/*`, `budget/*`, `experts/*`, `staleness/*` and the entropy come from `runs.measure`, `policy/reference_kl/*`
from `runs.reference`, `time/*` from the stopwatch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch

from betterhalf.algorithms.advantage import zero_advantage_groups
from betterhalf.algorithms.loss_stats import LossStats, largest_token_share, policy_metrics
from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.reduction import REDUCTIONS
from betterhalf.runs.collect import Collected
from betterhalf.runs.learn import Learned
from betterhalf.runs.system import peak_memory_gib
from betterhalf.types import Rollout


def rollout_metrics(collected: Collected, advantages: Sequence[float], masked: int = 0) -> dict[str, float]:
    """Return `rollout/*` of one step, and the task's own `task/*`; rewards are those before any penalty.

    Args:
        collected: the step's groups, and those that dynamic sampling left out.
        advantages: one for each rollout of the step's own groups.
        masked: number of the step's own rollouts that `algorithm.mask_truncated` leaves without a loss.
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
        **_support_metrics([rollout for group in collected.sampled for rollout in group.rollouts]),
        "rollout/kept/zero_advantage_fraction": kept / len(collected.groups),
        "rollout/masked_fraction": masked / len(collected.rollouts),
        **collected.task_metrics,
        **_turn_metrics(collected),
    }


def _turn_metrics(collected: Collected) -> dict[str, float]:
    """Return the metrics of episodes; none without an environment."""
    if collected.environment_failures is None:
        return {}
    rollouts = [rollout for group in collected.sampled for rollout in group.rollouts]
    observed = [rollout.completion.observations for rollout in rollouts]
    return {
        "rollout/turns/mean": statistics.fmean(len(observations) + 1 for observations in observed),
        "rollout/turn_limit_fraction": statistics.fmean(rollout.episode_end == "turn_limit" for rollout in rollouts),
        "rollout/observation_tokens/mean": statistics.fmean(
            sum(len(observation.token_ids) for observation in observations) for observations in observed
        ),
        "rollout/environment_failures": float(collected.environment_failures),
    }


def _described(area: str, rollouts: Sequence[Rollout]) -> dict[str, float]:
    rewards = [rollout.reward for rollout in rollouts]
    lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
    return {
        f"{area}/reward/mean": statistics.fmean(rewards),
        f"{area}/reward/std": statistics.pstdev(rewards),
        f"{area}/length/mean": statistics.fmean(lengths),
        f"{area}/length/max": float(max(lengths)),
        f"{area}/truncated_fraction": statistics.fmean(r.completion.truncated for r in rollouts),
    }


def _support_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Describe the tokens that truncated sampling could draw; empty if it drew from the whole vocabulary."""
    supports = [support for rollout in rollouts if (support := rollout.completion.support) is not None]
    if not supports:
        return {}
    return {
        "rollout/support/tokens/mean": statistics.fmean(count for support in supports for count in support.counts),
        "rollout/support/tokens/max": float(max(max(support.counts) for support in supports)),
        "rollout/support/mass/mean": statistics.fmean(mass for support in supports for mass in support.masses),
    }


def learning_metrics(learned: Sequence[Learned], rate: float) -> dict[str, float | str | None]:
    """Return `optim/*`, `policy/*` and `loss/*` of one step, reduced over optimizer steps as the catalogue declares.

    Args:
        learned: one record for each optimizer step; at least one.
        rate: their learning rate.
    """
    reports = [one.report for one in learned]
    applied = [report for report in reports if not report.skipped]
    offenders = [report.first_offender for report in reports if report.first_offender]
    columns: Mapping[str, list[float]] = {
        "optim/loss_scale": [report.loss_scale for report in reports],
        "optim/skipped": [float(report.skipped) for report in reports],
        "optim/updates_applied": [float(not report.skipped) for report in reports],
        "optim/grad_norm": [report.grad_norm for report in applied],
        "optim/token_share/max": [largest_token_share(one.stats) for one in learned if not one.report.skipped],
        "optim/learning_rate": [rate],
        "optim/subnormal_fraction": [report.subnormal_fraction for report in reports],
        "optim/zero_fraction": [report.zero_fraction for report in reports],
        "optim/overflow_fraction": [report.overflow_fraction for report in reports],
        "policy/version": [float(report.policy_version) for report in reports],
    }
    stats = sum((one.stats for one in learned), LossStats.empty())
    return {
        **{name: REDUCTIONS[CATALOGUE[name].reduction](column) if column else None for name, column in columns.items()},
        "optim/first_offender": offenders[0] if offenders else None,
        **policy_metrics(stats, len(learned)),
    }


def system_metrics(collected: Collected, seconds: float, device: torch.device) -> dict[str, float]:
    """Return `system/*` of a step that took `seconds` seconds, and what was sampled ahead of it in `time/`."""
    return {
        **({} if collected.ahead_seconds is None else {"time/ahead_seconds": collected.ahead_seconds}),
        "system/tokens_per_second": collected.tokens / seconds,
        "system/kept_tokens_per_second": collected.kept_tokens / seconds,
        "system/peak_memory_gib": peak_memory_gib(device),
    }
