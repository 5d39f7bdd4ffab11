"""Draw the README's figure of the collapse: the reward of each arm over the steps, with names beside the lines.

    python benchmarks/collapse_figure.py runs/collapse docs/images/collapse.svg

It reads `arms/*/metrics.jsonl` of a finished `betterhalf sanity experiments/sanity/collapse.toml`. The SVG has its own
background, so it reads the same on a light and on a dark page. Bold: mean over 11 steps; faint: each step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from demo_figure import BOTTOM, HEIGHT, INK, WIDTH, Panel, axes, line, paint, text, values

from betterhalf.report.numbers import moving_average, spread

ARMS = {
    "fp16": ("FP16", "#1d4ed8"),
    "bf16": ("BF16", "#c2410c"),
    "e8m2": ("2 bits", "#b91c1c"),
    "e8m2_aligned": ("2 bits, aligned", "#7c3aed"),
    "e8m2_dual_clip": ("2 bits, dual clip", "#8a6100"),
    "coarse_trainer": ("2 bits, trainer only", "#4b5563"),
    "coarse_engine": ("2 bits, engine only", "#0b7d5d"),
}
"""Arm -> label and colour."""

WINDOW = 11
"""Number of steps of the moving average."""

TITLE = "Mean reward: BF16, FP16, and BF16 rounded to 2 mantissa bits (emulated)"

REWARD = Panel(
    title=TITLE,
    metric="rollout/reward/mean",
    left=64,
    right=700,
    ticks=[(value / 5, f"{value / 5:.1f}") for value in range(6)],
    scale=float,
)


def arm_lines(series: Sequence[float], color: str) -> str:
    """Return the faint line of each step, and the bold moving average."""
    faint = line(REWARD, series, color).replace('stroke-width="1.8"', 'stroke-width="1" opacity="0.25"')
    return faint + line(REWARD, moving_average(series, WINDOW), color).replace("1.8", "2.2")


def labels(series: dict[str, list[float]]) -> str:
    """Return the names of the arms at the ends of their lines, moved apart."""
    heights = spread([REWARD.y(moving_average(run, WINDOW)[-1]) for run in series.values()], 16, 62, BOTTOM)
    named = zip(series, heights, strict=True)
    return "".join(text(REWARD.right + 10, y + 4, ARMS[arm][0], more=paint(ARMS[arm][1])) for arm, y in named)


def figure(run: Path) -> str:
    """Return the SVG of a run folder; arms that it lacks are left out."""
    present = [arm for arm in ARMS if (run / "arms" / arm / "metrics.jsonl").exists()]
    series = {arm: values(run, arm, REWARD.metric) for arm in present}
    drawn = "".join(arm_lines(series[arm], ARMS[arm][1]) for arm in present)
    frame = axes(REWARD, max(map(len, series.values())))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" fill="{INK}" role="img" aria-label="{TITLE}">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>{frame}{drawn}{labels(series)}</svg>\n'
    )


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run of experiments/sanity/collapse.toml")
    parser.add_argument("file", type=Path, help="SVG to write")
    arguments = parser.parse_args()
    arguments.file.write_text(figure(arguments.run), encoding="ascii")


if __name__ == "__main__":
    main()
