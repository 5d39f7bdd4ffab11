"""Tables and figures of evaluations, whole and damaged."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from betterhalf.report.evaluation_table import evaluation_rows, measures, print_evaluation
from betterhalf.report.page import write_report
from betterhalf.run_dir import RunDir

GAP = {
    "accuracy": 0.5,
    "trainer_accuracy": 0.52,
    "gap": 0.02,
    "interval": [-0.01, 0.05],
    "ess_fraction": 0.4,
    "reliable": False,
}
SUMMARY: dict[str, Any] = {
    "verb": "evaluate",
    "target": "demo",
    "data": {
        "sums": {
            "prompts": 12,
            "samples": 4,
            "pass@4": 0.9,
            "avg@4": 0.5,
            "pass@1": 0.5,
            "pass@10": 0.95,
            "maj@4": 0.75,
            "truncated_fraction": 0.25,
            "mean_length": 30.0,
            "intervals": {"avg@4": [0.4, 0.6], "pass@4": [None, None]},
            "deployment_gap": GAP,
        },
        "words": {"prompts": 3, "avg@4": 0.125, "pass@1": 0.125},
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.evaluated.write_text("{}")
    run.environment.write_text("{}")
    run.summary.write_text(json.dumps(SUMMARY))
    return run


def test_a_row_for_each_measure_by_kind_and_k_and_a_column_for_each_data_set() -> None:
    head, rows = evaluation_rows(SUMMARY)
    assert head == ["", "sums", "words"]
    assert [row[0] for row in rows[:5]] == ["avg@4", "pass@1", "pass@4", "pass@10", "maj@4"]
    assert rows[0] == ["avg@4", "0.500 [0.400, 0.600]", "0.125"]
    assert rows[2] == ["pass@4", "0.900", "-"]
    assert ["length", "30.0", "-"] in rows
    assert ["gap, pi - mu", "+0.0200 [-0.0100, +0.0500]", "-"] in rows
    assert rows[-1][1] == "0.400, not reliable"


def test_the_table_is_printed_with_every_column() -> None:
    out = io.StringIO()
    print_evaluation(SUMMARY, out)
    text = out.getvalue()
    assert "0.500 [0.400, 0.600]" in text and "words" in text and "0.750" in text


def test_the_page_has_the_table_the_figures_and_the_warning(folder: RunDir) -> None:
    page = write_report([folder.path], folder.report).read_text()
    assert "<h2>Evaluation</h2>" in page and "<td>0.500 [0.400, 0.600]</td>" in page
    assert 'id="evaluation0-pass"' in page and 'id="evaluation0-maj"' not in page  # one k is no curve
    assert "sums: the deployment gap is not reliable" in page and "40% of the completions" in page


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"data": 3},
        {"data": {"a": None, "b": {"avg@x": 1, "pass@1": "high", "intervals": 7, "foo@3": 1, "deployment_gap": []}}},
        {"data": {"<script>": {"pass@1": 1e400, "pass@2": True, "intervals": {"pass@1": [0]}}}},
    ],
)
def test_a_damaged_summary_still_gives_a_page(damaged: dict[str, Any], folder: RunDir) -> None:
    folder.summary.write_text(json.dumps(damaged))
    page = write_report([folder.path], folder.report).read_text()
    assert "Evaluation" in page and "<script>" not in page
    assert all(name.partition("@")[2].isdecimal() for name in measures(damaged))


def test_an_unfinished_evaluation_says_so(folder: RunDir) -> None:
    folder.summary.unlink()
    assert "the evaluation has not finished" in write_report([folder.path], folder.report).read_text()


def test_the_curve_of_a_run_has_its_interval_and_starts_at_step_0(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.metrics.write_text("".join(f'{{"step": {step}, "rollout/reward/mean": 0.5}}\n' for step in (1, 2)))
    rows = [
        {"step": step, **{f"evaluation/sums/accuracy/{name}": mean + shift for name, shift in SHIFTS.items()}}
        for step, mean in ((0, 0.25), (2, 0.5))
    ]
    run.evaluated_steps.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, {"step": "x"}]))
    page = write_report([run.path], run.report).read_text()
    assert page.count("<h3>Evaluation, sums</h3>") == 1
    assert "run, mean: 2 steps, first 0.25, last 0.5" in page and "run, low: 2 steps, first 0.15, last 0.4" in page
    assert "<td>0</td><td>0.25</td><td>0.15</td><td>0.35</td>" in page
    assert math.isclose(SHIFTS["low"], -SHIFTS["high"])


SHIFTS = {"mean": 0.0, "low": -0.1, "high": 0.1}
