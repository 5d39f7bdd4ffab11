"""A sweep: cells are ordinary runs, an error or a kill of one leaves the others, and a resumed sweep is complete."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.grid import load_grid
from betterhalf.config.load import resolved_json
from betterhalf.config.schema import RunConfig
from betterhalf.run_dir import RunDir, read_json, read_jsonl, write_json_atomic
from betterhalf.runs.evaluate import evaluate
from betterhalf.runs.sweep import sweep
from betterhalf.runs.sweep_cell import evaluation_config
from betterhalf.runs.train import train

ROOT = Path(__file__).parents[2]
Ends = Callable[..., str]
Write = Callable[..., Path]

SMALL = """
device = "cpu"
logging.console = "quiet"
[task]
type = "arithmetic"
num_prompts = 64
[sampling]
max_tokens = 40
[training]
steps = 2
prompts_per_step = 2
group_size = 2
optimizer_steps = 1
"""
TWO_BY_TWO = """
[sweep]
seeds = [0, 1]
[sweep.axes]
precision = ["fp16", "bf16"]
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a sweep file from its text."""

    def file(*parts: str) -> Path:
        path = tmp_path / "small.sweep.toml"
        path.write_text(SMALL + "".join(parts), encoding="utf-8")
        return path

    return file


def without_times(path: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.startswith(("time/", "system/"))}
        for row in read_jsonl(path)
    ]


def test_every_cell_is_an_ordinary_run_with_its_row_and_curve(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    evaluated = ("sweep.evaluate=fp32", "sweep.evaluation_prompts=8", "sweep.keep_checkpoints=true")
    file, run = write(TWO_BY_TWO), tmp_path / "sweep"
    result = sweep(load_grid(file, evaluated), str(run))
    assert (result["cells"], result["finished"], result["failed"]) == (4, 4, {})
    rows = read_jsonl(run / "results.jsonl")
    assert [row["kind"] for row in rows] == ["sweep", *["cell"] * 4, *["combination"] * 2]
    assert result["combinations"] == rows[5:] and read_json(run / "summary.json")["cells"] == 4
    assert (run / "report.html").read_text(encoding="utf-8").count("<figure") > 4

    cell = load_grid(file, evaluated).cells[-1]
    assert cell.label == "precision=bf16,seed=1"
    train(cell.config, str(tmp_path / "alone"), resume=False)
    folder = run / "runs" / cell.label
    metrics = without_times(folder / "metrics.jsonl")
    assert metrics == without_times(tmp_path / "alone" / "metrics.jsonl") and len(metrics) == 2
    curve = read_jsonl(run / "curves.jsonl")[-1]
    assert curve["label"] == cell.label and len(curve["mismatch/k3/mean"]) == 2
    assert curve["mismatch/k3/mean"][1] == pytest.approx(metrics[1]["mismatch/k3/mean"], rel=5e-4)

    # The same accuracy as `betterhalf evaluate RUN precision=fp32` on the same prompts.
    settings = evaluation_config(cell.config).model_dump()
    settings["evaluate"] |= {"samples": 1, "max_prompts": 8}
    found = evaluate(str(folder), RunConfig.model_validate(settings), str(tmp_path / "evaluated"))
    assert rows[4]["accuracy"] == pytest.approx(found["avg@1"])

    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    assert sweep(load_grid(file, (*evaluated, "sweep.seeds=0,1,2")), str(run), resume=True)["finished"] == 6
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before


def test_checkpoints_of_finished_cells_are_removed(write: Write, tmp_path: Path) -> None:
    sweep(load_grid(write("[sweep]\nseeds = [5]\n")), str(tmp_path / "sweep"))
    cell = RunDir(tmp_path / "sweep").cell("seed=5")
    assert cell.summary.exists() and not cell.checkpoints.exists()


def test_a_failing_cell_and_a_stopped_one_are_results_and_the_others_run(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], ends: Ends
) -> None:
    levels = 'watchdog.levels = [{metric = "rollout/reward/mean", above = -1, action = "stop"}]'
    file = write(f"[sweep.axes.case]\nbroken = {{task.num_prompts = 32}}\nstops = {{{levels}}}\nfine = {{}}\n")
    run = RunDir(tmp_path / "sweep")
    grid = load_grid(file)
    broken = run.cell("case=broken")
    broken.path.mkdir(parents=True)
    for config, folder in ((grid.config, run), (grid.cells[0].config, broken)):
        write_json_atomic(folder.config, resolved_json(config))
    broken.metrics.write_text("not JSON\n{}\n", encoding="utf-8")

    ends(1, "sweep", file, f"run_dir={run.path}", "--resume", "--json")
    rows = {row["label"]: row for row in read_jsonl(run.results) if row["kind"] == "cell"}
    assert {label: row["outcome"] for label, row in rows.items()} == {
        "case=broken": "failed",
        "case=stops": "stopped",
        "case=fine": "short",
    }
    assert "line 1, is not a JSON object" in rows["case=broken"]["reason"]
    assert "the watchdog stopped the run in step 1" in rows["case=stops"]["reason"]
    assert read_json(run.summary)["failed"].keys() == {"case=broken"}

    broken.metrics.unlink()
    before = run.cell("case=stops").summary.stat().st_mtime_ns
    result = sweep(load_grid(file), str(run.path), resume=True)
    assert result["failed"] == {}
    assert result["finished"] == 3
    assert run.cell("case=stops").summary.stat().st_mtime_ns == before


def test_json_is_the_last_line_and_the_page_needs_the_two_result_files_alone(
    write: Write, tmp_path: Path, betterhalf: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    file, run = write(TWO_BY_TWO.replace("[0, 1]", "[0]")), tmp_path / "sweep"
    done = betterhalf("sweep", str(file), f"run_dir={run}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["finished"] == 2
    kept = tmp_path / "committed"
    kept.mkdir()
    for name in ("results.jsonl", "curves.jsonl"):
        shutil.copy(run / name, kept)
    assert betterhalf("report", str(kept)).returncode == 0
    ours, theirs = (folder.joinpath("report.html").read_text(encoding="utf-8") for folder in (kept, run))
    assert "Results by combination" in ours and ours.count("<figure") == theirs.count("<figure") > 2


def test_after_a_kill_of_a_worker_and_an_interrupt_a_resumed_sweep_is_complete(write: Write, tmp_path: Path) -> None:
    """Kill the worker in the first cell, and interrupt the sweep in the second."""
    axes = '[sweep]\nruns_at_once = 1\n[sweep.axes]\n"optimizer.learning_rate" = [1e-4, 2e-4]\n'
    file, run = write(axes), RunDir(tmp_path / "sweep")
    settings = ("training.steps=30", "training.checkpoint_every=1")
    command = [sys.executable, "-m", "betterhalf.cli", "sweep", str(file), f"run_dir={run.path}", *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    first, second = (run.cell(f"learning_rate={rate}") for rate in ("0.0001", "0.0002"))
    started = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(read_jsonl(first.metrics)) >= 3)
        os.kill(children_of(started.pid)[0], signal.SIGKILL)
        wait_for(lambda: len(read_jsonl(second.metrics)) >= 3)
        rows = [row for row in read_jsonl(run.results) if row["kind"] == "cell"]
        assert [(row["label"], row["outcome"]) for row in rows] == [("learning_rate=0.0001", "failed")]
        assert "SIGKILL" in rows[0]["reason"] and rows[0]["reason"].endswith("set sweep.runs_at_once=1.")
        started.send_signal(signal.SIGINT)
        _, errors = started.communicate(timeout=60)
        assert started.returncode == 130 and "--resume continues it" in errors
    finally:
        started.kill()
        started.wait(60)

    trained = [len(read_jsonl(cell.metrics)) for cell in (first, second)]
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for cell, steps in zip((first, second), trained, strict=True):
        rows = read_jsonl(cell.metrics)
        assert [row["step"] for row in rows] == list(range(1, 31)) and steps < 30
    assert [row["outcome"] for row in read_jsonl(run.results)[1:3]] != ["failed", "failed"]


def wait_for(happened: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            "precision = ['fp16']\n'precision.rollout_dtype' = ['bf16']",
            "the cell precision=fp16,rollout_dtype=bf16 cannot run",
        ),
        ("'training.group_size' = [1, 2]", "the cell group_size=1 cannot run"),
        ("'sampling.max_tokens' = [4, 40000]", "the cell max_tokens=40000 cannot run"),
        ("'training.optimizer_steps' = [1, 5]", "the cell optimizer_steps=5"),
        ("'task.type' = ['math']\n'task.path' = ['missing.jsonl']", "the cell task=math,path=missing.jsonl cannot run"),
        ("'model.name' = ['demo', 'missing/folder']", "the cell model=missing-folder cannot run"),
    ],
)
def test_a_cell_that_train_would_refuse_is_named_before_any_runs(
    write: Write, ends: Ends, tmp_path: Path, axes: str, message: str
) -> None:
    assert message in ends(2, "sweep", write(f"[sweep.axes]\n{axes}\n"), f"run_dir={tmp_path / 'sweep'}")
    assert not (tmp_path / "sweep").exists()


def test_an_evaluation_that_cannot_run_is_refused_before_any_training(write: Write, ends: Ends, tmp_path: Path) -> None:
    settings = ("sweep.evaluate=e8m3", "training.compile_layers=true", f"run_dir={tmp_path / 'sweep'}")
    words = ends(2, "sweep", write(TWO_BY_TWO), *settings)
    assert "its evaluation in sweep.evaluate=e8m3 cannot run: e8m3 is an emulated format, and compiled layers" in words
    assert not (tmp_path / "sweep").exists()


def test_a_folder_with_other_runs_is_refused(write: Write, ends: Ends, tmp_path: Path) -> None:
    run = tmp_path / "sweep"
    (run / "runs" / "precision=fp32,seed=0").mkdir(parents=True)
    words = ends(2, "sweep", write(TWO_BY_TWO), f"run_dir={run}")
    assert "precision=fp32,seed=0 is no cell of this sweep" in words and "another run_dir" in words
    shutil.rmtree(run)
    sweep(load_grid(write("[sweep]\nseeds = [0]\n")), str(run))
    assert "already holds a run" in ends(2, "sweep", write("[sweep]\nseeds = [0]\n"), f"run_dir={run}")
    changed = ends(2, "sweep", write("[sweep]\nseeds = [0]\n"), f"run_dir={run}", "--resume", "training.steps=3")
    assert "training.steps: 2 -> 3" in changed and "Restore the settings in the sweep file" in changed


def test_a_seed_left_out_stays_in_the_folder_and_comes_back_without_running(write: Write, tmp_path: Path) -> None:
    run, file = RunDir(tmp_path / "sweep"), write("[sweep]\nseeds = [0, 1]\n")

    def seeds(*overrides: str, resume: bool = True) -> list[int]:
        sweep(load_grid(file, overrides), str(run.path), resume=resume)
        return [row["seed"] for row in read_jsonl(run.results) if row["kind"] == "cell"]

    assert seeds(resume=False) == [0, 1]
    steps = run.cell("seed=1").metrics.stat().st_mtime_ns
    assert seeds("sweep.seeds=0") == [0] and run.cell("seed=1").summary.exists()
    assert seeds() == [0, 1] and run.cell("seed=1").metrics.stat().st_mtime_ns == steps


def test_an_unknown_metric_for_the_curves_is_refused(write: Write, ends: Ends) -> None:
    words = ends(2, "sweep", write(TWO_BY_TWO), "sweep.curves=mismatch/k3/men")
    assert "'mismatch/k3/men', which is no metric. Did you mean 'mismatch/k3/mean'?" in words
