"""Draw the README's figure from a finished run of the demo: mismatch and reward for each step, FP16 beside BF16.

    python benchmarks/demo_figure.py runs/demo docs/images/demo.svg

It reads `arms/fp16/metrics.jsonl` and `arms/bf16/metrics.jsonl` of the run folder. The SVG has its own background, so
it reads the same on a light and on a dark page. Nothing is smoothed or left out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ARMS = {"bf16": ("BF16", "#c2410c"), "fp16": ("FP16", "#1d4ed8")}
"""Arm -> label and colour."""

WIDTH, HEIGHT = 880, 330
TOP, BOTTOM = 62, 278
PANELS = ((64, 424), (520, 804))
"""Left and right edge of the two plots, in pixels."""

INK, FAINT = "#1f2328", "#d8dee4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One plot: a quantity of both arms over the steps."""

    title: str
    metric: str
    """Key in metrics.jsonl."""
    left: int
    right: int
    ticks: Sequence[tuple[float, str]]
    """(value, label) up the vertical axis; the first and the last are its ends."""
    scale: Callable[[float], float]
    """Value -> height, in any unit."""

    def y(self, value: float) -> float:
        """Return the height of a value in pixels, within the plot."""
        low, high = self.scale(self.ticks[0][0]), self.scale(self.ticks[-1][0])
        share = (self.scale(value) - low) / (high - low)
        return BOTTOM - min(max(share, 0.0), 1.0) * (BOTTOM - TOP)

    def x(self, step: int, steps: int) -> float:
        """Return the place of a step in pixels."""
        return self.left + (step - 1) / max(steps - 1, 1) * (self.right - self.left)


K3 = Panel(
    title="Mismatch of the two policies: k3 per token, in nats",
    metric="mismatch/k3/mean",
    left=PANELS[0][0],
    right=PANELS[0][1],
    ticks=[(10.0**power, f"1e{power}") for power in range(-13, -4)],
    scale=math.log10,
)
REWARD = Panel(
    title="Mean reward",
    metric="rollout/reward/mean",
    left=PANELS[1][0],
    right=PANELS[1][1],
    ticks=[(value / 10, f"{value / 10:.1f}") for value in range(5, 11)],
    scale=float,
)


def values(run: Path, arm: str, metric: str) -> list[float]:
    """Return a metric of an arm, one value for each step."""
    lines = (run / "arms" / arm / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [float(json.loads(line)[metric]) for line in lines]


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12, more: str = "") -> str:
    """Return a line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" {more}>{words}</text>'


def axes(panel: Panel, steps: int) -> str:
    """Return title, grid and labels of a plot."""
    parts = [text(panel.left - 40, 34, panel.title, size=14, more='font-weight="600"')]
    for value, label in panel.ticks:
        y = panel.y(value)
        parts.append(f'<path d="M{panel.left} {y:.1f}H{panel.right}" stroke="{FAINT}"/>')
        parts.append(text(panel.left - 8, y + 4, label, anchor="end"))
    for step in (1, *range(15, steps + 1, 15)):
        parts.append(text(panel.x(step, steps), BOTTOM + 20, str(step), anchor="middle"))
    parts.append(text((panel.left + panel.right) / 2, BOTTOM + 40, "step", anchor="middle"))
    return "".join(parts)


def line(panel: Panel, run_values: Sequence[float], color: str) -> str:
    """Return the line of one arm."""
    points = (f"{panel.x(step, len(run_values)):.1f},{panel.y(value):.1f}" for step, value in enumerate(run_values, 1))
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" stroke-width="1.8"/>'


def lines(panel: Panel, run: Path, label: Callable[[Sequence[float]], str]) -> str:
    """Return a whole plot, with the lines of both arms and a label for each in its colour."""
    series = {arm: values(run, arm, panel.metric) for arm in ARMS}
    parts = [axes(panel, max(map(len, series.values())))]
    parts += [line(panel, series[arm], color) for arm, (_, color) in ARMS.items()]
    for place, (arm, (name, color)) in enumerate(ARMS.items()):
        words = f"{name}: {label(series[arm])}"
        parts.append(text(panel.left + 60, BOTTOM - 36 + 18 * place, words, more=paint(color)))
    return "".join(parts)


def paint(color: str) -> str:
    """Return the attributes of a label that stays readable across a line."""
    return f'fill="{color}" font-weight="600" stroke="#ffffff" stroke-width="4" paint-order="stroke"'


def figure(run: Path) -> str:
    """Return the SVG of a run folder."""
    k3 = lines(K3, run, lambda series: f"mean {sum(series) / len(series):.1e}")
    reward = lines(REWARD, run, lambda series: f"{series[-1]:.2f} in the last step")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" fill="{INK}" role="img" aria-label="{K3.title}; {REWARD.title}">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>{k3}{reward}</svg>\n'
    )


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished `betterhalf sanity experiments/sanity/demo.toml`")
    parser.add_argument("file", type=Path, help="SVG to write")
    arguments = parser.parse_args()
    arguments.file.write_text(figure(arguments.run), encoding="ascii")


if __name__ == "__main__":
    main()
