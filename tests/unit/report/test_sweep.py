"""The results of a sweep as a table and as a page, from synthetic rows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from betterhalf.report.drawing import drawings_of
from betterhalf.report.page import write_report
from betterhalf.report.sweep_page import MAX_PANELS
from betterhalf.report.sweep_table import emulated_names, explanation, outcome_text, print_sweep, table_text


def mean(value: float, n: int = 2) -> dict[str, Any]:
    spread = None if n < 2 else 0.125
    low, high = (None, None) if spread is None else (value - spread, value + spread)
    return {"n": n, "mean": value, "low": low, "high": high}


def results(rates: int = 2) -> list[dict[str, Any]]:
    formats, labels = ["e8m2", "fp16"], [f"{index + 1}" for index in range(rates)]
    axes = [
        {"name": "precision", "labels": formats, "positions": [2.0, 10.0], "quantity": "stored mantissa bits"},
        {"name": "rate", "labels": labels, "positions": None, "quantity": "rate"},
    ]
    rows: list[dict[str, Any]] = [
        {"kind": "sweep", "name": "small", "cells": 99, "axes": axes, "evaluate": "fp32", "settings": {"task": "sums"}}
    ]
    for kind in ("cell", "combination"):
        for dtype in formats:
            for label in labels:
                shared = {
                    "kind": kind,
                    "combination": f"precision={dtype},rate={label}",
                    "point": {"precision": dtype, "rate": label},
                    "emulated": [dtype] if dtype.startswith("e8m") else [],
                }
                rows.append(shared | (cell(dtype, label) if kind == "cell" else combination(dtype)))
    return rows


def cell(dtype: str, label: str) -> dict[str, Any]:
    outcome = "collapsed" if dtype == "e8m2" else "learned"
    name = f"precision={dtype},rate={label},seed=0"
    return {"label": name, "seed": 0, "outcome": outcome, "reward_final": 0.5, "k3_first": 1e-4, "skipped": 0.0}


def combination(dtype: str) -> dict[str, Any]:
    coarse = dtype == "e8m2"
    return {
        "n": 1 if coarse else 2,
        "outcomes": {"collapsed": 1} if coarse else {"learned": 1, "dips": 1},
        "reward_final": mean(0.25, 1) if coarse else mean(0.75),
        "k3_first": mean(1e-4),
    }


def curves(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    cells = [row for row in rows if row["kind"] == "cell"]
    return [
        {
            "label": row["label"],
            "combination": row["combination"],
            "seed": 0,
            "rollout/reward/mean": [0.25, None, 0.5],
        }
        for row in cells
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the two files of results, and nothing else."""
    return written(tmp_path / "small", results())


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.mkdir()
    for name, lines in (("results.jsonl", rows), ("curves.jsonl", curves(rows))):
        (path / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def test_the_table_has_a_row_for_each_combination_and_no_interval_for_a_single_seed() -> None:
    head, body = table_text(results(), brief=True)
    assert head == ["precision", "rate", "n", "outcome", "final reward", "k3 first"]
    assert body[0] == ["e8m2 (emulated)", "1", "1", "collapsed", "0.250", "1.0e-04"]
    assert body[2] == ["fp16", "1", "2", "1 learned, 1 dips", "0.750 [0.625, 0.875]", "1.0e-04"]
    assert outcome_text({"outcomes": {"learned": 3}}) == "learned"


def test_the_terminal_shows_whole_lines_and_names_what_is_emulated() -> None:
    out = io.StringIO()
    print_sweep(results(), out)
    lines = out.getvalue().splitlines()
    assert any(
        line.split() == ["fp16", "1", "2", "1", "learned,", "1", "dips", "0.750", "[0.625,", "0.875]", "1.0e-04"]
        for line in lines
    )
    assert "e8m2 is emulated" in out.getvalue()
    assert emulated_names([row for row in results() if "e8m2" not in str(row.get("emulated"))]) == set()
    assert emulated_names([{"kind": "sweep", "evaluate": "e8m4"}]) == {"e8m4"}


def test_the_terminal_table_of_two_axes_is_about_100_columns_wide_and_its_caption_names_only_what_it_shows() -> None:
    rows = results()
    for row in rows[-4:]:
        row["outcomes"] = {"learned": 2, "collapsed": 1}
        row |= {key: mean(0.5) for key in ("accuracy", "reward_lowest", "k3_max", "ratio_max_negative", "seconds")}
    head, body = table_text(rows, brief=True)
    assert head[4:] == ["final reward", "accuracy (fp32)", "k3 first", "max ratio (A < 0)"]
    assert body[3][4:] == ["0.750 [0.625, 0.875]", "0.500", "1.0e-04", "5.0e-01"]
    out = io.StringIO()
    print_sweep(rows, out)
    assert max(map(len, out.getvalue().splitlines())) <= 101
    caption = " ".join(out.getvalue().split())
    assert "unless one of the values is 0: k3 first and max ratio (A < 0). e8m2 is" in caption
    assert "k3 first, k3 max and max ratio (A < 0)." in explanation(rows, brief=False)


def test_the_page_has_the_table_a_panel_for_each_combination_and_figures_along_the_axes(folder: Path) -> None:
    page = write_report([folder], folder / "report.html").read_text(encoding="utf-8")
    assert "Results by combination" in page and "0.750 [0.625, 0.875]" in page
    assert page.count('<figure id="sweep-0-reward-') == 4
    assert page.count("e8m2 (emulated)") > 2 and "e8m2 is emulated" in page
    for place in (0, 1):
        assert f'id="sweep-0-axis-{place}-reward_final"' in page and f'id="sweep-0-axis-{place}-k3_first"' in page
    assert "4 of 99 runs" in page and "task sums" in page
    assert len(drawings_of(page)) == page.count("<figure ")


def test_the_page_says_what_a_label_changes(tmp_path: Path) -> None:
    rows = results()
    rows[0]["axes"][1]["changes"] = {"1": {"precision.preset": "e8m2", "training.steps": 3}, "2": {}}
    named = written(tmp_path / "named", rows)
    page = write_report([named], named / "report.html").read_text(encoding="utf-8")
    assert "<td>1</td><td>precision.preset=e8m2 (emulated), training.steps=3</td>" in page
    assert "<td>2</td><td>nothing</td>" in page


def test_rewards_of_long_runs_have_a_moving_average(folder: Path) -> None:
    first, *others = curves(results())
    lines = [first | {"rollout/reward/mean": [0.5, 1.0] * 300}, *others]
    (folder / "curves.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    page = write_report([folder], folder / "report.html").read_text(encoding="utf-8")
    assert page.count("Bold: mean over 53 steps; faint: each step.") == 1
    drawn = {drawing.key: drawing.tables for drawing in drawings_of(page)}
    averages = drawn["sweep-0-reward-0"]["means"][0]["y"]
    assert averages[len(averages) // 2] == pytest.approx(0.75, abs=0.01)
    assert not drawn["sweep-0-reward-1"].get("means")


def test_a_page_of_many_combinations_says_how_many_panels_are_missing(tmp_path: Path) -> None:
    many = written(tmp_path / "many", results(rates=20))
    page = write_report([many], many / "report.html").read_text(encoding="utf-8")
    assert f"{40 - MAX_PANELS} more combinations are in the table only." in page


def test_a_sweep_without_results_yet_says_so(tmp_path: Path) -> None:
    empty = written(tmp_path / "empty", results()[:1])
    assert "No run has finished yet." in write_report([empty], empty / "report.html").read_text(encoding="utf-8")


def test_two_sweeps_on_one_page_have_their_names_and_figures_apart(folder: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other", results())
    page = write_report([folder, other], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Results by combination: small" in page and "Results by combination: other" in page
    assert 'id="sweep-1-reward-0"' in page
