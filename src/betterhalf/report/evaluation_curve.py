"""Curves of the evaluations during training, with their intervals: a figure for each data set."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from betterhalf.report.chart import Chart, Series, draw
from betterhalf.report.data import Arm
from betterhalf.report.fields import number
from betterhalf.report.markup import Figure, shown, table

_NAME = re.compile(r"evaluation/([A-Za-z0-9][A-Za-z0-9_-]*)/accuracy/mean")
_STATISTICS = ("mean", "low", "high")
_CAPTION = (
    "Mean reward on data of its own, before training (step 0), in the steps that evaluate.every chooses, and at the "
    "end. Thin dotted lines: the interval over prompts. The same prompts and draws come back each time. Healthy: rises "
    "with the reward of training; a gap that opens between the two is overfitting."
)


def evaluation_curves(arms: Sequence[Arm]) -> list[Figure]:
    """Return a figure for each data set that a run has evaluated; none without evaluations."""
    names = dict.fromkeys(
        found[1] for arm in arms for row in arm.evaluated for key in row if (found := _NAME.fullmatch(key))
    )
    drawn = [_figure(name, place, arms) for place, name in enumerate(names)]
    return [figure for figure in drawn if figure]


def _figure(name: str, place: int, arms: Sequence[Arm]) -> Figure | None:
    key = f"evaluation-{place}"
    lines = [_line(arm, name, statistic) for arm in arms if arm.evaluated for statistic in _STATISTICS]
    title = f"Evaluation, {name}"
    unit = "mean reward of all completions (avg@k)"
    image = draw(Chart(key=key, title=f"{title} ({unit})", series=tuple(lines), include=(0.0, 1.0)))
    if image is None:
        return None
    rows = [_numbers(arm, row, name) for arm in arms for row in arm.evaluated]
    return Figure(
        key=key,
        title=title,
        unit=unit,
        image=image,
        caption=_CAPTION,
        numbers=table(["run", "step", *_STATISTICS], rows),
    )


def _line(arm: Arm, name: str, statistic: str) -> Series:
    return Series(
        tag=arm.tag if statistic == "mean" else "",
        name=f"{arm.name}, {statistic}",
        style=arm.index,
        points=[(number(row.get("step")), _value(row, name, statistic)) for row in arm.evaluated],
        second=statistic != "mean",
    )


def _value(row: Mapping[str, Any], name: str, statistic: str) -> float:
    return number(row.get(f"evaluation/{name}/accuracy/{statistic}"))


def _numbers(arm: Arm, row: Mapping[str, Any], name: str) -> list[str]:
    values = [_value(row, name, statistic) for statistic in _STATISTICS]
    return [arm.name, str(row.get("step", "-")), *(shown(v) if math.isfinite(v) else "-" for v in values)]
