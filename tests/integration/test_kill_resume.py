"""A run that is killed at any moment ends, after `--resume`, with the weights and the rows of one that never stopped.

RUN_SLOW=1 adds eighteen more moments.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from betterhalf import cli
from betterhalf.run_dir import RunDir, read_jsonl

ROOT = Path(__file__).parents[2]
STEPS = 6
OVERRIDES = (
    f"training.steps={STEPS}",
    "training.checkpoint_every=2",
    "training.prompts_per_step=2",
    "training.group_size=4",
    "sampling.max_tokens=40",
    "evaluate.every=3",
    "evaluate.max_prompts=2",
    "evaluate.samples=2",
    "algorithm.kl.coefficient=0.01",
    "algorithm.kl.refresh_every=3",
    "logging.console=quiet",
)
Start = Callable[..., BaseProcess]
MOMENTS = [pytest.param(seed, marks=[pytest.mark.slow] if seed >= 2 else []) for seed in range(20)]


@dataclass(frozen=True)
class Whole:
    """A run that never stopped."""

    run: RunDir
    seconds: float
    """Time from the appearance of its folder to its end."""


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start the demo run in a process of its own, with one thread; a server has loaded the libraries for all of them.

    The server is a process of its own, so that a killed run shares nothing with this one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["betterhalf.runs.train", "betterhalf.cli"])

        def one(folder: Path, *more: str) -> BaseProcess:
            arguments = ["train", str(ROOT / "experiments/smoke/demo.toml"), *OVERRIDES, f"run_dir={folder}", *more]
            process = context.Process(target=cli.main, args=(arguments,))
            process.start()
            return process

        yield one


def finish(run: RunDir, process: BaseProcess) -> None:
    """Wait for the end of a run, which must have succeeded."""
    process.join(240)
    assert not process.is_alive()
    assert run.summary.exists()


def appeared(run: RunDir, process: BaseProcess) -> float:
    """Wait until the run has its folder, and return the time."""
    while not run.path.exists():
        assert process.is_alive()
        time.sleep(0.005)
    return time.monotonic()


@pytest.fixture(scope="module")
def whole(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Run once without a stop."""
    run = RunDir(tmp_path_factory.mktemp("whole") / "run")
    process = start(run.path)
    began = appeared(run, process)
    finish(run, process)
    return Whole(run, time.monotonic() - began)


def content(run: RunDir) -> dict[str, Any]:
    """Return everything that a run records, without times and the state of the machine."""
    timed = ("time/", "system/")
    found: dict[str, Any] = {}
    for path in (run.metrics, run.evaluated_steps, run.mismatch, run.rollouts, run.watchdog):
        rows = read_jsonl(path) if path.exists() else []
        found[path.name] = [{key: row[key] for key in row if not key.startswith(timed)} for row in rows]
    for path in sorted(run.checkpoints.rglob("*.safetensors")):
        found[str(path.relative_to(run.path))] = path.read_bytes()
    found["state"] = [json.loads(path.read_text()) for path in sorted(run.checkpoints.rglob("state.json"))]
    found["folders"] = sorted(path.name for path in run.checkpoints.iterdir())
    return found


@pytest.mark.parametrize("seed", MOMENTS)
def test_a_run_killed_at_a_random_moment_resumes_bit_for_bit(
    seed: int, start: Start, whole: Whole, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    victim = start(run.path)
    began = appeared(run, victim)
    moment = began + random.Random(seed).random() * whole.seconds
    time.sleep(max(0.0, moment - time.monotonic()))
    victim.kill()
    victim.join()
    run.summary.unlink(missing_ok=True)

    # Killed before its first file, it is a new run.
    finish(run, start(run.path, *(["--resume"] if run.holds_run else [])))
    expected, found = content(whole.run), content(run)
    assert len(expected["metrics.jsonl"]) == STEPS
    assert {name for name in expected if expected[name] != found.get(name)} == set()
    assert found.keys() == expected.keys()
