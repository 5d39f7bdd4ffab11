"""Search for FP32 islands for a model that overflows in half precision, or has too little headroom.

An island computes in FP32 while the modules around it are half (`precision.fp32_modules`). Each round turns the places
that overflow, or that have too little headroom, into islands, and runs the census again.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from betterhalf.diagnostics.numerics import Census, Spot
from betterhalf.diagnostics.verdict import Verdict, cramped, is_residual, overflowing
from betterhalf.examine.census import CensusBatch, Reference, take_census
from betterhalf.examine.subject import Subject
from betterhalf.precision.islands import has_post_norms

MAX_ROUNDS = 8
"""Number of times that islands are added before the search gives up."""

_PLACE = re.compile(r"(?P<layer>.*?\.layers\.\d+)(\.((?P<part>self_attn|mlp)(\.(?P<leaf>.+))?|.+))?")
_WRITERS = {
    "": "post_feedforward_layernorm",
    ".post_feedforward_layernorm": "post_feedforward_layernorm",
    ".pre_feedforward_layernorm": "post_attention_layernorm",
    ".post_attention_layernorm": "post_attention_layernorm",
}
"""Place in a layer with four norms -> norm that writes its values to the residual stream."""
_NARROW = ("down_proj", "o_proj")
"""Projections that can be islands alone: they write to the residual stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Islands:
    """Islands that were tried, and their effect."""

    modules: tuple[str, ...]
    """Value for `precision.fp32_modules`; empty if no island can cover the first overflow."""
    cures: bool
    """True if the islands make the precision good enough; see `find_islands`."""
    reason: str
    """Reason for the user, in one or two sentences."""
    verdict: Verdict
    """Verdict on the precision with the islands."""
    census: Census
    """Census with the islands."""

    def to_json(self) -> dict[str, Any]:
        """Return the object of `doctor.json`."""
        return {"modules": list(self.modules), "cures": self.cures, "reason": self.reason}


def with_islands(subject: Subject, modules: tuple[str, ...]) -> Subject:
    """Return the subject with these FP32 islands."""
    precision = subject.config.precision.model_copy(update={"fp32_modules": modules})
    return dataclasses.replace(subject, config=subject.config.model_copy(update={"precision": precision}))


def islands_for(spot: Spot, *, post_norms: bool = False) -> Iterator[str]:
    """Yield the islands that cover a place, the narrowest first.

    There are none for a place outside the layers, nor for a weight that overflows: weights of an island are rounded to
    half, too. With `post_norms` (`has_post_norms` of the model), the norm of a branch's result is an island, which
    makes the residual stream FP32 from there on.
    """
    place = _PLACE.fullmatch(spot.module)
    if place is None or spot.kind == "weight":
        return
    layer, part, leaf = place["layer"], place["part"], place["leaf"]
    if post_norms and spot.kind in ("input", "forward") and (writer := _WRITERS.get(spot.module.removeprefix(layer))):
        yield f"{layer}.{writer}"
    if leaf in _NARROW and spot.kind != "input":
        yield f"{layer}.{part}.{leaf}"
    if part:
        yield f"{layer}.{part}"
    yield layer


def find_islands(
    subject: Subject,
    batch: CensusBatch,
    reference: Reference,
    census: Census,
    judge: Callable[[Subject, Census], Verdict],
) -> Islands:
    """Add islands until nothing overflows or comes close to it, in at most `MAX_ROUNDS` rounds and half of the layers.

    They are good enough for an overflow if the precision is no longer unsafe, and for a lack of headroom if it is ok.

    Args:
        subject: model and settings; islands that it has already are kept.
        batch: tokens of the census.
        reference: FP32 magnitudes of the batch.
        census: census of the precision that overflows, without further islands.
        judge: returns the verdict on a subject with islands and its census; may measure the pair.
    """
    modules = tuple(subject.config.precision.fp32_modules)
    most = max(1, subject.model.hf_config.num_hidden_layers // 2)
    accepted = ("ok", "watch") if overflowing(census) else ("ok",)
    post_norms = has_post_norms(subject.model.hf_config)

    def wider(found: Census) -> tuple[str, ...] | None:
        grown = _grown(modules, _spots(found), post_norms=post_norms)
        return None if found.predicted or grown == modules or _layers(grown) > most else grown

    for left in reversed(range(MAX_ROUNDS)):
        grown = wider(census)
        if grown is None:
            break
        modules = grown
        superseded = (lambda found: wider(found) is not None) if left else (lambda _: False)
        census = take_census(with_islands(subject, modules), census.dtype, batch, reference, superseded)
    verdict = judge(with_islands(subject, modules), census)
    sufficient = verdict.verdict in accepted
    name = census.dtype.upper()
    reason = _why_sufficient(name, modules, verdict) if sufficient else _why_insufficient(name, modules, verdict, most)
    return Islands(modules=modules, cures=sufficient, reason=reason, verdict=verdict, census=census)


def _spots(census: Census) -> tuple[Spot, ...]:
    """Return the places to cover: those that overflow, else those with too little headroom.

    The residual stream is FP32 from its first island on, so of its places only the first one needs an island.
    """
    cramped_spots = cramped(census)
    spots = overflowing(census) or cramped_spots
    stream = {spot for spot in (*spots, *cramped_spots) if is_residual(spot)}
    if not stream.intersection(spots):
        return spots
    first = min(stream, key=_stream_place)
    return (first, *(spot for spot in spots if spot not in stream))


def _stream_place(spot: Spot) -> tuple[int, bool]:
    """Return (layer, False before its MLP or True after it) of a place in the residual stream."""
    place = re.search(r"\.layers\.(\d+)(\..+)?$", spot.module)
    return (int(place[1]), place[2] is None) if place else (-1, False)


def _grown(modules: tuple[str, ...], spots: Sequence[Spot], *, post_norms: bool = False) -> tuple[str, ...]:
    """Add one island, or a wider one, for each place; drop islands inside another."""
    chosen = dict.fromkeys(modules)
    for spot in spots:
        # A place that overflows inside an island of an earlier round needs a wider one. An island of this round that
        # covers the place has not been tried yet, so it may be enough.
        wider = (one for one in islands_for(spot, post_norms=post_norms) if not _covered(modules, one))
        island = next(wider, None)
        if island is not None and not _covered(chosen, island):
            chosen[island] = None
    return tuple(one for one in chosen if not any(other != one and _covers(other, one) for other in chosen))


def _covers(island: str, module: str) -> bool:
    return module == island or module.startswith(f"{island}.")


def _covered(islands: Iterable[str], module: str) -> bool:
    return any(_covers(island, module) for island in islands)


def _layers(modules: tuple[str, ...]) -> int:
    """Return the number of layers that contain an island."""
    places = (_PLACE.fullmatch(module) for module in modules)
    return len({place["layer"] for place in places if place})


def _why_sufficient(name: str, modules: tuple[str, ...], verdict: Verdict) -> str:
    return f"With {_named(modules)} in FP32, {name} is {verdict.verdict}: {verdict.reasons[0]}"


def _why_insufficient(name: str, modules: tuple[str, ...], verdict: Verdict, most: int) -> str:
    if not modules:
        return f"No island covers the overflow, or islands in more than {most} layers would be needed."
    return (
        f"With {_named(modules)} in FP32, {name} is still {verdict.verdict}: {verdict.reasons[0]} The search "
        f"ends after {MAX_ROUNDS} rounds, with islands in {most} layers, or when no wider island is left."
    )


def _named(modules: tuple[str, ...]) -> str:
    shown = ", ".join(modules[:3])
    return shown if len(modules) <= 3 else f"{shown} and {len(modules) - 3} more"
