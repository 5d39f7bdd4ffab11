"""The section on staleness: shown for runs that sample ahead, and for them alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.report.data import load
from betterhalf.report.page import render
from betterhalf.report.staleness import FIGURES, staleness_section
from betterhalf.run_dir import RunDir, append_jsonl


def make_run(path: Path, k3: Sequence[float] | None) -> RunDir:
    """Write a run with these values of `staleness/k3/mean`; None for a run without staleness."""
    run = RunDir.create(path, resume=False)
    for step, value in enumerate(k3 or (0.0,) * 4, start=1):
        row = {"step": step, "mismatch/k3/mean": 1e-7, "mismatch/ess_fraction": 0.999, "time/generate_seconds": 0.5}
        if k3 is not None:
            row |= {"staleness/k3/mean": value, "staleness/versions": float(value > 0), "time/ahead_seconds": 2.0}
            row["staleness/ess_fraction"] = 0.9
        append_jsonl(run.metrics, row)
    return run


def test_a_run_that_samples_ahead_has_all_figures_with_their_numbers(tmp_path: Path) -> None:
    page = render(load([make_run(tmp_path / "ahead", (0.0, 2e-4, 3e-4, 0.0))]))
    assert "<h2>Staleness</h2>" in page
    for spec in FIGURES:
        assert f'<figure id="{spec.key}"' in page
        for metric in spec.metrics:
            assert metric in CATALOGUE
            assert f"<code>{metric}</code>" in page
    assert "pipeline.max_staleness=1" in page
    assert "0.0003" in page


def test_other_runs_have_no_section(tmp_path: Path) -> None:
    assert "Staleness" not in render(load([make_run(tmp_path / "plain", None)]))
    assert staleness_section([]) == ""


def test_beside_a_run_without_overlap_only_the_one_with_it_is_drawn(tmp_path: Path) -> None:
    arms = load([make_run(tmp_path / "plain", None), make_run(tmp_path / "ahead", (0.0, 1e-4))]).arms
    section = staleness_section(arms)
    assert "ahead" in section and "plain" not in section


def test_a_run_whose_every_update_was_skipped_has_a_section_without_the_logarithmic_points(tmp_path: Path) -> None:
    section = staleness_section(load([make_run(tmp_path / "run", (0.0, 0.0, 0.0))]).arms)
    assert '<figure id="staleness-versions"' in section
