"""The figures over steps, in the order of the page, with captions that describe a healthy run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape

from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.report.chart import Chart, Mark, Series, draw
from betterhalf.report.data import Arm
from betterhalf.report.drawing import Drawing
from betterhalf.report.events import RESTARTS, event_marks, watchdog_bounds
from betterhalf.report.marks import Band
from betterhalf.report.markup import Figure, header_row, scroll
from betterhalf.report.numbers import Scale, points_of_line, smoothing_window


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureSpec:
    """Specification of one figure over steps."""

    key: str
    title: str
    unit: str
    metrics: tuple[str, ...]
    """Metrics to draw; the first is labelled at its end, the others share its style."""
    caption: str
    """Content of the figure, and what a healthy run looks like."""
    scale: Scale = "linear"
    include: tuple[float, ...] = ()
    """Values that the vertical axis must reach."""
    smooth: bool = False
    """Draw a moving average over the faint raw line."""
    show_band: bool = False
    """Shade the healthy band that the catalogue gives the metrics, and draw the watchdog's bounds."""
    second_dotted: bool = False
    """Draw all metrics but the first thin and dotted."""
    wide: bool = False
    """With three or more arms, draw across the page, with their names at the ends of the lines."""
    events_of: tuple[str, ...] = ()
    """Further metrics whose events are flagged here."""
    only_if_recorded: bool = False
    """Do not name the figure among those without data: most runs have no such metric."""


FIGURES = (
    FigureSpec(
        key="reward",
        title="Reward",
        unit="mean over the step's completions",
        metrics=("rollout/reward/mean",),
        include=(0.0, 1.0),
        smooth=True,
        wide=True,
        events_of=tuple(RESTARTS),
        caption="Healthy: rises, then stays up. A fall without recovery is a collapse.",
    ),
    FigureSpec(
        key="k3",
        title="Mismatch k3",
        unit="nats per token",
        metrics=("mismatch/k3/mean",),
        scale="log10",
        smooth=True,
        show_band=True,
        caption="KL(mu || pi) of engine (mu) and trainer (pi) over sampled tokens, at the same weights, before any "
        "update. Healthy: level, in the shaded band. In arXiv 2510.26788 it grows before a run collapses.",
    ),
    FigureSpec(
        key="accidents",
        title="Accidents of rounding",
        unit="share of tokens",
        metrics=("mismatch/accident_fraction", "mismatch/accident_fraction_above"),
        include=(0.0, 1e-3),
        smooth=True,
        show_band=True,
        second_dotted=True,
        caption="Tokens that the trainer finds at least 20 times less likely (thick lines) or more likely (thin dotted "
        "lines) than the engine did, before any update. Healthy: zero. One of them with a negative advantage can take "
        "over the gradient of the later optimizer steps.",
    ),
    FigureSpec(
        key="ratio",
        title="Largest ratio at negative advantage",
        unit="pi / pi' of a token, current to before the step",
        metrics=("policy/ratio/max_negative",),
        scale="log10",
        include=(1.0,),
        show_band=True,
        caption="The probability that an update gave back to a token it was meant to make less likely. PPO's clip does "
        "not bound the gradient there; algorithm.surrogate.dual_clip does. Healthy: close to 1, at most 50.",
    ),
    FigureSpec(
        key="token-share",
        title="Share of the largest token in the gradient",
        unit="share of the norm, worst optimizer step",
        metrics=("optim/token_share/max",),
        include=(0.0, 1.0),
        smooth=True,
        caption="1: a single token is the whole gradient. Normal once the policy is sure of nearly all tokens; with a "
        "large ratio and a spike of the gradient norm, one accident decides the update.",
    ),
    FigureSpec(
        key="gap",
        title="Largest pi \u2212 mu",
        unit="probability, both signs",
        metrics=("mismatch/prob_gap/max", "mismatch/prob_gap/min"),
        include=(0.0,),
        show_band=True,
        caption="Largest difference between trainer (pi) and engine (mu) on any sampled token, in either direction. "
        "Healthy: small and symmetric.",
    ),
    FigureSpec(
        key="lost-updates",
        title="Updates lost in merging",
        unit="share of the weights that adapters change",
        metrics=("mismatch/lost_update_fraction",),
        include=(0.0, 1.0),
        show_band=True,
        only_if_recorded=True,
        caption="Weights that LoRA adapters change and that rounding to the engine's format leaves at the base's "
        "value. It starts near 1, since adapters start at 0, and falls as they grow; slower in a coarser format.",
    ),
    FigureSpec(
        key="ess",
        title="Effective sample size",
        unit="share of completions",
        metrics=("mismatch/ess_fraction",),
        include=(0.0, 1.0),
        show_band=True,
        caption="Share of the sample that remains when completions are weighted by pi / mu. Healthy: close to 1.",
    ),
    FigureSpec(
        key="budget",
        title="Budget",
        unit="effective sample size, share of completions",
        metrics=("budget/predicted_ess", "budget/observed_ess"),
        include=(0.0, 1.0),
        show_band=True,
        second_dotted=True,
        caption="Thick lines: predicted for the current lengths from the variance and correlation of the token "
        "log-ratio; thin dotted lines: observed in the step. Healthy: at least 0.5, and close to each other.",
    ),
    FigureSpec(
        key="usable",
        title="Usable length",
        unit="tokens at which the predicted effective sample size falls to 0.5",
        metrics=("budget/max_length", "rollout/length/mean"),
        scale="log10",
        second_dotted=True,
        caption="Thick lines: completion length up to which importance weights are useful; thin dotted lines: mean "
        "completion length. Healthy: the former far above the latter.",
    ),
    FigureSpec(
        key="slope-steps",
        title="Slope of the log-ratio",
        unit="nats per 1,000 tokens",
        metrics=("mismatch/slope_per_1k",),
        include=(0.0,),
        show_band=True,
        smooth=True,
        caption="Least-squares slope of the completions' log-ratio against their length, in each step: noisy if the "
        "completions are few, short or of equal length. Healthy: around zero.",
    ),
    FigureSpec(
        key="scale",
        title="Loss scale",
        unit="powers of two; a cross is a skipped step",
        metrics=("optim/loss_scale",),
        scale="log2",
        caption="Healthy in FP16: level or slowly rising; a single skip after a rise is how the scaler finds the "
        "largest safe scale. A steady fall means overflow in the backward pass. BF16 and FP32 stay at 1.",
    ),
    FigureSpec(
        key="grad",
        title="Gradient norm",
        unit="before clipping",
        metrics=("optim/grad_norm",),
        scale="log10",
        smooth=True,
        caption="Healthy: the same order of magnitude throughout. Spikes that recur and grow are a warning.",
    ),
    FigureSpec(
        key="entropy",
        title="Entropy",
        unit="nats per token",
        metrics=("policy/entropy/mean",),
        include=(0.0,),
        smooth=True,
        caption="Healthy: falls slowly as the policy becomes certain. Zero means no exploration, a rise means noise.",
    ),
    FigureSpec(
        key="reference",
        title="Distance to the reference policy",
        unit="nats per token",
        metrics=("policy/reference_kl/mean",),
        include=(0.0,),
        smooth=True,
        only_if_recorded=True,
        caption="KL(pi || reference) over sampled tokens before any update, with a KL penalty. Healthy: rises, then "
        "levels off where reward and penalty balance; it falls to zero when the reference is refreshed.",
    ),
    FigureSpec(
        key="length",
        title="Completion length",
        unit="tokens, mean",
        metrics=("rollout/length/mean",),
        smooth=True,
        caption="Healthy: depends on the task. A jump to the length limit means that completions no longer end.",
    ),
)

_OWN_MEAN = re.compile(r"task/[A-Za-z0-9_./-]+/mean")
"""Pattern of the means of a task's own rewards; the page shows no other text of theirs."""
_OWN_LOSS = re.compile(r"loss/[A-Za-z0-9_./-]+")
"""Pattern of the metrics of a loss of the user's own, and of Score Centering."""
_MOST_OWN_FIGURES = 24
_FAILURES = FigureSpec(
    key="task-errors",
    title="Failed rewards",
    unit="completions",
    metrics=("task/errors",),
    include=(0.0,),
    caption="Rewards of the user's own that took too long, ended their worker, raised, or returned no finite number. "
    "Healthy: 0.",
)


def step_figures(arms: Sequence[Arm]) -> tuple[list[Figure], list[str]]:
    """Return the figures over steps that have data, and the titles of those without."""
    return draw_figures((*FIGURES[:1], *_own_figures(arms), *FIGURES[1:], *_loss_figures(arms)), arms)


def draw_figures(specs: Iterable[FigureSpec], arms: Sequence[Arm]) -> tuple[list[Figure], list[str]]:
    """Return those of the specified figures that have data, and the titles of those without."""
    drawn, missing = [], []
    for spec in specs:
        image = draw(_chart(spec, arms))
        if image is None:
            if not spec.only_if_recorded:
                missing.append(spec.title)
        else:
            drawn.append(_with_text(spec, arms, image))
    return drawn, missing


def _own_figures(arms: Sequence[Arm]) -> list[FigureSpec]:
    """Return a figure for each reward and component that a task measures under `task/`, and one for its failures.

    A single reward without weight or scale is the reward of the run, whose figure is there already.
    """
    names = [name for name in _names(arms, _OWN_MEAN) if not _repeats_reward(name, arms)]
    specs = [_own_figure(name, number) for number, name in enumerate(names)]
    if any(value > 0 for arm in arms for value in arm.finite("task/errors")):
        specs.append(_FAILURES)
    return specs


def _repeats_reward(name: str, arms: Sequence[Arm]) -> bool:
    return all(arm.finite(name) == arm.finite("rollout/reward/mean") for arm in arms)


def _loss_figures(arms: Sequence[Arm]) -> list[FigureSpec]:
    """Return a figure for each metric under `loss/`."""
    return [
        FigureSpec(
            key=f"loss{number}",
            title=f"Loss: {name.removeprefix('loss/')}",
            unit="mean over tokens",
            metrics=(name,),
            smooth=True,
            caption="A metric of the loss: one that a loss of the user's own returned, or one of Score Centering.",
        )
        for number, name in enumerate(_names(arms, _OWN_LOSS))
    ]


def _names(arms: Sequence[Arm], pattern: re.Pattern[str]) -> list[str]:
    """Return the first metrics whose names match, in order of appearance."""
    names = dict.fromkeys(name for arm in arms for row in arm.rows for name in row)
    return [name for name in names if pattern.fullmatch(name)][:_MOST_OWN_FIGURES]


def _own_figure(name: str, number: int) -> FigureSpec:
    return FigureSpec(
        key=f"task{number}",
        title=f"Reward {name.removeprefix('task/').removesuffix('/mean')}",
        unit="mean over the step's completions",
        metrics=(name,),
        smooth=True,
        caption="One of the task's own rewards, or a component of one, before weight, normalisation and scale.",
    )


def _is_wide(spec: FigureSpec, arms: Sequence[Arm]) -> bool:
    return spec.wide and len(arms) > 2


def _chart(spec: FigureSpec, arms: Sequence[Arm]) -> Chart:
    named = [replace(arm, tag=arm.name) for arm in arms] if _is_wide(spec, arms) else arms
    return Chart(
        key=spec.key,
        title=f"{spec.title} ({spec.unit})",
        scale=spec.scale,
        series=tuple(_line(spec, arm, index) for arm in named for index in range(len(spec.metrics))),
        band=_band(spec.metrics) if spec.show_band else None,
        rules=_rules(spec, arms),
        include=spec.include,
        smooth=spec.smooth,
        wide=_is_wide(spec, arms),
    )


def _band(metrics: Sequence[str]) -> Band | None:
    """Return the tightest bounds among the bands of the metrics in the catalogue."""
    bands = [known.band for name in metrics if (known := CATALOGUE.get(name)) and known.band]
    lows = [low for low, _ in bands if low is not None]
    highs = [high for _, high in bands if high is not None]
    return (max(lows, default=None), min(highs, default=None)) if bands else None


def _rules(spec: FigureSpec, arms: Sequence[Arm]) -> tuple[tuple[float, str], ...]:
    """Return the watchdog's bounds, without repeating those that several arms share."""
    if not spec.show_band:
        return ()
    return tuple(dict.fromkeys(rule for arm in arms for rule in watchdog_bounds(arm, spec.metrics)))


def _line(spec: FigureSpec, arm: Arm, index: int) -> Series:
    values = arm.values(spec.metrics[index])
    suffix = f", {spec.metrics[index]}" if len(spec.metrics) > 1 else ""
    return Series(
        tag=arm.tag if index == 0 else "",
        name=arm.name + suffix,
        style=arm.index,
        points=list(zip(arm.steps, values, strict=True)),
        marks=_marks(spec, arm, values) if index == 0 else (),
        second=spec.second_dotted and index > 0,
    )


def _marks(spec: FigureSpec, arm: Arm, values: Sequence[float]) -> tuple[Mark, ...]:
    every = [name for other in FIGURES for name in (*other.metrics, *other.events_of)]
    skips = _skips(arm, values) if spec.key == "scale" else ()
    return (*skips, *event_marks(arm, (*spec.metrics, *spec.events_of), every))


def _skips(arm: Arm, scales: Sequence[float]) -> tuple[Mark, ...]:
    return tuple(
        Mark(step=step, value=scale, text=f"{arm.name}, step {step}: {skipped:g} skipped, loss scale {scale:g}")
        for step, scale, skipped in zip(arm.steps, scales, arm.values("optim/skipped"), strict=True)
        if skipped > 0
    )


def _with_text(spec: FigureSpec, arms: Sequence[Arm], image: Drawing) -> Figure:
    longest = max(len(arm.steps) for arm in arms)
    window = smoothing_window(longest) if spec.smooth else 1
    mean = "mean" if spec.scale == "linear" else "geometric mean"
    smoothed = f" Bold: {mean} over {window} steps; faint: each step." if window > 1 else ""
    flagged = " A flag marks an event; see Events." if any(row.get("flag") for row in image.tables["events"]) else ""
    most = points_of_line(len(arms) * len(spec.metrics))
    thinned = f" Of {longest} steps, the lowest and highest of each few are drawn." if longest > most else ""
    return Figure(
        key=spec.key,
        title=spec.title,
        unit=spec.unit,
        image=image,
        caption=spec.caption + smoothed + thinned + flagged,
        numbers=_numbers(spec, arms),
    )


def _numbers(spec: FigureSpec, arms: Sequence[Arm]) -> str:
    """Return first, last, mean, lowest and highest value of each metric and arm, as an HTML table."""
    statistics: tuple[tuple[str, Callable[[list[float]], float]], ...] = (
        ("first", lambda v: v[0]),
        ("last", lambda v: v[-1]),
        ("mean", lambda v: math.fsum(v) / len(v)),
        ("lowest", min),
        ("highest", max),
    )
    rows = []
    for metric in spec.metrics:
        for arm in arms:
            finite = arm.finite(metric)
            cells = "".join(f"<td>{function(finite):.4g}</td>" for _, function in statistics) if finite else ""
            cells = cells or "<td colspan=5>not recorded</td>"
            rows.append(f'<tr><th scope="row">{escape(arm.name)}</th>{cells}</tr>')
        rows.append(f'<tr class="note"><td colspan=6><code>{metric}</code></td></tr>')
    head = header_row(["", *(name for name, _ in statistics)])
    return scroll(f"<table class=numeric>{head}{''.join(rows)}</table>", spec.title)
