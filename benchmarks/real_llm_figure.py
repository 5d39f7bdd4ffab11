"""Draw mismatch and reward of SmolLM2 in FP16 and in BF16 on a GPU, step by step.

    python benchmarks/real_llm_figure.py docs/study/real_llm/curves.jsonl docs/images/real_llm.svg

The SVG has its own background, so it reads the same on a light and on a dark page. Nothing is left out; bold lines are
means over 11 steps.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from demo_figure import ARMS, BOTTOM, HEIGHT, INK, PANELS, WIDTH, Panel, axes, line, paint, text

from betterhalf.report.numbers import moving_average

WINDOW = 11
"""Number of steps of the moving average."""

K3 = Panel(
    title="Mismatch of the two policies: k3 per token, in nats",
    metric="mismatch/k3/mean",
    left=PANELS[0][0],
    right=PANELS[0][1],
    ticks=[(10.0**power, f"1e{power}") for power in range(-7, -2)],
    scale=math.log10,
)
REWARD = Panel(
    title="Mean reward",
    metric="rollout/reward/mean",
    left=PANELS[1][0],
    right=PANELS[1][1],
    ticks=[(value / 10, f"{value / 10:.1f}") for value in range(8)],
    scale=float,
)


def plot(panel: Panel, rows: list[dict[str, Any]]) -> str:
    """Return a plot with the lines of both arms, and their names."""
    series = {arm: [float(row[panel.metric]) for row in rows if row["arm"] == arm] for arm in ARMS}
    parts = [axes(panel, max(map(len, series.values())))]
    for place, (arm, (name, color)) in enumerate(ARMS.items()):
        faint = line(panel, series[arm], color).replace('stroke-width="1.8"', 'stroke-width="1" opacity="0.3"')
        bold = line(panel, moving_average(series[arm], WINDOW), color)
        words = f"{name}: mean {sum(series[arm]) / len(series[arm]):.2g}"
        parts.append(faint + bold + text(panel.left + 60, BOTTOM - 36 + 18 * place, words, more=paint(color)))
    return "".join(parts)


def figure(rows: list[dict[str, Any]]) -> str:
    """Return the SVG."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" fill="{INK}" role="img" aria-label="{K3.title}; {REWARD.title}">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>{plot(K3, rows)}{plot(REWARD, rows)}</svg>\n'
    )


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("curves", type=Path, help="docs/study/real_llm/curves.jsonl")
    parser.add_argument("file", type=Path, help="SVG to write")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.curves.read_text(encoding="utf-8").splitlines()]
    arguments.file.write_text(figure(rows), encoding="ascii")


if __name__ == "__main__":
    main()
