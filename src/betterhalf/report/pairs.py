"""The (trainer dtype, rollout dtype) pairs of a probe or a doctor, as the page shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from betterhalf.report.fields import mapping, mappings, number

_STYLES = {"fp16": 0, "bf16": 1, "fp32": 2}
"""Colour, dash and marker of a precision, the same on every page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One measured pair, or one that could not be measured."""

    train: str
    """Trainer dtype."""
    rollout: str
    """Rollout dtype."""
    k3: float
    """Mean over tokens, in nats; NaN where it was not measured."""
    interval: tuple[float, float]
    """Its confidence interval; NaN where absent."""
    error: str
    """Reason why it could not be measured; empty if it was."""
    style: int
    """Colour, dash and marker."""
    row: Mapping[str, Any]
    """The pair as read from the file."""

    @property
    def no_interval(self) -> str:
        """Reason why k3 has no interval; empty if it has one."""
        return str(mapping(mapping(self.row, "metrics"), "k3/mean").get("reason") or "")

    @property
    def name(self) -> str:
        """Precision of both sides if they are equal, else those of trainer and engine."""
        return self.train if self.train == self.rollout else f"{self.train} / {self.rollout}"

    def value(self, key: str) -> float:
        """Return the number at `key`; NaN if there is none."""
        return number(self.row.get(key))

    def budget(self, key: str) -> float:
        """Return the number at `key` of its budget; NaN if there is none."""
        return number(mapping(self.row, "budget").get(key))


def read_pairs(tree: Mapping[str, Any], key: str) -> list[Pair]:
    """Return the pairs listed at `key`, in order."""
    return [_read(row, index) for index, row in enumerate(mappings(tree, key))]


def matched(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the measured pairs with one precision on both sides, FP16 first; without one, all measured pairs."""
    measured = sorted((pair for pair in pairs if not pair.error), key=lambda pair: pair.style)
    return [pair for pair in measured if pair.train == pair.rollout] or measured


def dtypes(names: Sequence[str]) -> list[str]:
    """Return each name once: FP16, BF16 and FP32 first, then the others in their order."""
    return sorted(dict.fromkeys(names), key=lambda name: _STYLES.get(name, len(_STYLES)))


def raw_logprobs_sentence(row: Mapping[str, Any]) -> str:
    """Return a sentence if the behavior logprobs of a pair fit temperature 1 instead of the stated one; else empty."""
    fit = mapping(row, "temperature")
    if not fit.get("raw"):
        return ""
    stated, at_stated, at_1, tokens = (number(fit.get(key)) for key in ("stated", "k3_at_stated", "k3_at_1", "tokens"))
    return (
        f"{row.get('train')}/{row.get('rollout')}: the dump's logprobs fit temperature 1 (raw): k3 {at_1:.2e}, against "
        f"{at_stated:.2e} at {stated:g}, over {tokens:,.0f} tokens. The pair's numbers are computed at {stated:g}, and "
        f"do not measure the mismatch. Dump the logprobs of softmax(logits / {stated:g}) (vLLM: "
        "logprobs_mode=processed_logprobs)."
    )


def _read(row: Mapping[str, Any], index: int) -> Pair:
    train, rollout = (str(row.get(key) or "?") for key in ("train", "rollout"))
    bounds = row.get("k3_ci")
    low, high = bounds if isinstance(bounds, (list, tuple)) and len(bounds) == 2 else (None, None)
    k3 = number(row.get("k3"))
    error = str(row.get("error") or "")
    return Pair(
        train=train,
        rollout=rollout,
        k3=k3,
        interval=(number(low), number(high)),
        error=error or ("" if math.isfinite(k3) else "no number was recorded"),
        style=_STYLES.get(train, index) if train == rollout else index,
        row=row,
    )
