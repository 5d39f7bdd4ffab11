"""A sweep: every cell of a grid is a run, several side by side; one table, one page.

cells -> checks of all of them -> worker processes -> a row for each run -> means over seeds -> page
"""

from __future__ import annotations

import time
from typing import Any

from betterhalf.config.grid import Cell, Grid
from betterhalf.config.load import resolved_json
from betterhalf.environment import environment
from betterhalf.metrics.cells import CellsView
from betterhalf.metrics.console import number, show_note
from betterhalf.report.page import write_report
from betterhalf.run_dir import RunDir, write_json_atomic
from betterhalf.runs.side_by_side import Job, plan_runs, run_jobs
from betterhalf.runs.sweep_cell import finished
from betterhalf.runs.sweep_checks import check_cells, check_curves, check_folders
from betterhalf.runs.sweep_results import cell_row, combination_rows, curve_row, head_row, line_of, write_rows
from betterhalf.runs.train import recorded_threads
from betterhalf.setup.folder import run_folder


def sweep(grid: Grid, run_dir: str | None, resume: bool = False) -> dict[str, Any]:
    """Run every cell of a grid, and write the results.

    Args:
        grid: the expanded sweep file; see `load_grid`.
        run_dir: the folder; `runs/sweep-<name>-<time>` by default.
        resume: keep the finished cells of the folder and continue the others; cells that failed run again.

    Returns:
        `cells`, `finished`, `failed` (label -> reason), `combinations` (one row each), `run_dir`; also in
        `summary.json`.

    Raises:
        InputError: a cell or the folder cannot be used; nothing has run.
        RunError: the disk is full.
    """
    check_curves(grid.config.sweep.curves)
    parameters = check_cells(grid.cells)
    with run_folder(run_dir, "sweep", grid.config.name, resume=resume) as run:
        check_folders(run.cells, grid.cells)
        return _sweep_in(run, grid, parameters)


def _sweep_in(run: RunDir, grid: Grid, parameters: int) -> dict[str, Any]:
    started = time.perf_counter()
    write_json_atomic(run.environment, environment())
    write_json_atomic(run.config, resolved_json(grid.config))
    results = _Results(run, grid)
    _run_cells(run, grid, parameters, results)
    summary = {
        "verb": "sweep",
        "name": grid.config.name,
        "cells": len(grid.cells),
        "finished": len(results.rows) - len(results.failures),
        "failed": results.failures,
        "combinations": combination_rows(results.in_order()),
        "seconds": time.perf_counter() - started,
        "run_dir": str(run.path),
    }
    write_json_atomic(run.summary, summary)
    write_report([run.path], run.report)
    return summary


class _Results:
    """Rows of the finished cells; `results.jsonl` and `curves.jsonl` are up to date after each."""

    def __init__(self, run: RunDir, grid: Grid) -> None:
        self._run, self._grid = run, grid
        self._head = head_row(grid)
        self._curves: dict[str, str] = {}  # lines, because a curve is long and written again after every cell
        self.rows: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        for cell in grid.cells:
            if finished(cell.config, run.cell(cell.label)):
                self._read(cell)
        self._write()

    def add(self, label: str, failure: str | None = None) -> dict[str, Any]:
        """Read the result of a cell that has ended, write all results, and return its row."""
        if failure is not None:
            self.failures[label] = failure
        self._read(next(cell for cell in self._grid.cells if cell.label == label), failure)
        self._write()
        return self.rows[label]

    def in_order(self) -> list[dict[str, Any]]:
        """Return the rows in the order of the grid."""
        return [self.rows[cell.label] for cell in self._grid.cells if cell.label in self.rows]

    def _read(self, cell: Cell, failure: str | None = None) -> None:
        settings, run = self._grid.config.sweep, self._run.cell(cell.label)
        if row := cell_row(cell, run, settings.window, failure):
            self.rows[cell.label] = row
            curve = None if failure else curve_row(cell, run, settings.curves)
            self._curves[cell.label] = line_of(curve) if curve else ""

    def _write(self) -> None:
        rows = self.in_order()
        curves = [self._curves[row["label"]] for row in rows]
        write_rows(self._run, [self._head, *rows, *combination_rows(rows)], curves)


def _run_cells(run: RunDir, grid: Grid, parameters: int, results: _Results) -> None:
    """Run the cells that have no result yet, in worker processes; an error of one cell does not end the others."""
    settings, mode = grid.config.sweep, grid.config.logging.console
    left = [cell for cell in _by_seed(grid) if cell.label not in results.rows]
    # Planned for all cells, not for those left on a resume: a cell keeps its number of threads, and so its bits.
    wanted, key = settings.runs_at_once, "sweep.runs_at_once"
    plan = plan_runs(grid.config, len(grid.cells), parameters, wanted=wanted, key=key)
    if left:
        show_note(plan.described([cell.label for cell in left], "runs"), mode=mode)
    steps = {cell.label: cell.config.training.steps for cell in left}
    with CellsView(mode, steps=steps, total=len(grid.cells)) as view:

        def ended(job: Job, error: Exception | None = None) -> None:
            row = results.add(job.name, None if error is None else str(error))
            view.finish(job.name, _words(row))

        run_jobs(
            [_job(run, cell, plan.threads) for cell in left],
            lambda job, event: view.show(job.name, event),
            at_once=plan.at_once,
            limit_key=key,
            failed=ended,
            finished=ended,
        )


def _by_seed(grid: Grid) -> list[Cell]:
    """Return the cells in the order of running: all combinations with the first seed, then with the next."""
    seeds = list(grid.config.sweep.seeds or (grid.config.seed,))
    return sorted(grid.cells, key=lambda cell: seeds.index(cell.config.seed))


def _job(run: RunDir, cell: Cell, threads: int) -> Job:
    folder = run.cell(cell.label)
    return Job(
        kind="cell",
        name=cell.label,
        config=cell.config,
        folder=folder.path,
        threads=recorded_threads(folder) or threads,
    )


def _words(row: dict[str, Any]) -> str:
    """Describe the result of a cell in one line."""
    if row["outcome"] == "failed":
        return f"failed: {row['reason']}"
    accuracy = f", accuracy {number(row['accuracy'], '.3f')}" if "accuracy" in row else ""
    return f"{row['outcome']}, final reward {number(row.get('reward_final'), '.3f')}{accuracy}, {row['seconds']:.0f} s"
