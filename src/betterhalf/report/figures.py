"""Which figures the page shows, in order, and what each looks like when all is well."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.report.axis import Scale
from betterhalf.report.chart import Chart, Line, Mark, draw, smoothing_window
from betterhalf.report.data import Arm


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureSpec:
    """One figure over steps."""

    key: str
    title: str
    unit: str
    metrics: tuple[str, ...]
    """The first is labelled at its end; the others share its style."""
    caption: str
    """What it shows, and what healthy looks like."""
    scale: Scale = "linear"
    include: tuple[float, ...] = ()
    smooth: bool = False
    show_band: bool = False
    """Shade the healthy band that the catalogue gives the first metric."""


FIGURES = (
    FigureSpec(
        key="reward",
        title="Reward",
        unit="mean over the step's completions",
        metrics=("rollout/reward/mean",),
        include=(0.0, 1.0),
        smooth=True,
        caption="Healthy: rises, then stays up. A fall without recovery is a collapse.",
    ),
    FigureSpec(
        key="k3",
        title="Mismatch k3",
        unit="nats a token",
        metrics=("mismatch/k3/mean",),
        scale="log10",
        smooth=True,
        show_band=True,
        caption="KL(mu || pi) over sampled tokens, at equal weights, before any update. Healthy: in the shaded band "
        "and level. Growth over many steps comes before a collapse.",
    ),
    FigureSpec(
        key="gap",
        title="Largest pi \u2212 mu",
        unit="probability, both signs",
        metrics=("mismatch/prob_gap/max", "mismatch/prob_gap/min"),
        include=(0.0,),
        caption="The most that trainer (pi) and engine (mu) disagree on any sampled token, above and below zero. "
        "Healthy: narrow and symmetric.",
    ),
    FigureSpec(
        key="ess",
        title="Effective sample size",
        unit="share of completions",
        metrics=("mismatch/ess_fraction",),
        include=(0.0, 1.0),
        caption="What is left of the sample once completions are weighted by pi / mu. Healthy: close to 1.",
    ),
    FigureSpec(
        key="scale",
        title="Loss scale",
        unit="powers of two; a cross is a skipped step",
        metrics=("optim/loss_scale",),
        scale="log2",
        caption="Healthy in FP16: level or slowly rising; a lone skip after a rise is how the scale finds its place. "
        "Falling step after step means overflow in the backward pass. BF16 and FP32 stay at 1.",
    ),
    FigureSpec(
        key="grad",
        title="Gradient norm",
        unit="before clipping",
        metrics=("optim/grad_norm",),
        scale="log10",
        smooth=True,
        caption="Healthy: same order of magnitude throughout; spikes that recur and grow are a warning.",
    ),
    FigureSpec(
        key="entropy",
        title="Entropy",
        unit="nats a token",
        metrics=("policy/entropy/mean",),
        include=(0.0,),
        smooth=True,
        caption="Healthy: falls slowly as the policy makes up its mind. Zero means no exploration; a rise, noise.",
    ),
    FigureSpec(
        key="length",
        title="Completion length",
        unit="tokens, mean",
        metrics=("rollout/length/mean",),
        smooth=True,
        caption="Healthy: moves with the task. A jump to the length limit means completions no longer end.",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A drawn figure with the text around it."""

    key: str
    title: str
    unit: str
    image: str
    """The `<svg>`."""
    caption: str
    numbers: str
    """The same data as an HTML table."""


def step_figures(arms: Sequence[Arm]) -> tuple[list[Figure], list[str]]:
    """The figures over steps that have data, and the titles of those that have none."""
    drawn, missing = [], []
    for spec in FIGURES:
        image = draw(_chart(spec, arms))
        if image is None:
            missing.append(spec.title)
        else:
            drawn.append(_with_text(spec, arms, image))
    return drawn, missing


def _chart(spec: FigureSpec, arms: Sequence[Arm]) -> Chart:
    band = CATALOGUE[spec.metrics[0]].band if spec.show_band else None
    return Chart(
        key=spec.key,
        title=f"{spec.title} ({spec.unit})",
        scale=spec.scale,
        lines=tuple(_line(spec, arm, index) for arm in arms for index in range(len(spec.metrics))),
        band=band,
        include=spec.include,
        smooth=spec.smooth,
    )


def _line(spec: FigureSpec, arm: Arm, index: int) -> Line:
    values = arm.values(spec.metrics[index])
    suffix = f", {spec.metrics[index]}" if len(spec.metrics) > 1 else ""
    return Line(
        tag=arm.tag if index == 0 else "",
        name=arm.name + suffix,
        style=arm.index,
        steps=arm.steps,
        values=values,
        marks=_skips(arm, values) if spec.key == "scale" else (),
    )


def _skips(arm: Arm, scales: Sequence[float]) -> tuple[Mark, ...]:
    return tuple(
        Mark(step=step, value=scale, text=f"{arm.name}, step {step}: {skipped:g} skipped, loss scale {scale:g}")
        for step, scale, skipped in zip(arm.steps, scales, arm.values("optim/skipped"), strict=True)
        if skipped > 0
    )


def _with_text(spec: FigureSpec, arms: Sequence[Arm], image: str) -> Figure:
    longest = max(len(arm.steps) for arm in arms)
    window = smoothing_window(longest) if spec.smooth else 1
    mean = "mean" if spec.scale == "linear" else "geometric mean"
    smoothed = f" Bold: {mean} of {window} steps; faint: each step." if window > 1 else ""
    return Figure(
        key=spec.key,
        title=spec.title,
        unit=spec.unit,
        image=image,
        caption=spec.caption + smoothed,
        numbers=_numbers(spec.metrics, arms),
    )


def _numbers(metrics: Sequence[str], arms: Sequence[Arm]) -> str:
    """First, last, mean, lowest and highest of each metric and arm, as an HTML table."""
    statistics: tuple[tuple[str, Callable[[list[float]], float]], ...] = (
        ("first", lambda v: v[0]),
        ("last", lambda v: v[-1]),
        ("mean", lambda v: math.fsum(v) / len(v)),
        ("lowest", min),
        ("highest", max),
    )
    head = "".join(f"<th>{name}</th>" for name, _ in statistics)
    rows = []
    for metric in metrics:
        for arm in arms:
            finite = arm.finite(metric)
            cells = "".join(f"<td>{function(finite):.4g}</td>" for _, function in statistics) if finite else ""
            rows.append(f"<tr><th>{escape(arm.name)}</th>{cells or '<td colspan=5>not recorded</td>'}</tr>")
        rows.append(f'<tr class="note"><td colspan=6><code>{metric}</code></td></tr>')
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
