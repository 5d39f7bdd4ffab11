"""A cluster that cannot be used is refused with status 2 and the fix, before a process starts or a weight is read."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from betterhalf.cli import entry as cli
from betterhalf.errors import InputError
from betterhalf.run_lock import run_lock

SMOKE = str(Path(__file__).parents[2] / "experiments" / "smoke" / "demo.toml")
RAY = "cluster.backend=ray"
Ends = Callable[..., str]


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a process of the cluster starts, or weights are loaded in this one; Ray need not be installed."""
    monkeypatch.setattr("betterhalf.cluster.ray_start.require_ray", lambda: None)
    monkeypatch.setattr("betterhalf.cluster.ray_start.use_token", lambda: None)
    monkeypatch.setattr("betterhalf.cluster.build.open_session", lambda cluster: pytest.fail("too late"))
    monkeypatch.setattr("betterhalf.cluster.build.load_weights", lambda described: pytest.fail("too late"))


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((RAY, "cluster.address=127.0.0.1:1"), "no Ray cluster answers at 127.0.0.1:1"),
        ((RAY, "cluster.address=ray://127.0.0.1:1"), "set cluster.address=auto"),
        ((RAY, "cluster.address=nonsense"), "is not an address"),
        ((RAY, "cluster.trainers=2", "cluster.trainer.gpus=1"), "need 2 GPUs, and this host has 0"),
        ((RAY, "cluster.engines=0"), "cluster.engines"),
        ((RAY, "cluster.trainers=0"), "cluster.trainers"),
        ((RAY, "cluster.trainers=65"), "exceeds the 64 rollouts of an optimizer step"),
        (
            (RAY, "cluster.trainers=2000", "training.prompts_per_step=4000"),
            "so some ranks would hold no part of any layer",
        ),
        ((RAY, "cluster.engines=1000"), "cluster.engines=1000 exceeds the"),
        ((RAY, "cluster.engine.cpus=1000"), "cluster.engine.cpus=1000, and this host has"),
        ((RAY, "cluster.placement=colocated", "cluster.engines=2"), "exceeds cluster.trainers=1"),
        ((RAY, "device=cuda"), "no process would see a GPU"),
        ((RAY, "cluster.transfer=nccl"), "Give ranks and engines GPUs, or set cluster.transfer=auto"),
        (("cluster.transfer=ipc",), "needs cluster.backend=ray"),
        (("cluster.trainers=2",), "needs cluster.backend=ray"),
        (("pipeline.max_staleness=1",), "Set cluster.backend=ray"),
    ],
)
def test_a_cluster_that_cannot_be_used_is_refused_early(
    settings: tuple[str, ...], message: str, ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    run = tmp_path / "run"
    assert message in ends(2, "train", SMOKE, *settings, f"run_dir={run}")
    assert not run.exists()


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("verb", ["sanity", "sweep"])
def test_a_cluster_that_cannot_be_used_is_refused_before_the_first_of_several_runs(
    verb: str, ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("betterhalf.runs.sweep.run_jobs", lambda *some, **more: pytest.fail("too late"))
    file = tmp_path / "small.sweep.toml"
    file.write_text(f'extends = "{SMOKE}"\n[sweep.axes]\nprecision = ["fp16", "bf16"]\n')
    run = tmp_path / "run"
    words = ends(2, verb, file if verb == "sweep" else SMOKE, RAY, "cluster.engine.cpus=1000", f"run_dir={run}")
    assert "cluster.engine.cpus=1000, and this host has" in words
    assert ("the cell precision=fp16 cannot run" in words) == (verb == "sweep")
    assert not run.exists()


def test_ray_that_is_missing_is_named_with_its_extra(
    ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec

    def without_ray(name: str, *more: Any) -> Any:
        return None if name == "ray" else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without_ray)
    monkeypatch.setattr("betterhalf.cluster.build.load_weights", lambda described: pytest.fail("too late"))
    assert "scripts/install --ray" in ends(2, "train", SMOKE, RAY, f"run_dir={tmp_path / 'run'}")


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize(("mode", "shown"), [("lines", True), ("quiet", False)])
def test_what_starts_is_said_before_it_starts(
    mode: str, shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(cluster: object) -> None:
        raise InputError("refused")

    monkeypatch.setattr("betterhalf.cluster.build.open_session", refuse)
    run = f"run_dir={tmp_path / 'run'}"
    assert cli.main(["train", SMOKE, RAY, "cluster.engines=2", f"logging.console={mode}", run]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        ("starting 1 rank and 2 engines on a Ray of this run\n" if shown else "") + "error: refused\n",
    )


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize("backend", ["local", "ray"])
def test_a_run_that_is_in_progress_is_not_continued(backend: str, ends: Ends, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    with run_lock(run):
        message = ends(2, "train", SMOKE, f"cluster.backend={backend}", f"run_dir={run}", "--resume")
    assert f"another process works in {run}: pid {os.getpid()}" in message


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize(
    ("verb", "file", "resume", "message"),
    [
        ("train", "metrics.jsonl", False, "already holds a run. Continue it with --resume"),
        ("train", "notes.txt", True, "holds no run to resume"),
        ("sanity", "config.json", False, "already holds a run"),
        ("sanity", "notes.txt", True, "holds no run to resume"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_before_anything_starts(
    verb: str, file: str, resume: bool, message: str, ends: Ends, tmp_path: Path
) -> None:
    (tmp_path / file).write_text("")
    assert message in ends(2, verb, SMOKE, RAY, f"run_dir={tmp_path}", *(["--resume"] if resume else []))
    assert [path.name for path in tmp_path.iterdir()] == [file]
