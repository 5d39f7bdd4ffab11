"""Notes for when every completion runs to the length limit: no stop token was sampled."""

from __future__ import annotations

from collections.abc import Sequence

from betterhalf.runs.assembly import Parts
from betterhalf.types import Rollout


def truncation_note(parts: Parts, rollouts: Sequence[Rollout]) -> str | None:
    """Say that all completions were cut off, and whether the model ended turns in its template's way; None if not."""
    if any(rollout.completion.finish_reason != "length" for rollout in rollouts):
        return None
    end = parts.turn_end
    sampled = 0 if end is None else sum(end.token_id in rollout.completion.token_ids for rollout in rollouts)
    said = f"all {len(rollouts)} completions were cut off at sampling.max_tokens={parts.config.sampling.max_tokens}"
    if end is not None and sampled:
        return (
            f"{said}; {sampled} of them hold {end.text!r}, with which the chat template ends turns, and which is no "
            f"stop token: set model.stop_tokens={end.text}"
        )
    return f"{said}; {ADVICE}"


ADVICE = (
    "raise it if answers need more room, or check that the model was taught to end with its stop token "
    "(model.stop_tokens names another)"
)
"""Advice for when nothing ends a completion."""
