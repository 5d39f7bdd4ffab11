"""The demo on ranks and engines under Ray: the numbers of one process, also when one of the processes is killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.processes import abandoned_memory, descendants, left_after, shared_memory

from betterhalf.cluster import session
from betterhalf.cluster.trainer_group import TrainerGroup
from betterhalf.config.schema import RunConfig
from betterhalf.errors import ClusterError
from betterhalf.rollout.pool import EnginePool
from betterhalf.run_dir import RunDir, read_jsonl
from betterhalf.runs.train import train

pytestmark = pytest.mark.extra
pytest.importorskip("ray", reason="needs Ray; scripts/install --ray")

ROOT = Path(__file__).parents[2]
RAY = {"backend": "ray", "trainers": 2, "engines": 2, "start_seconds": 300.0}
SETTINGS: dict[str, Any] = {
    "name": "demo",
    "device": "cpu",
    "precision": {"preset": "fp32"},
    "task": {"type": "arithmetic", "num_prompts": 64},
    "sampling": {"max_tokens": 40},
    "training": {
        "steps": 5,
        "prompts_per_step": 4,
        "group_size": 4,
        "optimizer_steps": 2,
        "checkpoint_every": 2,
        "keep_checkpoints": 5,
        "tokens_per_micro_batch": 160,
    },
    # A loss of advantages alone is a sum near zero of terms near one, whose relative error means nothing.
    "algorithm": {"entropy_coefficient": 1.0},
    "optimizer": {"learning_rate": 3e-4},
    "logging": {"console": "quiet", "rollouts_per_step": 16},
}
SECONDS = 30.0
"""Time within which every process must have ended."""


@dataclass(frozen=True)
class Done:
    """Rows of a finished run."""

    metrics: list[dict[str, Any]]
    rollouts: list[dict[str, Any]]
    folder: Path

    @property
    def losses(self) -> list[float]:
        return [row["policy/loss"] for row in self.metrics]

    @property
    def completions(self) -> list[list[int]]:
        return [row["token_ids"] for row in self.rollouts]


Train = Callable[..., Done]


def demo(folder: Path, *, resume: bool = False, **changes: Any) -> Done:
    """Run or continue the demo, and check that no process and no shared memory stays."""
    before, children = shared_memory(), descendants(os.getpid())
    started: set[int] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            started.update(descendants(os.getpid()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        train(RunConfig.model_validate(SETTINGS | changes), str(folder), resume=resume)
    finally:
        done.set()
        watcher.join()
        assert left_after(started - children, SECONDS) == set()
        assert abandoned_memory(before, SECONDS) == set()
    run = RunDir(folder)
    timed = ("time/", "system/")
    rows = [{key: row[key] for key in row if not key.startswith(timed)} for row in read_jsonl(run.metrics)]
    return Done(rows, read_jsonl(run.rollouts), folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Train in one process."""
    return demo(tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Train on two ranks and two engines."""
    return demo(tmp_path_factory.mktemp("spread") / "run", cluster=RAY)


def test_two_ranks_and_two_engines_train_as_one_process_does(alone: Done, spread: Done) -> None:
    assert spread.completions == alone.completions
    assert spread.losses == pytest.approx(alone.losses, rel=1e-6)
    # Adam's division amplifies rounding in weights whose gradient is nearly zero, and later gradients show it.
    norms = [[row["optim/grad_norm"] for row in run.metrics] for run in (alone, spread)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    rewards = [[row["rollout/reward/mean"] for row in run.metrics] for run in (alone, spread)]
    assert rewards[1] == rewards[0]
    assert max(row["mismatch/k3/mean"] for row in spread.metrics) < 1e-11


def test_in_fp16_an_overflow_skips_the_same_steps_and_the_mismatch_is_that_of_one_process(tmp_path: Path) -> None:
    changes = {
        "precision": {"preset": "fp16", "loss_scale": {"initial": 2.0**34}},
        "training": SETTINGS["training"] | {"steps": 3},
    }
    alone, spread = demo(tmp_path / "alone", **changes), demo(tmp_path / "spread", **changes, cluster=RAY)
    for name in ("optim/skipped", "optim/loss_scale", "policy/version"):
        assert [row[name] for row in spread.metrics] == [row[name] for row in alone.metrics]
    assert sum(row["optim/skipped"] for row in spread.metrics) > 0
    for one, other in zip(alone.metrics, spread.metrics, strict=True):
        assert 0.5 < other["mismatch/k3/mean"] / one["mismatch/k3/mean"] < 2


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[int]]]:
    """Return a function that lets a process be killed during a call, and returns the list of killed processes."""

    def during(kind: type, method: str, number: int, victim: Callable[[Any], Any]) -> list[int]:
        real, calls, pids = getattr(kind, method), 0, list[int]()

        def call(subject: Any, *arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                pids.append(victim(subject)._about.pid)
                threading.Timer(0.01, os.kill, (pids[0], signal.SIGKILL)).start()
            return real(subject, *arguments, **keywords)

        monkeypatch.setattr(kind, method, call)
        return pids

    yield during


def test_a_killed_engine_is_replaced_and_the_run_goes_on_with_the_same_numbers(
    spread: Done, killed: Callable[..., list[int]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pids = killed(EnginePool, "generate", 3, lambda pool: pool._engines[1]._process)
    found = demo(tmp_path / "run", cluster=RAY)
    assert len(pids) == 1
    assert "engine 1" in capfd.readouterr().err
    restarts = [row.pop("rollout/engine_restarts") for row in found.metrics]
    assert sum(restarts) == 1
    expected = [{key: row[key] for key in row if key != "rollout/engine_restarts"} for row in spread.metrics]
    assert found.metrics == expected
    assert found.rollouts == spread.rollouts


def test_a_killed_rank_restarts_all_from_the_checkpoint_and_the_numbers_stay(
    spread: Done, killed: Callable[..., list[int]], tmp_path: Path
) -> None:
    # The seventh of two in each step: the fourth step, after the checkpoint of the second.
    pids = killed(TrainerGroup, "forward_backward", 7, lambda group: group._ranks[1])
    found = demo(tmp_path / "run", cluster=RAY)
    assert len(pids) == 1
    assert found.completions == spread.completions
    assert found.losses == pytest.approx(spread.losses, rel=1e-6)
    assert [row["step"] for row in found.metrics] == [1, 2, 3, 4, 5]
    assert [row["optim/rank_restarts"] for row in found.metrics] == [0, 0, 0, 1, 0]
    assert "ranks restarted" in RunDir(tmp_path / "run").report.read_text()
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == len(
        list((spread.folder / "checkpoints").iterdir())
    )


@pytest.mark.parametrize(("written", "ranks"), [("spread", 1), ("spread", 3), ("alone", 2)])
def test_a_checkpoint_is_continued_by_another_number_of_ranks(
    written: str, ranks: int, alone: Done, spread: Done, tmp_path: Path
) -> None:
    source = {"alone": alone, "spread": spread}[written]
    run = tmp_path / "run"
    shutil.copytree(source.folder, run)
    shutil.rmtree(run / "checkpoints" / "step-000005")
    cluster = {} if ranks == 1 else RAY | {"trainers": ranks, "engines": 1}
    found = demo(run, resume=True, cluster=cluster)
    assert found.metrics[:4] == source.metrics[:4]
    assert found.completions == source.completions
    assert found.losses == pytest.approx(source.losses, rel=1e-6)


def test_a_run_whose_cluster_is_lost_ends_with_what_is_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, calls = TrainerGroup.forward_backward, 0

    def lose(group: TrainerGroup, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            from ray._private import worker

            worker._global_node.all_processes["gcs_server"][0].process.kill()
            # Ranks and engines need no head to answer: without a wait the step could end before the loss is noticed.
            time.sleep(5 * session._WATCH_SECONDS)
        return real(group, *arguments)

    monkeypatch.setattr(TrainerGroup, "forward_backward", lose)
    with pytest.raises(ClusterError, match=r"cluster was lost.*--resume"):
        demo(tmp_path / "run", cluster=RAY | {"engines": 1})
    run = RunDir(tmp_path / "run")
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000002"]


KILLS = int(os.environ.get("CONTROLLER_KILLS", "20"))
"""Number of random moments at which the controller is killed with RUN_SLOW=1; without it, one."""

MOMENTS = [pytest.param(seed, marks=[pytest.mark.slow] if seed else []) for seed in range(KILLS)]


@pytest.mark.parametrize("seed", MOMENTS)
def test_the_processes_of_a_killed_controller_end_and_the_run_resumes_bit_for_bit(
    seed: int, spread: Done, tmp_path: Path
) -> None:
    before = shared_memory()
    config = tmp_path / "demo.toml"
    config.write_text(_toml({**SETTINGS, "cluster": RAY}))
    command = [sys.executable, "-m", "betterhalf.cli", "train", str(config), f"run_dir={tmp_path / 'run'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = RunDir(tmp_path / "run")
    victim = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    draw = random.Random(seed)
    rows = draw.randrange(1, 5)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (run.metrics.exists() and len(read_jsonl(run.metrics)) >= rows):
        time.sleep(0.01)
    time.sleep(draw.random() * 0.5)
    pids = descendants(victim.pid)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert left_after(pids, SECONDS) == set()
    assert abandoned_memory(before, SECONDS) == set()
    subprocess.run([*command, "--resume"], env=environment, check=True, capture_output=True, timeout=400)
    timed = ("time/", "system/")
    found = [{key: row[key] for key in row if not key.startswith(timed)} for row in read_jsonl(run.metrics)]
    assert found == spread.metrics
    assert read_jsonl(run.rollouts) == spread.rollouts
    expected = sorted(path.relative_to(spread.folder) for path in spread.folder.rglob("*.safetensors"))
    assert expected == sorted(path.relative_to(run.path) for path in run.path.rglob("*.safetensors"))
    for path in expected:
        assert (run.path / path).read_bytes() == (spread.folder / path).read_bytes(), path


def _toml(values: dict[str, Any]) -> str:
    """Write nested tables of numbers and words as TOML."""
    plain = [f"{key} = {_value(value)}" for key, value in values.items() if not isinstance(value, dict)]
    tables = [f"[{key}]\n{_toml(value)}" for key, value in values.items() if isinstance(value, dict)]
    return "\n".join([*plain, *tables]) + "\n"


def _value(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
