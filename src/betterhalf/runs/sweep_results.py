"""The results of a sweep: a row for each run and each combination, and the curves of each run.

`results.jsonl` and `curves.jsonl` are small enough to be committed, and enough to draw the page; the run folders are
not needed for it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from betterhalf.config.grid import SEED, Axis, Cell, Grid
from betterhalf.config.load import flat, resolved_json
from betterhalf.diagnostics.course import mean_over_seeds, reward_course
from betterhalf.environment import environment
from betterhalf.precision.formats import FORMATS
from betterhalf.report.emulated import emulated_names
from betterhalf.report.fields import number
from betterhalf.report.sweep_table import MEASURES
from betterhalf.run_dir import RunDir, plain_json, read_json, read_jsonl, write_text_atomic
from betterhalf.types import DtypeName

FIRST_STEPS = 5
"""Number of steps over which the first value of a metric is averaged."""

_DIGITS = 4
"""Significant digits of the curves."""

Row = dict[str, Any]


_SETTINGS = (
    *("model.name", "task.type", "precision.preset", "algorithm.preset", "training.steps", "training.prompts_per_step"),
    *("training.group_size", "training.optimizer_steps", "optimizer.learning_rate", "sampling.max_tokens"),
)
"""Settings to name beside the results, if all cells share them."""


def head_row(grid: Grid) -> Row:
    """Return the row that describes the sweep: its axes, and the settings that all cells share."""
    config = grid.config
    machine = environment()
    return {
        "kind": "sweep",
        "name": config.name,
        "cells": len(grid.cells),
        "axes": [_axis_record(axis) for axis in grid.axes],
        "seeds": list(config.sweep.seeds or (config.seed,)),
        "window": config.sweep.window,
        "evaluate": config.sweep.evaluate,
        "settings": _shared_settings(grid.cells),
        "machine": {key: machine.get(key) for key in ("cpu", "gpus", "packages", "git")},
    }


def _shared_settings(cells: Sequence[Cell]) -> Row:
    settings = [flat(resolved_json(cell.config)) for cell in cells]
    return {key: settings[0][key] for key in _SETTINGS if len({found[key] for found in settings}) == 1}


def _axis_record(axis: Axis) -> Row:
    """Return an axis with the positions of its values: numbers, or the mantissa bits of formats, else None.

    An axis whose labels are not the values themselves has the settings of each label.
    """
    positions, quantity = axis.numbers, axis.name
    if all(label in FORMATS for label in axis.labels):
        names: list[DtypeName] = list(axis.labels)  # type: ignore[arg-type]
        positions = tuple(float(FORMATS[name].significand_bits - 1) for name in names)
        quantity = f"stored mantissa bits ({axis.name})"
    return {
        "name": axis.name,
        "key": axis.key,
        "labels": list(axis.labels),
        "positions": None if positions is None else list(positions),
        "quantity": quantity,
        **({"changes": {label: flat(table) for label, table in axis.changes.items()}} if axis.labelled else {}),
    }


def cell_row(cell: Cell, run: RunDir, window: int, failure: str | None) -> Row | None:
    """Return the result of a cell; None if it has none yet.

    Args:
        cell: the cell.
        run: its run folder.
        window: number of steps of the final and the best reward.
        failure: the error with which its job failed, if it did.
    """
    summary = read_json(run.summary) if run.summary.exists() else {}
    if not summary and failure is None:
        return None
    reason = failure or summary.get("reason")
    row: Row = {
        "kind": "cell",
        "label": cell.label,
        "combination": cell.combination,
        "point": dict(cell.point),
        SEED: cell.config.seed,
        "emulated": emulated_formats(cell),
        "outcome": "failed" if failure else "stopped",
        **({"reason": reason} if reason else {}),
    }
    if failure:
        return row  # its steps may be damaged, and are run again
    measured = _measures(read_jsonl(run.metrics), window) | {
        "accuracy": summary.get("final_accuracy"),
        "seconds": summary.get("seconds"),
    }
    word = measured.pop("outcome", None)
    if word and not reason:
        row["outcome"] = word
    return row | {key: _rounded(value, 6) for key, value in measured.items() if value is not None}


def _measures(steps: Sequence[Row], window: int) -> Row:
    """Return the numbers of the steps that are recorded; empty without steps."""
    if not steps:
        return {}
    course = reward_course(_column(steps, "rollout/reward/mean"), window)
    k3, exponent = _column(steps, "mismatch/k3/mean"), [_exponent(row) for row in steps]
    last = max(1, min(window, len(steps) // 4))
    return {
        "steps": len(steps),
        "window": last,
        "outcome": course.outcome,
        **{f"reward_{key}": value for key, value in asdict(course).items() if key != "outcome"},
        "k3_first": _mean(k3[:FIRST_STEPS]),
        "k3_max": _max(k3),
        "k3_final": _mean(k3[-last:]),
        "exponent_first": _mean(exponent[:FIRST_STEPS]),
        "exponent_max": _max(exponent),
        "grad_norm_max": _max(_column(steps, "optim/grad_norm")),
        "ratio_max_negative": _max(_column(steps, "policy/ratio/max_negative")),
        "accident_fraction": _mean(_column(steps, "mismatch/accident_fraction")),
        "skipped": sum(value for value in _column(steps, "optim/skipped") if math.isfinite(value)),
    }


def _exponent(row: Row) -> float:
    """Return x = L sigma^2 tau at the step's mean length; the budget predicts a share exp(-x) of effective samples."""
    factors = ("rollout/length/mean", "budget/sigma2", "budget/correlation")
    return math.prod(number(row.get(name)) for name in factors)


def _column(steps: Sequence[Row], name: str) -> list[float]:
    return [number(row.get(name)) for row in steps]


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def _max(values: Sequence[float]) -> float | None:
    return max((value for value in values if math.isfinite(value)), default=None)


def emulated_formats(cell: Cell) -> list[str]:
    """Return the emulated formats among the roles of a cell."""
    return emulated_names(cell.config.precision.roles().model_dump().values())


def combination_rows(cells: Iterable[Row]) -> list[Row]:
    """Return one row for each combination, in order: outcomes, and means over the seeds with intervals."""
    groups: dict[str, list[Row]] = {}
    for row in cells:
        groups.setdefault(row["combination"], []).append(row)
    return [_combination(rows) for rows in groups.values()]


def _combination(rows: Sequence[Row]) -> Row:
    first, kept = rows[0], [row for row in rows if row["outcome"] != "failed"]
    means = {}
    for measure in MEASURES:
        values = [number(row[measure.key]) for row in kept if measure.key in row]
        if values:
            mean = mean_over_seeds(values, positive=measure.positive, share=measure.share)
            shown = {"n": mean.count, "mean": mean.mean, "low": mean.low, "high": mean.high}
            means[measure.key] = {key: _rounded(value, 6) for key, value in shown.items()}
    return {
        "kind": "combination",
        "combination": first["combination"],
        "point": first["point"],
        "emulated": first["emulated"],
        "n": len(kept),
        "outcomes": dict(Counter(row["outcome"] for row in rows)),
        **means,
    }


def curve_row(cell: Cell, run: RunDir, metrics: Sequence[str]) -> Row | None:
    """Return the values of the chosen metrics at every step; None if none of them was logged."""
    steps = read_jsonl(run.metrics)
    columns = {name: [_rounded(number(row.get(name)), _DIGITS) for row in steps] for name in metrics}
    logged = {name: values for name, values in columns.items() if any(map(math.isfinite, values))}
    return {"label": cell.label, "combination": cell.combination, SEED: cell.config.seed, **logged} if logged else None


def _rounded(value: Any, digits: int) -> Any:
    return float(f"{value:.{digits}g}") if isinstance(value, float) and math.isfinite(value) else value


def line_of(row: Mapping[str, Any]) -> str:
    """Return a row as a compact line of JSON."""
    return json.dumps(plain_json(row), separators=(",", ":")) + "\n"


def write_rows(run: RunDir, rows: Iterable[Mapping[str, Any]], curves: Iterable[str]) -> None:
    """Write `results.jsonl` from rows and `curves.jsonl` from their lines; each is replaced as a whole."""
    write_text_atomic(run.results, "".join(map(line_of, rows)))
    write_text_atomic(run.curves, "".join(curves))
