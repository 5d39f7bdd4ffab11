"""Which early measurement predicts that a run breaks? Judged on the results of sweeps, on runs held out.

    python benchmarks/predict_break.py SWEEP... [--steps 10] [--without TEXT] [--json]

SWEEP is a folder with `results.jsonl` and `curves.jsonl`. A run is broken if its outcome is `collapsed` or `damaged`;
runs that failed, stopped or are short are left out, and a run whose curves equal an earlier one's: two sweeps may share
a combination. Each predictor is one number from the first `--steps` steps:

    k3, accidents, token share   mean over these steps
    ratio, gradient norm         largest of these steps
    x                            L sigma^2 tau of the budget, mean of the first five steps
    mantissa bits                negative, as the plain alternative: known before the run, and no measurement

`AUC` is the chance that a broken run has the larger value than one that is not, ties counting half (0.5: no better than
chance). `held out` is the balanced accuracy of a threshold that is chosen on half of the combinations and judged on the
other half, mean of 500 seeded splits; seeds of one combination are never split. Both come with the 5% and 95% points,
of a bootstrap over combinations and over the splits.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

SPLITS = 500
BROKEN, WHOLE = ("collapsed", "damaged"), ("learned", "dips", "flat")

MEANS = {
    "k3": "mismatch/k3/mean",
    "accidents": "mismatch/accident_fraction",
    "token share": "optim/token_share/max",
}
BITS = {"bf16": 7.0, "fp16": 10.0, "fp32": 23.0}
LARGEST = {"ratio": "policy/ratio/max_negative", "gradient norm": "optim/grad_norm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a sweep."""

    combination: str
    broken: bool
    values: dict[str, float]
    """Predictors by name."""
    curve: tuple[float | None, ...]
    """Reward and k3 of every step, to recognise the same run in another sweep."""


def runs_of(folder: Path, steps: int) -> list[Run]:
    """Return the runs of a sweep that have a clear outcome."""
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    curves = [json.loads(line) for line in (folder / "curves.jsonl").read_text(encoding="utf-8").splitlines()]
    by_label = {row["label"]: row for row in curves}
    head = next(row for row in results if row["kind"] == "sweep")
    shared = head["settings"].get("precision.preset")
    return [
        Run(
            combination=f"{folder.name}/{row['combination']}",
            broken=row["outcome"] in BROKEN,
            values=predictors(row, by_label[row["label"]], steps, shared),
            curve=tuple(v for key in ("rollout/reward/mean", "mismatch/k3/mean") for v in by_label[row["label"]][key]),
        )
        for row in results
        if row["kind"] == "cell" and row["outcome"] in (*BROKEN, *WHOLE)
    ]


def different(runs: Sequence[Run], without: str | None) -> list[Run]:
    """Return the runs whose curves differ from those before, and whose combination does not contain a text."""
    first: dict[tuple[float | None, ...], Run] = {}
    for run in runs:
        first.setdefault(run.curve, run)
    return [run for run in first.values() if without is None or without not in run.combination]


def predictors(row: dict[str, Any], curve: dict[str, Any], steps: int, shared: str | None) -> dict[str, float]:
    """Return each predictor that the run has; `shared` is the precision of a sweep without an axis of precisions."""
    found = {}
    for names, combine in ((MEANS, statistics.fmean), (LARGEST, max)):
        for name, metric in names.items():
            early = [value for value in curve.get(metric, [])[:steps] if value is not None and math.isfinite(value)]
            if early:
                found[name] = float(combine(early))
    if "exponent_first" in row:
        found["x"] = float(row["exponent_first"])
    bits = [int(name.rpartition("m")[2]) for name in row["emulated"]]
    found["mantissa bits"] = -float(min(bits)) if bits else -BITS[row["point"].get("precision") or shared or "fp32"]
    return found


def auc(values: Sequence[float], broken: Sequence[bool]) -> float:
    """Return the chance that a broken run has the larger value, ties counting half; NaN without both kinds."""
    bad = [value for value, is_broken in zip(values, broken, strict=True) if is_broken]
    good = [value for value, is_broken in zip(values, broken, strict=True) if not is_broken]
    if not bad or not good:
        return math.nan
    wins = sum((b > g) + 0.5 * (b == g) for b in bad for g in good)
    return wins / (len(bad) * len(good))


def balanced_accuracy(values: Sequence[float], broken: Sequence[bool], threshold: float) -> float:
    """Return the mean of the shares judged right among broken and whole runs, `above the threshold` meaning broken."""
    shares = []
    for kind in (True, False):
        judged = [
            (value > threshold) == kind for value, is_broken in zip(values, broken, strict=True) if is_broken == kind
        ]
        if not judged:
            return math.nan
        shares.append(statistics.fmean(judged))
    return statistics.fmean(shares)


def best_threshold(values: Sequence[float], broken: Sequence[bool]) -> float:
    """Return the threshold with the highest balanced accuracy: a midpoint of neighbouring values."""
    ranked = sorted(set(values))
    middles = [(a + b) / 2 for a, b in pairwise(ranked)]
    candidates = [ranked[0] - 1, *middles]
    return max(candidates, key=lambda threshold: balanced_accuracy(values, broken, threshold))


def judged(runs: Sequence[Run], name: str) -> dict[str, Any]:
    """Return AUC and held-out accuracy of one predictor, each with its 5% and 95% points."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if name in run.values:
            groups[run.combination].append(run)
    kept, generator = list(groups.values()), random.Random(0)
    areas, accuracies = [], []
    for _ in range(SPLITS):
        areas.append(auc(*_columns(generator.choices(kept, k=len(kept)), name)))
        order = generator.sample(kept, len(kept))
        fitted, held = _columns(order[::2], name), _columns(order[1::2], name)
        if len(set(fitted[1])) == 2:
            accuracies.append(balanced_accuracy(*held, best_threshold(*fitted)))
    every = _columns(kept, name)
    return {
        "predictor": name,
        "runs": len(every[0]),
        "broken": sum(every[1]),
        "auc": [auc(*every), *_points(areas)],
        "held_out": [_mean(accuracies), *_points(accuracies)],
    }


def _columns(groups: Sequence[Sequence[Run]], name: str) -> tuple[list[float], list[bool]]:
    runs = [run for group in groups for run in group]
    return [run.values[name] for run in runs], [run.broken for run in runs]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def _points(values: Sequence[float]) -> tuple[float, float]:
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return math.nan, math.nan
    return finite[int(0.05 * (len(finite) - 1))], finite[int(0.95 * (len(finite) - 1))]


def main() -> None:
    """Print the table, as Markdown or as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP")
    parser.add_argument("--steps", type=int, default=10, help="first steps to measure on; default: 10")
    parser.add_argument("--without", metavar="TEXT", help="leave out combinations whose name contains TEXT")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    found = [run for folder in arguments.sweeps for run in runs_of(folder, arguments.steps)]
    runs = different(found, arguments.without)
    names = [name for name in ("mantissa bits", "x", *MEANS, *LARGEST) if any(name in run.values for run in runs)]
    rows = [judged(runs, name) for name in names]
    if arguments.json:
        print(json.dumps({"steps": arguments.steps, "rows": rows}))
        return
    print(f"{len(runs)} runs, {sum(run.broken for run in runs)} broken; the first {arguments.steps} steps\n")
    print("| predictor | runs | AUC (5% to 95%) | held-out accuracy (5% to 95%) |\n|---|---|---|---|")
    for row in rows:
        (area, low, high), (mean, least, most) = row["auc"], row["held_out"]
        print(
            f"| {row['predictor']} | {row['runs']} | {area:.2f} ({low:.2f} to {high:.2f}) "
            f"| {mean:.2f} ({least:.2f} to {most:.2f}) |"
        )


if __name__ == "__main__":
    main()
