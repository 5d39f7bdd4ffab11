"""Print the numbers of docs/results.md on long runs and on lower learning rates, from the committed curves of a sweep.

    python benchmarks/long_runs.py docs/study/long
    python benchmarks/long_runs.py docs/study/rate

For each run: mean rewards of the steps 101 to 1,000 and from 1,001 on, the lowest mean of 20 steps after step 100, the
step by which the mean of ten has fallen below 0.3, k3, ratios at a negative advantage, steps with an accident (log pi -
log mu below -3), and the median k3 of the first and of the last 1,000 steps. For each combination: the
reward of the 20 steps after an event minus that of the 20 before, which end with the step of the event, since its
rollouts were sampled before its update.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from betterhalf.run_dir import read_jsonl

REWARD, K3 = "rollout/reward/mean", "mismatch/k3/mean"
RATIO, ACCIDENTS = "policy/ratio/max_negative", "mismatch/accident_fraction"
WARM_UP, EARLY, WINDOW, LARGE = 100, 1000, 20, 50
"""Steps that do not count, steps of the first part, steps of a mean, and a ratio to count."""


def means(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each `window` values in a row."""
    return [statistics.fmean(values[start : start + window]) for start in range(len(values) - window + 1)]


def fallen(rewards: Sequence[float]) -> int | None:
    """Return the step by which the mean of ten steps has fallen below 0.3; None if it has not."""
    return next((step for step, mean in enumerate(means(rewards, 10), 10) if mean < 0.3), None)


def changes(rewards: Sequence[float], events: Sequence[int]) -> list[float]:
    """Return the change of the reward over each event, an index of a step with enough steps on both sides."""
    sides = means(rewards, WINDOW)
    return [sides[at + 1] - sides[at - WINDOW + 1] for at in events if WINDOW <= at + 1 < len(sides)]


def numbers(run: Mapping[str, Any]) -> str:
    """Return the line of a run."""
    rewards, k3 = run[REWARD], run[K3]
    ratios, accidents = ([value or 0.0 for value in run[name]] for name in (RATIO, ACCIDENTS))
    late = means(rewards[WARM_UP:], WINDOW)
    parts = [statistics.fmean(part) for part in (rewards[WARM_UP:EARLY], rewards[EARLY:]) if part]
    shown = " ".join(f"{value:.4f}" for value in parts)
    return (
        f"{run['label']:40} rewards {shown}  lowest {min(late, default=min(rewards)):.2f}  fell {fallen(rewards)}  "
        f"k3 {statistics.fmean(k3):.1e}, worst {max(k3):.1e}, medians "
        f"{statistics.median(k3[:EARLY]):.2e} {statistics.median(k3[-EARLY:]):.2e}  "
        f"ratio {max(ratios):.0f}, above {LARGE} {sum(ratio > LARGE for ratio in ratios)}  "
        f"accidents {sum(share > 0 for share in accidents)}"
    )


def main() -> None:
    """Print the lines of a sweep's runs, then the changes over events."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder below docs/study")
    runs = read_jsonl(parser.parse_args().folder / "curves.jsonl")
    for run in runs:
        print(numbers(run))
    for combination in dict.fromkeys(run["combination"] for run in runs):
        for words, name, bound, first in (
            ("accident", ACCIDENTS, 0, 0),
            (f"ratio above {LARGE}", RATIO, LARGE, WARM_UP),
        ):
            found: list[float] = []
            for run in (run for run in runs if run["combination"] == combination):
                events = [at for at, value in enumerate(run[name]) if at >= first and (value or 0.0) > bound]
                found += changes(run[REWARD], events)
            if len(found) > 1:
                error = statistics.stdev(found) / len(found) ** 0.5
                print(f"{combination}, {words}: {len(found)} events, {statistics.fmean(found):+.4f} (SE {error:.4f})")


if __name__ == "__main__":
    main()
