"""The section on a mixture of experts: choices of trainer and engine compared, and the balance of load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.report.chart import Chart, Series, draw
from betterhalf.report.data import Arm
from betterhalf.report.fields import Point, mappings, number
from betterhalf.report.figures import FigureSpec, draw_figures
from betterhalf.report.markup import Figure, figures, note, section, shown, table
from betterhalf.report.mismatch import last_quarter
from betterhalf.report.tables import legend

FIGURES = (
    FigureSpec(
        key="experts",
        title="Tokens with other experts",
        unit="share of tokens",
        metrics=("experts/change_fraction/mean", "experts/change_fraction/max_layer"),
        include=(0.0,),
        show_band=True,
        second_dotted=True,
        only_if_recorded=True,
        caption="Tokens for which trainer and engine choose different sets of experts: mean over layers (thick lines), "
        "and in the layer where it is largest (thin dotted lines). Such a token has another hidden state, so a few of "
        "them can make most of the mismatch; algorithm.routing_replay removes that. Healthy: level, in the shaded "
        "band, whose bounds are of the mean.",
    ),
    FigureSpec(
        key="expert-load",
        title="Load of the busiest expert",
        unit="times an even load",
        metrics=("experts/load/mean", "experts/load/max"),
        include=(1.0,),
        second_dotted=True,
        caption="Tokens of a layer's busiest expert over those of an even load: mean over layers (thick lines), and in "
        "the layer where it is largest (thin dotted lines). No auxiliary loss balances experts. Healthy: level. A "
        "steady rise means that the routers give up experts.",
    ),
    FigureSpec(
        key="unused-experts",
        title="Experts without tokens",
        unit="share of experts",
        metrics=("experts/unused_fraction",),
        include=(0.0,),
        caption="Experts that no token of the step chose, over all layers; they learn nothing in that step. Healthy: "
        "level.",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """Specification of one figure over layers."""

    field: str
    """Field of `diagnostics.experts.ExpertLayer`."""
    title: str
    unit: str
    least: float
    """Value that the vertical axis must reach."""
    caption: str
    metric: str = ""
    """Metric whose healthy band is shaded, if any."""


LAYER_FIGURES = (
    LayerSpec(
        field="change_fraction",
        title="Tokens with other experts by layer",
        unit="share of tokens",
        least=0.0,
        metric="experts/change_fraction/mean",
        caption="Mean over the last quarter of the steps. Hidden states differ more from layer to layer, so the share "
        "rises with depth. A single layer far above its neighbours means that its router differs.",
    ),
    LayerSpec(
        field="load",
        title="Load of the busiest expert by layer",
        unit="times an even load",
        least=1.0,
        caption="Mean over the last quarter of the steps.",
    ),
)
"""The figures over layers, from `mismatch.jsonl`."""


def experts_section(arms: Sequence[Arm]) -> str:
    """Return the section of the runs with experts; empty without one."""
    mixed = [arm for arm in arms if arm.finite("experts/load/mean")]
    if not mixed:
        return ""
    drawn, _ = draw_figures(FIGURES, mixed)
    by_layer = [figure for spec in LAYER_FIGURES if (figure := layer_figure(spec, mixed)) is not None]
    return section("Experts", note(_MEANING) + legend(mixed) + figures([*drawn, *by_layer]))


_MEANING = (
    "Routing of all measured tokens, those of prompts included, before any update. With algorithm.routing_replay the "
    "trainer computes with the engine's experts, and these figures show the choice that it would have made."
)


def layer_figure(spec: LayerSpec, arms: Sequence[Arm]) -> Figure | None:
    """Return a figure over layers, averaged over the last quarter of the steps; None if it has no data."""
    series = [(arm, layer_means(arm.mismatch, spec.field)) for arm in arms]
    key, depth = f"expert-layer-{spec.field.replace('_', '-')}", max(len(points) for _, points in series)
    known = CATALOGUE.get(spec.metric)
    image = draw(
        Chart(
            key=key,
            title=f"{spec.title} ({spec.unit})",
            series=tuple(Series(name=arm.name, style=arm.index, points=points) for arm, points in series),
            across="layer",
            across_include=(1.0, float(max(2, depth))),
            include=(spec.least,),
            band=known.band if known else None,
        )
    )
    if image is None:
        return None
    rows = [[arm.name, f"{layer:g}", shown(value)] for arm, points in series for layer, value in points]
    numbers = table(["", "layer with experts", spec.unit], rows)
    return Figure(key=key, title=spec.title, unit=spec.unit, image=image, caption=spec.caption, numbers=numbers)


def layer_means(rows: Sequence[Mapping[str, Any]], field: str) -> list[Point]:
    """Return (layer, mean over the last quarter of the steps) of a field of `by_expert_layer`; layers count from 1."""
    steps = [[number(layer.get(field)) for layer in mappings(row, "by_expert_layer")] for row in last_quarter(rows)]
    depth = max(map(len, steps), default=0)
    columns = ([step[layer] for step in steps if layer < len(step)] for layer in range(depth))
    means = ((float(layer), math.fsum(values) / len(values)) for layer, values in enumerate(columns, start=1))
    return [(layer, mean) for layer, mean in means if math.isfinite(mean)]
