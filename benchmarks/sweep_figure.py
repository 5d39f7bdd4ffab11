"""Draw final reward and mismatch of a sweep: against mantissa bits, or against the length of completions.

    python benchmarks/sweep_figure.py formats docs/study/formats docs/images/formats.svg
    python benchmarks/sweep_figure.py length docs/study/length docs/images/length.svg

Points are runs, one for each seed; lines join the means of a series: a rounding mode or a format. The dashed line in
the first figure is the law k3 = c 4^-bits through the mean of FP16. The SVG has its own background, so it reads the
same on a light and on a dark page.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from demo_figure import BOTTOM, FAINT, HEIGHT, INK, PANELS, TOP, WIDTH, Panel, paint, text

RED, PURPLE, GREEN, BLUE, GREY = "#b91c1c", "#7c3aed", "#0b7d5d", "#1d4ed8", "#4b5563"
BITS = {"e8m2": 2, "e8m3": 3, "e8m4": 4, "e8m5": 5, "bf16": 7, "fp16": 10}

REWARD = Panel(
    title="Reward of the last 20 steps",
    metric="reward_final",
    left=PANELS[0][0],
    right=PANELS[0][1],
    ticks=[(value / 5, f"{value / 5:.1f}") for value in range(6)],
    scale=float,
)
K3 = Panel(
    title="Mismatch of the first steps: k3 per token, in nats",
    metric="k3_first",
    left=PANELS[1][0],
    right=PANELS[1][1],
    ticks=[(10.0**power, f"1e{power}") for power in range(-8, 1)],
    scale=math.log10,
)

Points = dict[float, list[float]]
"""Place on the horizontal axis -> value of each seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Choice of axis and lines of one figure."""

    axis: str
    """Point of a cell that the horizontal axis shows."""
    axis_title: str
    ticks: Mapping[str, float]
    """Label -> place on the horizontal axis."""
    place: Callable[[str], float]
    """Value of the point -> place on the horizontal axis."""
    series: str
    """Point of a cell that the lines tell apart."""
    lines: Mapping[str, tuple[str, str]]
    """Value of the series -> words and colour."""
    k3_lines: tuple[str, ...]
    """Series of the second plot."""
    law_from: float | None = None
    """Place from which 4^-place is drawn; None without the law."""


FIGURES = {
    "formats": Figure(
        axis="precision",
        axis_title="stored mantissa bits (* emulated)",
        ticks={name.upper() if name in ("bf16", "fp16") else f"{bits}*": bits for name, bits in BITS.items()},
        place=lambda name: BITS[name],
        series="rounding",
        lines={
            "engine": ("engine rounding", RED),
            "aligned": ("aligned", PURPLE),
            "exact": ("exact: no mismatch", GREEN),
        },
        k3_lines=("engine",),
        law_from=BITS["fp16"],
    ),
    "length": Figure(
        axis="tokens",
        axis_title="tokens of a completion",
        ticks={str(tokens): math.log2(tokens) for tokens in (20, 50, 100, 200)},
        place=lambda tokens: math.log2(float(tokens)),
        series="precision",
        lines={"e8m3": ("e8m3 (emulated)", RED), "e8m4": ("e8m4 (emulated)", PURPLE), "fp16": ("FP16", BLUE)},
        k3_lines=("e8m3", "e8m4", "fp16"),
    ),
}


def points_of(results: Path, figure: Figure, metric: str) -> dict[str, Points]:
    """Return the runs' values of a metric by series; values of 0 are left out of a logarithmic plot."""
    found: dict[str, Points] = defaultdict(lambda: defaultdict(list))
    for line in results.read_text(encoding="utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        if row["kind"] == "cell" and metric in row and (row[metric] > 0 or metric == REWARD.metric):
            point = row["point"]
            found[point[figure.series]][figure.place(point[figure.axis])].append(float(row[metric]))
    return found


def across(figure: Figure, panel: Panel, place: float) -> float:
    """Return a place on the horizontal axis in pixels."""
    low, high = min(figure.ticks.values()), max(figure.ticks.values())
    return panel.left + 16 + (place - low) / (high - low) * (panel.right - panel.left - 32)


def axes(figure: Figure, panel: Panel) -> str:
    """Return title, grid and labels of a plot."""
    parts = [text(panel.left - 40, 34, panel.title, size=14, more='font-weight="600"')]
    for value, label in panel.ticks:
        y = panel.y(value)
        parts.append(f'<path d="M{panel.left} {y:.1f}H{panel.right}" stroke="{FAINT}"/>')
        parts.append(text(panel.left - 8, y + 4, label, anchor="end"))
    for label, place in figure.ticks.items():
        parts.append(text(across(figure, panel, place), BOTTOM + 20, label, anchor="middle"))
    parts.append(text((panel.left + panel.right) / 2, BOTTOM + 40, figure.axis_title, anchor="middle"))
    return "".join(parts)


def curve(figure: Figure, panel: Panel, points: Points, color: str) -> str:
    """Return the points of one series and the line through their means, which are geometric on a logarithmic plot."""
    mean = statistics.fmean if panel is REWARD else statistics.geometric_mean
    means = sorted((place, mean(values)) for place, values in points.items())
    path = " ".join(f"{across(figure, panel, place):.1f},{panel.y(value):.1f}" for place, value in means)
    dots = "".join(
        f'<circle cx="{across(figure, panel, place):.1f}" cy="{panel.y(value):.1f}" r="3" fill="{color}" '
        'opacity="0.55"/>'
        for place, values in points.items()
        for value in values
    )
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>{dots}'


def law(figure: Figure, points: Points, start_place: float) -> str:
    """Return the line k3 = c 4^-place through the geometric mean at a place, and its legend."""
    start = statistics.geometric_mean(points[start_place])
    ends = [(place, start * 4.0 ** (start_place - place)) for place in (2, start_place)]
    path = " ".join(f"{across(figure, K3, place):.1f},{K3.y(value):.1f}" for place, value in ends)
    return (
        f'<polyline points="{path}" fill="none" stroke="{GREY}" stroke-dasharray="5 4"/>'
        + text(K3.right - 12, TOP + 14, "engine rounding", anchor="end", more=paint(RED))
        + text(K3.right - 12, TOP + 32, "dashed: 4^-bits", anchor="end", more=paint(GREY))
    )


def draw(results: Path, figure: Figure) -> str:
    """Return the SVG of a `results.jsonl`."""
    rewards, k3 = (points_of(results, figure, panel.metric) for panel in (REWARD, K3))
    parts = [axes(figure, REWARD), axes(figure, K3)]
    if figure.law_from is not None:
        parts.append(law(figure, k3["engine"], figure.law_from))
    for place, (name, (words, color)) in enumerate(figure.lines.items()):
        parts.append(curve(figure, REWARD, rewards[name], color))
        parts.append(text(REWARD.left + 90, BOTTOM - 60 + 18 * place, words, more=paint(color)))
        if name in figure.k3_lines:
            parts.append(curve(figure, K3, k3[name], color))
    label = f"{REWARD.title}; {K3.title}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" fill="{INK}" role="img" aria-label="{label}">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", choices=sorted(FIGURES), help="which sweep: experiments/laptop/FIGURE.sweep.toml")
    parser.add_argument("sweep", type=Path, help="folder with its results.jsonl")
    parser.add_argument("file", type=Path, help="SVG to write")
    arguments = parser.parse_args()
    arguments.file.write_text(draw(arguments.sweep / "results.jsonl", FIGURES[arguments.figure]), encoding="ascii")


if __name__ == "__main__":
    main()
