"""The section on experts: shown for runs of a mixture of experts, and for them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.report.data import load
from betterhalf.report.experts import FIGURES, LAYER_FIGURES, experts_section, layer_means
from betterhalf.report.page import render
from betterhalf.run_dir import RunDir, append_jsonl

STEPS = 8


def layer(change: float | None, load: float) -> dict[str, Any]:
    return {"change_fraction": change, "load": load, "unused": 0}


def make_run(path: Path, *, reports: bool = True, routed: bool = True) -> RunDir:
    """Write a run of two layers with experts, whose engine `reports` its choices; or a dense one."""
    run = RunDir.create(path, resume=False)
    for step in range(1, STEPS + 1):
        row: dict[str, Any] = {"step": step, "mismatch/k3/mean": 1e-7}
        change = 0.01 * step if reports else None
        layers = [layer(change, 1.5), layer(None if change is None else 2 * change, 2.5)]
        if routed:
            row |= {"experts/load/mean": 2.0, "experts/load/max": 2.5, "experts/unused_fraction": 0.0}
        if routed and change is not None:
            row |= {"experts/change_fraction/mean": 1.5 * change, "experts/change_fraction/max_layer": 2 * change}
        append_jsonl(run.metrics, row)
        append_jsonl(run.mismatch, {"step": step, "by_expert_layer": layers if routed else []})
    return run


def test_every_figure_is_drawn_with_its_numbers(tmp_path: Path) -> None:
    page = render(load([make_run(tmp_path / "mixture")]))
    assert "<h2>Experts</h2>" in page
    for spec in FIGURES:
        assert f'<figure id="{spec.key}"' in page
        assert all(metric in CATALOGUE and f"<code>{metric}</code>" in page for metric in spec.metrics)
    for other in LAYER_FIGURES:
        assert other.title in page


def test_layers_show_means_over_the_last_quarter_of_the_steps(tmp_path: Path) -> None:
    rows = load([make_run(tmp_path / "mixture")]).arms[0].mismatch
    assert layer_means(rows, "change_fraction") == [(1.0, pytest.approx(0.075)), (2.0, pytest.approx(0.15))]
    assert layer_means(rows, "load") == [(1.0, 1.5), (2.0, 2.5)]


def test_an_engine_that_reports_no_experts_leaves_the_load(tmp_path: Path) -> None:
    section = experts_section(load([make_run(tmp_path / "run", reports=False)]).arms)
    assert '<figure id="expert-load"' in section and '<figure id="expert-layer-load"' in section
    assert '<figure id="experts"' not in section and '<figure id="expert-layer-change-fraction"' not in section


def test_a_dense_run_has_no_section(tmp_path: Path) -> None:
    assert "Experts</h2>" not in render(load([make_run(tmp_path / "dense", routed=False)]))
    both = load([make_run(tmp_path / "plain", routed=False), make_run(tmp_path / "mixed")]).arms
    assert "mixed" in experts_section(both) and "plain" not in experts_section(both)
    assert experts_section([]) == ""
