"""Advantages of the siblings of a group, computed from their rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from betterhalf.algorithms.presets import Algorithm
from betterhalf.errors import ConfigError, RewardError
from betterhalf.types import AdvantageKind, RolloutGroup

STD_EPS = 1e-8
"""Added to the standard deviation, as in Oat, the code of arXiv 2510.26788."""


def group_advantages(rewards_PG: Tensor, kind: AdvantageKind) -> Tensor:
    """Return the advantage of every sibling; exactly zero in groups whose rewards are all equal, except with `raw`.

    Args:
        rewards_PG: [P, G], converted to float64.
        kind: `group_mean` subtracts the mean of the group (Dr. GRPO, arXiv 2503.20783); `group_standardised` divides
            that by the sample standard deviation (ddof 1) plus 1e-8 (GRPO, arXiv 2402.03300); `leave_one_out` subtracts
            the mean of the other siblings (RLOO, arXiv 2402.14740); `raw` subtracts nothing.

    Returns:
        float32 [P, G].

    Raises:
        ConfigError: the group has one sibling, and the baseline needs others.
        RewardError: a reward is not finite.
    """
    check_group_size(kind, rewards_PG.shape[1])
    rewards_PG = rewards_PG.double()
    if bad := int((~rewards_PG.isfinite()).sum()):
        raise RewardError(
            f"{bad} of {rewards_PG.numel()} rewards are not finite; make the task's reward return a finite number."
        )
    return _ADVANTAGES[kind](rewards_PG).float()


def rollout_advantages(
    groups: Sequence[RolloutGroup],
    algorithm: Algorithm,
    max_tokens: int,
    kl_penalties: Sequence[float] | None = None,
) -> list[float]:
    """Return one advantage for each rollout: its reward, with penalties on length and KL, minus the baseline.

    A completion that `mask_truncated` leaves without a loss gets 0; its reward is part of the baseline.

    With dynamic sampling, groups of equal rewards that fill up a step get 0: they would otherwise be trained on by the
    penalties alone.

    Args:
        groups: of equal size.
        algorithm: kind of advantage, penalties and mask.
        max_tokens: length limit of a completion.
        kl_penalties: subtracted from the rewards; one for each rollout, or None for none.

    Returns:
        Advantages, groups in order, siblings in order.

    Raises:
        ConfigError, RewardError: as `group_advantages`. ConfigError also if the overlong buffer exceeds `max_tokens`.
    """
    rewards_PG = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
    lengths_PG = torch.tensor([[len(r.completion.token_ids) for r in g.rollouts] for g in groups])
    penalty_PG = overlong_penalty(
        lengths_PG, max_tokens, algorithm.overlong_tokens(max_tokens), algorithm.overlong_factor
    )
    penalty_PG -= algorithm.length_penalty * (lengths_PG.double() / max_tokens)
    if kl_penalties is not None:
        penalty_PG = penalty_PG - torch.tensor(kl_penalties, dtype=torch.float64).view_as(penalty_PG)
    advantages_PG = group_advantages(rewards_PG + penalty_PG, algorithm.advantage)
    if algorithm.dynamic_sampling:
        advantages_PG = advantages_PG.masked_fill(equal_rewards(rewards_PG).unsqueeze(1), 0.0)
    if algorithm.mask_truncated:
        advantages_PG = advantages_PG.masked_fill(_truncated(groups), 0.0)
    advantages: list[float] = advantages_PG.flatten().tolist()
    return advantages


def _truncated(groups: Sequence[RolloutGroup]) -> Tensor:
    """Return the rollouts that ended at the length limit, bool [P, G]."""
    return torch.tensor([[rollout.completion.truncated for rollout in group.rollouts] for group in groups])


def check_group_size(kind: AdvantageKind, group_size: int) -> None:
    """Raise ConfigError if a group of this size has no baseline of this kind."""
    if kind != "raw" and group_size < 2:
        raise ConfigError(
            f"training.group_size={group_size} makes every advantage of kind {kind} zero; raise training.group_size "
            "to 2 or more, or set algorithm.advantage=raw."
        )


def check_dynamic_sampling(algorithm: Algorithm, group_size: int) -> None:
    """Raise ConfigError if dynamic sampling would leave out every group: the rewards of a group of one are equal."""
    if algorithm.dynamic_sampling and group_size < 2:
        raise ConfigError(
            f"algorithm.dynamic_sampling=true leaves out groups whose rewards are all equal, which with "
            f"training.group_size={group_size} is every group. Raise training.group_size to 2 or more, or set "
            "algorithm.dynamic_sampling=false."
        )


def check_overlong_buffer(buffer: int, max_tokens: int) -> None:
    """Raise ConfigError if the overlong buffer is longer than a completion can be."""
    if buffer > max_tokens:
        raise ConfigError(
            f"algorithm.overlong_buffer={buffer} exceeds sampling.max_tokens={max_tokens}; lower it to that or less."
        )


def equal_rewards(rewards_PG: Tensor) -> Tensor:
    """Return the groups whose rewards are all equal, bool [P]; dynamic sampling treats them as without signal."""
    return (rewards_PG == rewards_PG[:, :1]).all(dim=1)


def zero_advantage_groups(advantages_PG: Tensor) -> Tensor:
    """Return the groups whose advantages are all 0, bool [P].

    Leaving out their passes is lossless, unless the loss has a KL penalty or an entropy bonus.
    """
    return (advantages_PG == 0).all(dim=1)


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int, factor: float) -> Tensor:
    """Return DAPO's soft penalty on length, to be added to the reward (arXiv 2503.14476, equation 13).

    Args:
        lengths: completion tokens, any shape.
        max_tokens: length limit of a completion, where the penalty is `-factor`.
        buffer: number of tokens before the limit over which the penalty falls linearly from 0; 0 for no penalty.
        factor: 1 in DAPO, whose rewards are -1 and 1; 0.5 has the same weight for rewards of 0 and 1.

    Returns:
        float64, the shape of `lengths`, in [-factor, 0].

    Raises:
        ConfigError: the buffer is longer than the limit.
    """
    check_overlong_buffer(buffer, max_tokens)
    if buffer == 0:
        return torch.zeros_like(lengths, dtype=torch.float64)
    return factor * ((max_tokens - buffer - lengths.double()) / buffer).clamp(-1.0, 0.0)


def _centred(rewards_PG: Tensor) -> Tensor:
    """Subtract the group mean; exactly 0 where all rewards are equal, whatever the rounding of the mean."""
    equal_P1 = equal_rewards(rewards_PG).unsqueeze(1)
    return (rewards_PG - rewards_PG.mean(dim=1, keepdim=True)).masked_fill(equal_P1, 0.0)


def _standardised(rewards_PG: Tensor) -> Tensor:
    return _centred(rewards_PG) / (rewards_PG.std(dim=1, correction=1, keepdim=True) + STD_EPS)


def _leave_one_out(rewards_PG: Tensor) -> Tensor:
    """Compute r - (sum - r) / (G - 1), which is the centred reward times G / (G - 1)."""
    group_size = rewards_PG.shape[1]
    return _centred(rewards_PG) * (group_size / (group_size - 1))


def _raw(rewards_PG: Tensor) -> Tensor:
    return rewards_PG


_ADVANTAGES: dict[AdvantageKind, Callable[[Tensor], Tensor]] = {
    "group_mean": _centred,
    "group_standardised": _standardised,
    "leave_one_out": _leave_one_out,
    "raw": _raw,
}
