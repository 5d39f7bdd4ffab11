"""Draw the figures of README and docs/results.md with the code of the report, from a run or from files of docs/study.

    python benchmarks/study_figures.py collapse runs/collapse docs/images/collapse.svg
    python benchmarks/study_figures.py real_llm docs/study/real_llm docs/images/real_llm.svg
    python benchmarks/study_figures.py laptop_llm docs/study/laptop_llm docs/images/laptop_llm.svg
    python benchmarks/study_figures.py formats docs/study/formats docs/images/formats.svg
    python benchmarks/study_figures.py length docs/study/length docs/images/length.svg
    python benchmarks/study_figures.py long docs/study/long docs/images/long.svg

The first reads `arms/*/metrics.jsonl` of a finished `betterhalf sanity experiments/sanity/collapse.toml`. The SVG has
its own background, so it reads the same on a light and on a dark page.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from betterhalf.report.chart import Chart, Series, draw
from betterhalf.report.drawing import Drawing
from betterhalf.report.numbers import Scale
from betterhalf.run_dir import read_jsonl

REWARD, K3, RATIO = "rollout/reward/mean", "mismatch/k3/mean", "policy/ratio/max_negative"
WORDS = {REWARD: "Mean reward", K3: "Mismatch of the two policies: k3 per token, in nats"}
PAIR = {"fp16": "FP16", "bf16": "BF16"}
ARMS = {
    "fp16": ("FP16", 0),
    "bf16": ("BF16", 1),
    "e8m4": ("4 bits (emulated)", 6),
    "e8m2": ("2 bits", 6),
    "e8m2_aligned": ("2 bits, aligned", 3),
    "e8m2_dual_clip": ("2 bits, dual clip", 4),
    "coarse_trainer": ("2 bits, trainer only", 5),
    "coarse_engine": ("2 bits, engine only", 2),
}
"""Arm -> label and style of the report."""
CURVES = ("real_llm", "laptop_llm")
"""Figures of runs that are committed as `curves.jsonl`, with a row for each arm and step."""
BITS = {"e8m2": 2, "e8m3": 3, "e8m4": 4, "e8m5": 5, "bf16": 7, "fp16": 10}
LONG = {"fp16": ("FP16", 0), "bf16": ("BF16", 1), "e8m5": ("5 bits (emulated)", 6)}
"""Format of the long runs -> label and style."""
BLOCK = 50
"""Steps of the long runs that a point stands for."""
GAP = 24
"""Pixels between figures and around them."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Axis and lines of the figures of one sweep."""

    axis: str
    """Point of a cell that the horizontal axis shows."""
    axis_title: str
    ticks: Mapping[str, float]
    """Label -> place on the horizontal axis."""
    place: Callable[[Any], float]
    """Value of the point -> place on the horizontal axis."""
    series: str
    """Point of a cell that the lines tell apart."""
    lines: Mapping[str, str]
    """Value of the series -> words."""
    k3_lines: tuple[str, ...]
    """Series of the second plot."""
    law_from: float | None = None
    """Place from which k3 = c 4^-place is drawn; None without the law."""


SWEEPS = {
    "formats": Sweep(
        axis="precision",
        axis_title="stored mantissa bits (* emulated)",
        ticks={PAIR.get(name, f"{bits}*"): bits for name, bits in BITS.items()},
        place=BITS.__getitem__,
        series="rounding",
        lines={"engine": "engine rounding", "aligned": "aligned", "exact": "exact: no mismatch"},
        k3_lines=("engine",),
        law_from=BITS["fp16"],
    ),
    "length": Sweep(
        axis="tokens",
        axis_title="tokens of a completion",
        ticks={str(tokens): math.log2(tokens) for tokens in (20, 50, 100, 200)},
        place=lambda tokens: math.log2(float(tokens)),
        series="precision",
        lines={"e8m3": "e8m3 (emulated)", "e8m4": "e8m4 (emulated)", "fp16": "FP16"},
        k3_lines=("e8m3", "e8m4", "fp16"),
    ),
}


def over_steps(metric: str, arms: Mapping[str, Rows], **choices: Any) -> Drawing | None:
    """Return the metric of each arm over the steps, with the mean in the legend."""
    values = {arm: [float(row[metric]) for row in rows] for arm, rows in arms.items()}
    lines = (
        Series(
            tag=ARMS[arm][0].partition(" (")[0],
            name=f"{ARMS[arm][0]}: mean {statistics.fmean(found):.2g}",
            style=ARMS[arm][1],
            points=list(enumerate(found, 1)),
        )
        for arm, found in values.items()
    )
    scale: Scale = "log10" if metric == K3 else "linear"
    chosen = {"key": metric, "title": WORDS[metric], "scale": scale, "smooth": True} | choices
    return draw(Chart(**chosen, series=tuple(lines)))


def in_blocks(metric: str, title: str, curves: Rows, combine: Callable[[Sequence[float]], float]) -> Drawing | None:
    """Return a line for each format of the long runs; a point combines `BLOCK` steps of all seeds, at the last step."""
    series = []
    for name, (label, style) in LONG.items():
        found: dict[int, list[float]] = defaultdict(list)
        for curve in curves:
            if curve["combination"] == f"precision={name}":
                for step, value in enumerate(curve[metric]):
                    if value is not None:
                        found[step // BLOCK].append(value)
        points = [(BLOCK * (block + 1), combine(values)) for block, values in sorted(found.items())]
        series.append(Series(tag=label.partition(" (")[0], name=label, style=style, points=points))
    scale: Scale = "log10" if metric == RATIO else "linear"
    include = (0.0, 1.0) if scale == "linear" else ()
    return draw(Chart(key=metric, title=title, scale=scale, include=include, series=tuple(series)))


def along(sweep: Sweep, rows: Rows, metric: str, title: str, names: Sequence[str]) -> Drawing | None:
    """Return the runs of a sweep as points, and lines through their means: geometric ones of k3."""
    scale, mean = ("linear", statistics.fmean) if metric == "reward_final" else ("log10", statistics.geometric_mean)
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["kind"] == "cell" and metric in row and (scale == "linear" or row[metric] > 0):
            point = row["point"]
            found[point[sweep.series]][sweep.place(point[sweep.axis])].append(float(row[metric]))
    series, styles = [], list(sweep.lines)
    for name in names:
        means = sorted((place, mean(values)) for place, values in found[name].items())
        runs = [(place, value) for place, values in found[name].items() for value in values]
        series.append(Series(name=sweep.lines[name], style=styles.index(name), points=means))
        series.append(Series(name=f"{sweep.lines[name]}, runs", style=styles.index(name), points=runs, joined=False))
    law = None
    if scale == "log10" and sweep.law_from is not None:
        start = mean(found[names[0]][sweep.law_from])
        law = ((2.0, start * 4.0 ** (sweep.law_from - 2.0)), (sweep.law_from, start))
    return draw(
        Chart(
            key=metric,
            title=title + (" (dashed: 4^-bits)" if law else ""),
            series=tuple(series),
            scale=scale,
            include=(0.0, 1.0) if scale == "linear" else (),
            across=sweep.axis_title,
            across_range=(min(sweep.ticks.values()) - 0.2, max(sweep.ticks.values()) + 0.2),
            across_ticks=tuple((place, label) for label, place in sweep.ticks.items()),
            guide=law,
        )
    )


def figures(name: str, folder: Path) -> list[Drawing | None]:
    """Return the drawings of a figure, from left to right."""
    if name in SWEEPS:
        sweep, rows = SWEEPS[name], read_jsonl(folder / "results.jsonl")
        return [
            along(sweep, rows, "reward_final", "Reward of the last 20 steps", tuple(sweep.lines)),
            along(sweep, rows, "k3_first", "k3 per token of the first steps, in nats", sweep.k3_lines),
        ]
    if name == "long":
        curves = read_jsonl(folder / "curves.jsonl")
        return [
            in_blocks(REWARD, f"Mean reward of {BLOCK} steps of three seeds", curves, statistics.fmean),
            in_blocks(RATIO, f"Largest ratio at a negative advantage in {BLOCK} steps", curves, max),
        ]
    if name in CURVES:
        curves = read_jsonl(folder / "curves.jsonl")
        arms = {arm: [row for row in curves if row["arm"] == arm] for arm in ARMS}
        return [over_steps(metric, {arm: rows for arm, rows in arms.items() if rows}) for metric in (K3, REWARD)]
    files = {arm: folder / "arms" / arm / "metrics.jsonl" for arm in ARMS}
    arms = {arm: read_jsonl(file) for arm, file in files.items() if file.exists()}
    title = "Mean reward: BF16, FP16, and BF16 rounded to 2 mantissa bits (emulated)"
    return [over_steps(REWARD, arms, title=title, include=(0.0, 1.0), wide=True)]


def beside(drawings: Sequence[Drawing | None]) -> str:
    """Return one SVG of figures side by side on a white ground."""
    parts, left, tallest = [], float(GAP), 0.0
    for place, drawing in enumerate(each for each in drawings if each):
        svg = re.sub(r"\bclip(?=\d)", f"clip{place}-", drawing.svg())  # Ids are unique in the whole file.
        width, height = (float(size) for size in re.findall(r'<svg [^>]*?width="(.+?)" height="(.+?)"', svg)[0])
        parts.append(svg.replace("<svg ", f'<svg x="{left}" y="{GAP}" ', 1))
        left, tallest = left + width + GAP, max(tallest, height)
    label = "; ".join(drawing.title for drawing in drawings if drawing)
    size = f'width="{left:.0f}" height="{tallest + 2 * GAP:.0f}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {left:.0f} {tallest + 2 * GAP:.0f}" role="img" '
        f'aria-label="{label}"><rect width="100%" height="100%" rx="8" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", choices=("collapse", "long", *CURVES, *SWEEPS))
    parser.add_argument("folder", type=Path, help="run folder, or folder below docs/study")
    parser.add_argument("file", type=Path, help="SVG to write")
    arguments = parser.parse_args()
    arguments.file.write_text(beside(figures(arguments.figure, arguments.folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
