"""Draw final reward and mismatch against mantissa bits, from the results of experiments/laptop/formats.sweep.toml.

    python benchmarks/formats_figure.py docs/study/formats docs/images/formats.svg

Points are runs, one for each seed; lines join the means of a rounding mode. The dashed line is the law k3 = c 4^-bits
through the mean of FP16. The SVG has its own background, so it reads the same on a light and on a dark page.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from demo_figure import BOTTOM, FAINT, HEIGHT, INK, PANELS, TOP, WIDTH, Panel, paint, text

BITS = {"e8m2": 2, "e8m3": 3, "e8m4": 4, "e8m5": 5, "bf16": 7, "fp16": 10}
MODES = {"engine": "#b91c1c", "aligned": "#7c3aed", "exact": "#0b7d5d"}
"""Rounding mode -> colour."""

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

Points = dict[int, list[float]]
"""Mantissa bits -> value of each seed."""


def points_of(results: Path, metric: str) -> dict[str, Points]:
    """Return the runs' values of a metric by rounding mode; values of 0 are left out of a logarithmic plot."""
    found: dict[str, Points] = defaultdict(lambda: defaultdict(list))
    for line in results.read_text(encoding="utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        if row["kind"] == "cell" and metric in row and (row[metric] > 0 or metric == REWARD.metric):
            point = row["point"]
            found[point["rounding"]][BITS[point["precision"]]].append(float(row[metric]))
    return found


def across(panel: Panel, bits: float) -> float:
    """Return the place of a number of bits in pixels."""
    return panel.left + 16 + (bits - 2) / 8 * (panel.right - panel.left - 32)


def axes(panel: Panel) -> str:
    """Return title, grid and labels of a plot."""
    parts = [text(panel.left - 40, 34, panel.title, size=14, more='font-weight="600"')]
    for value, label in panel.ticks:
        y = panel.y(value)
        parts.append(f'<path d="M{panel.left} {y:.1f}H{panel.right}" stroke="{FAINT}"/>')
        parts.append(text(panel.left - 8, y + 4, label, anchor="end"))
    for name, bits in BITS.items():
        label = name.upper() if name in ("bf16", "fp16") else f"{bits}*"
        parts.append(text(across(panel, bits), BOTTOM + 20, label, anchor="middle"))
    parts.append(
        text((panel.left + panel.right) / 2, BOTTOM + 40, "stored mantissa bits (* emulated)", anchor="middle")
    )
    return "".join(parts)


def curve(panel: Panel, points: Points, color: str) -> str:
    """Return the points of one rounding mode and the line through their means."""
    means = sorted((bits, statistics.fmean(values)) for bits, values in points.items())
    path = " ".join(f"{across(panel, bits):.1f},{panel.y(mean):.1f}" for bits, mean in means)
    dots = "".join(
        f'<circle cx="{across(panel, bits):.1f}" cy="{panel.y(value):.1f}" r="3" fill="{color}" opacity="0.55"/>'
        for bits, values in points.items()
        for value in values
    )
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>{dots}'


def law(points: Points) -> str:
    """Return the line k3 = c 4^-bits through the geometric mean of FP16."""
    start = statistics.geometric_mean(points[BITS["fp16"]])
    ends = [(bits, start * 4.0 ** (BITS["fp16"] - bits)) for bits in (2, 10)]
    path = " ".join(f"{across(K3, bits):.1f},{K3.y(value):.1f}" for bits, value in ends)
    return f'<polyline points="{path}" fill="none" stroke="#4b5563" stroke-dasharray="5 4"/>'


def figure(results: Path) -> str:
    """Return the SVG of a `results.jsonl`."""
    rewards, k3 = points_of(results, REWARD.metric), points_of(results, K3.metric)
    parts = [axes(REWARD), axes(K3), law(k3["engine"]), curve(K3, k3["engine"], MODES["engine"])]
    for place, (mode, color) in enumerate(MODES.items()):
        parts.append(curve(REWARD, rewards[mode], color))
        words = {"engine": "engine rounding", "aligned": "aligned", "exact": "exact: no mismatch"}[mode]
        parts.append(text(REWARD.right - 16, BOTTOM - 60 + 18 * place, words, anchor="end", more=paint(color)))
    parts.append(text(K3.right - 12, TOP + 14, "engine rounding", anchor="end", more=paint(MODES["engine"])))
    parts.append(text(K3.right - 12, TOP + 32, "dashed: 4^-bits", anchor="end", more=paint("#4b5563")))
    label = f"{REWARD.title}; {K3.title}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" fill="{INK}" role="img" aria-label="{label}">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="folder with results.jsonl of experiments/laptop/formats.sweep.toml")
    parser.add_argument("file", type=Path, help="SVG to write")
    arguments = parser.parse_args()
    arguments.file.write_text(figure(arguments.sweep / "results.jsonl"), encoding="ascii")


if __name__ == "__main__":
    main()
