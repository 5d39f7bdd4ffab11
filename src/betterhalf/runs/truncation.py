"""Note for a step in which every completion ran to the length limit: no stop token was sampled."""

from __future__ import annotations

from collections.abc import Sequence

from betterhalf.models.stop_tokens import TurnEnd
from betterhalf.types import Rollout


def truncation_note(rollouts: Sequence[Rollout], max_tokens: int, end: TurnEnd | None) -> str | None:
    """Return a note if all completions were cut off; it says whether the model ended turns as its template does.

    Args:
        rollouts: rollouts of one step.
        max_tokens: length limit of a completion.
        end: the token with which the model's chat template ends a turn, if it shows one.
    """
    if any(rollout.completion.finish_reason != "length" for rollout in rollouts):
        return None
    sampled = 0 if end is None else sum(end.token_id in rollout.completion.token_ids for rollout in rollouts)
    problem = f"all {len(rollouts)} completions were cut off at sampling.max_tokens={max_tokens}"
    if end is not None and sampled:
        return (
            f"{problem}; {sampled} of them hold {end.text!r}, with which the chat template ends turns, but which is "
            f"not a stop token: set model.stop_tokens={end.text}"
        )
    return f"{problem}; {ADVICE}"


ADVICE = (
    "raise it if answers need more room, or check that the model was trained to end with its stop token "
    "(model.stop_tokens names another)"
)
"""Advice for when nothing ends a completion."""
