"""SIGTERM ends a run as Ctrl-C does: finished work stays, everything that was started ends, and a message says so."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.processes import abandoned_memory, descendants, left_after, shared_memory

from betterhalf.run_dir import RunDir, read_jsonl

ROOT = Path(__file__).parents[2]
TINY = (
    *("training.steps=100000", "training.prompts_per_step=2", "training.group_size=2", "training.optimizer_steps=1"),
    *("sampling.max_tokens=8", "logging.console=quiet"),
)
SECONDS = 30.0
"""Time within which every process must have ended."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for the run and for temporary files, whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="bh", dir="/tmp") as path:
        yield Path(path)


def ended_by_sigterm(
    verb: str, folder: Path, begun: Callable[[], bool], *settings: str, group: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a verb until it has begun, end it or its process group by SIGTERM, and check that no process is left."""
    before = shared_memory()
    command = [sys.executable, "-m", "betterhalf.cli", verb, str(ROOT / "experiments/smoke/demo.toml"), *TINY]
    process = subprocess.Popen(
        [*command, *settings, f"run_dir={folder / 'run'}", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None and not begun():
        time.sleep(0.05)
    in_time, pids = begun(), descendants(process.pid)
    (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert left_after(pids, SECONDS) == set()
    assert abandoned_memory(before, SECONDS) == set()
    assert in_time, err
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def have_rows(*files: Path) -> Callable[[], bool]:
    """Return a function that says whether each of these files has a row."""
    return lambda: all(map(read_jsonl, files))


def require_ended_as_by_ctrl_c(ended: subprocess.CompletedProcess[str], folder: Path) -> None:
    words = f"ended by SIGTERM; finished work is in {folder / 'run'}; --resume continues it"
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (143, f"error: {words}")
    assert json.loads(ended.stdout.splitlines()[-1]) == {"error": words, "exit_status": 143}
    assert list(folder.rglob(".lock")) == []


def test_a_run_in_one_process(folder: Path) -> None:
    run = RunDir(folder / "run")
    require_ended_as_by_ctrl_c(ended_by_sigterm("train", folder, have_rows(run.metrics)), folder)


def test_arms_side_by_side(folder: Path) -> None:
    run = RunDir(folder / "run")
    settings = ("sanity.candidates=4", "sanity.samples=2", "sanity.lower=0", "sanity.upper=1", "sanity.arms_at_once=2")
    rows = have_rows(run.arm("fp16").metrics, run.arm("bf16").metrics)
    require_ended_as_by_ctrl_c(ended_by_sigterm("sanity", folder, rows, *settings), folder)


@pytest.mark.extra
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray; scripts/install --ray")
@pytest.mark.parametrize("group", [False, True], ids=["controller", "group"])  # `timeout` signals the group
def test_a_run_on_a_ray_of_its_own(group: bool, folder: Path) -> None:
    run = RunDir(folder / "run")
    settings = ("cluster.backend=ray", "cluster.trainers=2")
    ended = ended_by_sigterm("train", folder, have_rows(run.metrics), *settings, group=group)
    require_ended_as_by_ctrl_c(ended, folder)
    assert [path.name for path in folder.iterdir() if path.name.startswith("betterhalf-")] == []


@pytest.mark.extra
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray; scripts/install --ray")
def test_a_run_whose_ray_is_starting(folder: Path) -> None:
    def begun() -> bool:
        return any(folder.glob("betterhalf-ray-*/session_*/logs/gcs_server*"))

    ended = ended_by_sigterm("train", folder, begun, "cluster.backend=ray")
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (143, "error: ended by SIGTERM")
    assert [path.name for path in folder.iterdir() if path.name.startswith(("betterhalf-", "run"))] == []
