"""The section of an evaluation: its table, and pass@k and maj@k against k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from betterhalf.report.chart import Chart, Series, draw
from betterhalf.report.data import Study
from betterhalf.report.evaluation_table import evaluation_rows, k_of, measures, sets_of
from betterhalf.report.fields import mapping, number, points
from betterhalf.report.markup import Figure, figures, legend, note, notice, part, section, shown, table

_ABOUT = (
    "avg@k: mean reward of all completions. pass@k: chance that one of k completions solves a prompt. maj@k: chance "
    "that the majority vote of k completions is right. Intervals are over prompts."
)
_FIGURES = (
    (
        "pass",
        "pass@k",
        "Rises with k if completions of one prompt differ; the gap to k = 1 is what more tries can add.",
    ),
    ("maj", "maj@k", "Rises with k where the right answer is the most frequent one, and falls where a wrong one is."),
)
"""Kind, title and caption of each figure."""


def evaluation_section(study: Study, several: bool) -> str:
    """Return the section of one evaluation."""
    title = f"Evaluation, {study.name}" if several else "Evaluation"
    if study.damage:
        return section(title, notice(study.damage))
    if not sets_of(study.result):
        return section(title, notice("No summary: the evaluation has not finished. Continue it with --resume."))
    head, rows = evaluation_rows(study.result)
    target = escape(str(study.result.get("target", "")))
    drawn = [figure for kind, name, caption in _FIGURES if (figure := _figure(study, kind, name, caption))]
    return section(
        title,
        part(target, table(head, rows)) + note(_ABOUT) + _gap_note(study.result) + figures(drawn),
    )


def _gap_note(summary: Mapping[str, Any]) -> str:
    """Return a warning for each data set whose deployment gap is not reliable."""
    gaps = {name: mapping(found, "deployment_gap") for name, found in sets_of(summary).items()}
    return "".join(
        notice(
            f"{name}: the deployment gap is not reliable. The weights pi/mu leave an effective sample size of "
            f"{shown(100 * number(gap.get('ess_fraction')))}% of the completions."
        )
        for name, gap in gaps.items()
        if gap and not gap.get("reliable", True)
    )


def _figure(study: Study, kind: str, title: str, caption: str) -> Figure | None:
    """Return a figure against the logarithm of k; None with fewer than two k."""
    found = sets_of(study.result)
    names = [name for name in measures(study.result) if name.startswith(f"{kind}@")]
    if len(names) < 2:
        return None
    key = f"evaluation{study.index}-{kind}"
    image = draw(
        Chart(
            key=key,
            title=f"{title} (share of prompts)",
            series=tuple(_series(name, style, one, names) for style, (name, one) in enumerate(found.items())),
            across="k, doubling",
            across_ticks=tuple((math.log2(k), str(k)) for k in map(k_of, names)),
            include=(0.0, 1.0),
        )
    )
    head, rows = evaluation_rows(study.result)
    if image is None:
        return None
    return Figure(
        key=key,
        title=title,
        unit="share of prompts",
        image=image,
        caption=caption,
        numbers=table(head, [row for row in rows if row[0] in names]),
        legend=legend((style, escape(name)) for style, name in enumerate(found)),
    )


def _series(name: str, style: int, found: Mapping[str, Any], names: Sequence[str]) -> Series:
    pairs = [[math.log2(k_of(measure)), found.get(measure)] for measure in names]
    return Series(name=name, style=style, points=points({"points": pairs}, "points"))
