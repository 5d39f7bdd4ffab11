"""Masks in the rows of a dump: they tell sampled tokens from tokens of the environment and from padding.

In a conversation with tools, the environment wrote part of a completion. Frameworks keep such tokens in the completion
and mark them with a zero: the model reads them, but the engine did not sample them, so they have no logprobs, only
placeholders. Padding is marked with a zero, too. A zero that precedes a one is a token that is read but not scored;
zeros at the end of a completion are padding.

Two masks say which tokens the model reads, not which are scored:

* `attention_mask`: a zero is a token that the model does not read. Zeros are allowed only around the sequence.
* `prompt_mask`: TRL marks padding with it; other frameworks fill it with zeros, since prompts are not trained on. Zeros
  at either end that cover one repeated token are padding. Other zeros are ignored: a prompt is never scored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KNOWN_MASKS = {
    "response_mask": "verl",
    "loss_mask": "slime, AReaL, verl",
    "loss_masks": "SkyRL",
    "action_mask": "OpenRLHF",
    "env_mask": "TRL's rollout functions",
    "tool_mask": "TRL's trainer",
    "completion_mask": "TRL, prime-rl",
    "attention_mask": "transformers",
    "prompt_mask": "TRL, prime-rl",
}
"""Name of each mask that is read -> frameworks that write it."""

OTHER_MASKS = frozenset({"pixel_attention_mask", "is_masked", "is_masked_low", "is_masked_high"})
"""Masks of other things than sampled tokens, such as prime-rl's record of what its loss dropped; they are ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Tokens of one row that are used."""

    prompt: range
    """Positions of the prompt without padding."""
    scored: tuple[bool, ...]
    """For each completion token up to the last sampled one, True if the engine sampled it."""


def refuse_unknown_masks(record: Mapping[str, Any]) -> None:
    """Refuse a key that looks like a mask but is not one of `KNOWN_MASKS`: ignoring it would falsify every number.

    Raises:
        ValueError: there is such a key; the message names it.
    """
    for key, value in record.items():
        if "mask" in key.lower() and value is not None and key not in KNOWN_MASKS and key not in OTHER_MASKS:
            raise ValueError(
                f"{key} looks like a mask, but is not a known one; rename it to the mask with its meaning "
                f"({', '.join(KNOWN_MASKS)}), or leave it out"
            )


def read_masks(record: Mapping[str, Any], prompt: Sequence[Any], completion: Sequence[Any]) -> Kept:
    """Read all masks of a row; a token counts as sampled if every one of them is 1.

    Args:
        record: row whose masks have a value for each token of the completion, or of prompt and completion.
        prompt: token ids in the row, including padding.
        completion: token ids in the row, including padding.

    Raises:
        ValueError: a mask has other values or another length, hides a token in the middle of the sequence from the
            model, or leaves nothing to score.
    """
    kept, scored = range(len(prompt)), [True] * len(completion)
    for name, mask in _masks(record, len(prompt), len(completion)):
        split = len(mask) - len(completion) if name != "prompt_mask" else len(mask)
        before, after = mask[:split], mask[split:]
        if name == "attention_mask":
            _require_contiguous(name, before, after)
        if name == "attention_mask" or (name == "prompt_mask" and _is_padding(before, prompt)):
            kept = _both(kept, _without_ends(before)) if before else kept
        scored = [one and other for one, other in zip(scored, after, strict=True)] if after else scored
    if completion and not any(scored):
        raise ValueError(f"no token is left to score after applying {_names(record)}")
    return Kept(prompt=kept, scored=tuple(scored[: len(_without_ends(scored, start=False))]))


def _masks(record: Mapping[str, Any], prompt: int, completion: int) -> Iterator[tuple[str, list[bool]]]:
    """Yield (name, values) of each mask in the row."""
    for name in KNOWN_MASKS:
        values = record.get(name)
        if values is None:
            continue
        if not isinstance(values, list):
            raise ValueError(f"{name} is not a list")
        lengths = (prompt,) if name == "prompt_mask" else (completion, prompt + completion)
        if len(values) not in lengths:
            wanted = f"{prompt} prompt tokens" + ("" if name == "prompt_mask" else f" and {completion} token_ids")
            raise ValueError(f"{name} has {len(values)} values for {wanted}")
        yield name, [_bit(name, place, value) for place, value in enumerate(values)]


def _bit(name: str, place: int, value: Any) -> bool:
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise ValueError(f"{name}[{place}] = {json.dumps(value, default=str)[:40]} is neither 0 nor 1")
    return bool(value)


def _require_contiguous(name: str, before: Sequence[bool], after: Sequence[bool]) -> None:
    for part, values in (("prompt", before), ("completion", after)):
        inside = _without_ends(values, start=part == "prompt")
        if not all(values[place] for place in inside):
            raise ValueError(
                f"{name} has a zero between ones of the {part}, but the trainer reads every token there; use "
                "response_mask to mark tokens that are read but were not sampled"
            )


def _is_padding(mask: Sequence[bool], prompt: Sequence[Any]) -> bool:
    """Return whether the zeros at the ends of a prompt cover one repeated token; False for a mask without ones."""
    inside = _without_ends(mask)
    outside = [*prompt[: inside.start], *prompt[inside.stop :]]
    return any(mask) and all(token == outside[0] for token in outside)


def _without_ends(mask: Sequence[bool], *, start: bool = True) -> range:
    """Return the positions from the first one to the last one; without `start`, from position 0."""
    ones = [place for place, value in enumerate(mask) if value]
    if not ones:
        return range(0)
    return range(ones[0] if start else 0, ones[-1] + 1)


def _both(first: range, second: range) -> range:
    return range(max(first.start, second.start), min(first.stop, second.stop))


def _names(record: Mapping[str, Any]) -> str:
    present = [name for name in KNOWN_MASKS if name != "prompt_mask" and record.get(name) is not None]
    return " and ".join(present)
