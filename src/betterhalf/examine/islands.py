"""FP32 islands for a model that half precision cannot hold, or only just: proposed from where it overflows, and tried.

An island computes in FP32 while what is around it is half (`precision.fp32_modules`). Each round makes islands of the
places that overflow, runs the real passes again, and looks for what overflows, or has too little headroom, next.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from betterhalf.diagnostics.numerics import Census, Spot
from betterhalf.diagnostics.verdict import Verdict, cramped, overflowing
from betterhalf.examine.census import CensusBatch, Reference, take_census
from betterhalf.examine.subject import Subject

MAX_ROUNDS = 8
"""Times that islands are added before the search gives up."""

_PLACE = re.compile(r"(?P<layer>.*?\.layers\.\d+)(\.((?P<part>self_attn|mlp)(\.(?P<leaf>.+))?|.+))?")
_NARROW = ("down_proj", "o_proj")
"""Projections that can be islands of their own: they write to the residual stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Islands:
    """What was tried, and what came of it."""

    modules: tuple[str, ...]
    """For `precision.fp32_modules`; empty when no island can cover the first overflow."""
    cures: bool
    """Whether they make the precision better; see `find_islands`."""
    reason: str
    verdict: Verdict
    """The precision's verdict with the islands."""
    census: Census
    """The census with the islands."""

    def to_json(self) -> dict[str, Any]:
        """As in `doctor.json`."""
        return {"modules": list(self.modules), "cures": self.cures, "reason": self.reason}


def with_islands(subject: Subject, modules: tuple[str, ...]) -> Subject:
    """The same subject with these FP32 islands."""
    precision = subject.config.precision.model_copy(update={"fp32_modules": modules})
    return dataclasses.replace(subject, config=subject.config.model_copy(update={"precision": precision}))


def islands_for(spot: Spot) -> Iterator[str]:
    """Islands that cover a place, the narrowest first.

    None for what is in no layer, nor for a weight that does not fit: weights of an island stay on the half grid.
    """
    place = _PLACE.fullmatch(spot.module)
    if place is None or spot.kind == "weight":
        return
    layer, part, leaf = place["layer"], place["part"], place["leaf"]
    if leaf in _NARROW and spot.kind != "input":
        yield f"{layer}.{part}.{leaf}"
    if part:
        yield f"{layer}.{part}"
    yield layer


def find_islands(
    subject: Subject, batch: CensusBatch, truth: Reference, census: Census, judge: Callable[[Subject, Census], Verdict]
) -> Islands:
    """Add islands until nothing overflows or comes close, for at most `MAX_ROUNDS` rounds or half of the layers.

    They cure an overflow when the precision is no longer unsafe, and want of headroom when it is ok.

    Args:
        subject: its own islands, if any, are kept.
        batch: tokens of the census.
        truth: their FP32 magnitudes.
        census: of the precision in want of them, without further islands.
        judge: the verdict on a subject with islands and its census; may measure the pair.
    """
    modules = tuple(subject.config.precision.fp32_modules)
    most = max(1, subject.model.hf_config.num_hidden_layers // 2)
    sufficient = ("ok", "watch") if overflowing(census) else ("ok",)
    for _ in range(MAX_ROUNDS):
        grown = _grown(modules, overflowing(census) or cramped(census))
        if grown == modules or _layers(grown) > most:
            break
        modules = grown
        census = take_census(with_islands(subject, modules), census.dtype, batch, truth)
    verdict = judge(with_islands(subject, modules), census)
    cures = verdict.verdict in sufficient
    name = census.dtype.upper()
    reason = _cured(name, modules, verdict) if cures else _not_cured(name, modules, verdict, most)
    return Islands(modules=modules, cures=cures, reason=reason, verdict=verdict, census=census)


def _grown(modules: tuple[str, ...], spots: tuple[Spot, ...]) -> tuple[str, ...]:
    """One more island, or a wider one, for each place; islands inside another are dropped."""
    chosen = dict.fromkeys(modules)
    for spot in spots:
        # What overflows although an earlier island covers it needs a wider one; one of this round is not tried yet.
        wider = (island for island in islands_for(spot) if not _covered(modules, island))
        island = next(wider, None)
        if island is not None and not _covered(chosen, island):
            chosen[island] = None
    return tuple(one for one in chosen if not any(other != one and _covers(other, one) for other in chosen))


def _covers(island: str, module: str) -> bool:
    return module == island or module.startswith(f"{island}.")


def _covered(islands: Iterable[str], module: str) -> bool:
    return any(_covers(island, module) for island in islands)


def _layers(modules: tuple[str, ...]) -> int:
    """Layers with an island in them."""
    places = (_PLACE.fullmatch(module) for module in modules)
    return len({place["layer"] for place in places if place})


def _cured(name: str, modules: tuple[str, ...], verdict: Verdict) -> str:
    return f"With {_named(modules)} in FP32, {name} is {verdict.verdict}: {verdict.reasons[0]}"


def _not_cured(name: str, modules: tuple[str, ...], verdict: Verdict, most: int) -> str:
    if not modules:
        return f"No island covers it, or islands in more than {most} layers would be needed."
    return (
        f"With {_named(modules)} in FP32, {name} is still {verdict.verdict}: {verdict.reasons[0]} The search "
        f"ends after {MAX_ROUNDS} rounds, at islands in {most} layers, or where no wider island is left."
    )


def _named(modules: tuple[str, ...]) -> str:
    shown = ", ".join(modules[:3])
    return shown if len(modules) <= 3 else f"{shown} and {len(modules) - 3} more"
