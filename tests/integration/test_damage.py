"""Damaged checkpoints, full disks, wrong folders: each verb names the fix, and keeps everything that was written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.integration.conftest import ONE_STEP, SMOKE

from betterhalf import cli, run_dir
from betterhalf.models import loading
from betterhalf.run_dir import RunDir, read_jsonl
from betterhalf.tasks.rewards import TextGrader
from betterhalf.training import shards

ROOT = Path(__file__).parents[2]
DEMO_MODEL = Path(loading.__file__).parent / "demo"

Ends = Callable[..., str]


def steps_in(run: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(run / "metrics.jsonl")]


# -- the files of a run


@pytest.fixture
def two_checkpoints(train: Ends, tmp_path: Path) -> Path:
    train(0, "training.steps=2", "training.checkpoint_every=1")
    return tmp_path / "run"


def test_a_corrupted_checkpoint_is_named_with_the_older_one(two_checkpoints: Path, train: Ends, ends: Ends) -> None:
    weights = two_checkpoints / "checkpoints" / "step-000002" / "model.safetensors"
    whole, rows = weights.read_bytes(), read_jsonl(two_checkpoints / "metrics.jsonl")
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    resume = ("training.steps=2", "training.checkpoint_every=1", "--resume")
    for message in (
        train(2, *resume),
        ends(2, "evaluate", two_checkpoints, f"run_dir={two_checkpoints.parent / 'evaluation'}"),
        ends(2, "export", two_checkpoints, two_checkpoints.parent / "exported"),
    ):
        assert "step-000002 is corrupted (model.safetensors has another checksum than when it was written)" in message
        assert "delete that folder to resume from step-000001" in message
    assert [path.name for path in two_checkpoints.parent.iterdir()] == ["run"]
    assert read_jsonl(two_checkpoints / "metrics.jsonl") == rows

    shutil.rmtree(weights.parent)
    train(0, *resume)
    assert weights.read_bytes() == whole


def test_a_damaged_checkpoint_is_refused_before_weights_are_loaded(
    train: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(0)
    (weights,) = tmp_path.glob("run/checkpoints/*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setattr("betterhalf.cluster.build.load_weights", lambda described: pytest.fail("too late"))
    assert "model.safetensors" in train(2, "--resume")


def test_files_that_were_tampered_with_are_named(two_checkpoints: Path, train: Ends, ends: Ends) -> None:
    resume = ("training.steps=2", "training.checkpoint_every=1", "--resume")
    metrics, config = two_checkpoints / "metrics.jsonl", two_checkpoints / "config.json"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(lines[0])
    message = train(2, *resume)
    assert "holds 1 of the 2 steps before the checkpoint; restore it, or delete" in message
    metrics.write_text("".join(["not JSON\n", *lines]))
    assert "line 1, is not a JSON object" in train(2, *resume)
    metrics.write_text("".join(lines))
    config.write_text(config.read_text()[:100])
    assert "config.json is not valid JSON" in train(2, *resume)
    config.write_text('{"trianing": {"steps": 2}}')
    for message in (train(2, *resume), ends(2, "evaluate", two_checkpoints)):
        assert "Did you mean 'training.steps'?" in message and "config.json" in message


@pytest.mark.parametrize("backend", ["local", "ray"])
def test_a_checkpoint_of_another_model_is_refused_with_both_shapes_before_weights_are_read(
    backend: str, train: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    train(0, f"model={model}")
    _shrink(model)
    monkeypatch.setattr("betterhalf.cluster.build.load_weights", lambda described: pytest.fail("too late"))
    monkeypatch.setattr("betterhalf.cluster.build.open_session", lambda cluster: pytest.fail("too late"))
    message = train(2, f"model={model}", f"cluster.backend={backend}", "--resume")
    size = json.loads((model / "config.json").read_text())
    width, half = size["hidden_size"], size["intermediate_size"]
    assert "step-000001 holds another shape of parameter 'model.layers.0.mlp.down_proj.weight' than model" in message
    assert f"[{width}, {2 * half}] and [{width}, {half}] (" in message and "made by another model" in message


@pytest.mark.parametrize("backend", ["local", "ray"])
def test_a_run_with_another_configuration_is_refused_with_every_difference_before_anything_starts(
    backend: str, train: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(0)
    monkeypatch.setattr("betterhalf.runs.train.assemble", lambda *some, **more: pytest.fail("too late"))
    settings = ("precision=bf16", "optimizer.learning_rate=0.5", f"cluster.backend={backend}")
    message = train(2, *settings, "--resume")
    assert "was started with another configuration" in message
    assert 'precision.preset: "fp16" -> "bf16"' in message and "optimizer.learning_rate: 0.0002 -> 0.5" in message
    assert "cluster" not in message


def _shrink(model: Path) -> None:
    """Halve the width of the model's MLP."""
    config = json.loads((model / "config.json").read_text())
    half = config["intermediate_size"] // 2
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": half}))
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        if "gate_proj" in name or "up_proj" in name:
            weights[name] = weight[:half].contiguous()
        if "down_proj" in name:
            weights[name] = weight[:, :half].contiguous()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


# -- the disk


class FullDisk:
    """A disk that is full at one write of a run, and has space again afterwards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, full_at: int) -> None:
        self.writes, self._full_at = 0, full_at
        for module, name in ((run_dir, "_write_or_undo"), (run_dir, "_temporary_beside"), (shards, "write_file")):
            monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.writes += 1
            if self.writes == self._full_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(*arguments)

        return call


FEW = ("training.steps=2", "training.checkpoint_every=1")
SOME_WRITES = (1, 6, 8, 11, 14)
"""Writes of two steps that run by default: contract, metrics, completions, weights of a checkpoint, summary."""


def _numbers(run: Path) -> list[dict[str, Any]]:
    timed = ("time/", "system/")
    return [{key: row[key] for key in row if not key.startswith(timed)} for row in read_jsonl(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], int]:
    """Rows of a run on a disk with space, and the number of its writes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        disk = FullDisk(patch, 0)
        assert cli.main(["train", SMOKE, *ONE_STEP, *FEW, f"run_dir={folder}"]) == 0
    return _numbers(folder), disk.writes


@pytest.mark.parametrize(
    "write", [pytest.param(n, marks=[] if n in SOME_WRITES else [pytest.mark.slow]) for n in range(1, 41)]
)
def test_a_disk_that_is_full_at_any_write_loses_nothing_and_resume_ends_alike(
    write: int,
    undisturbed: tuple[list[dict[str, Any]], int],
    train: Ends,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, writes = undisturbed
    if write > writes:
        pytest.skip(f"the run writes {writes} times")
    with monkeypatch.context() as patch:
        FullDisk(patch, write)
        message = train(3, *FEW)
    assert "disk" in message and "--resume" in message
    train(0, *FEW, *(["--resume"] if RunDir(tmp_path / "run").holds_run else []))
    assert _numbers(tmp_path / "run") == expected


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Make writes beyond `size` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_does_not_fit_loses_nothing_and_the_run_goes_on(train: Ends, tmp_path: Path) -> None:
    with file_size_limit(2**20):
        message = train(3)
    assert "step-000001 cannot be written" in message and "continue with --resume" in message
    assert "File too large" in message and "file size limit" in message and "free disk space" not in message
    assert steps_in(tmp_path / "run") == [1]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    train(0, "--resume")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]


def test_metrics_that_do_not_fit_keep_the_rows_before(
    train: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fill the disk at the second row of metrics."""
    write, metrics = os.write, tmp_path / "run" / "metrics.jsonl"

    def full(fd: int, data: bytes) -> int:
        if b"optim/loss_scale" in data and metrics.stat().st_size:
            write(fd, data[:20])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    two = ("training.steps=2", "training.checkpoint_every=1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        message = train(3, *two)
    assert "disk is full" in message and "metrics.jsonl" in message and "--resume" in message
    assert steps_in(tmp_path / "run") == [1]
    first = metrics.read_bytes()
    train(0, *two, "--resume")
    assert steps_in(tmp_path / "run") == [1, 2]
    assert metrics.read_bytes().startswith(first)


def test_a_disk_that_is_really_full_says_so(tmp_path: Path) -> None:
    """Run two steps on a file system of 8 MiB, which one checkpoint with its optimizer states nearly fills."""
    script = f"""
        mount -t tmpfs -o size=8m tmpfs {tmp_path} || exit 77
        {sys.executable} -m betterhalf.cli train {ROOT}/experiments/smoke/demo.toml run_dir={tmp_path}/run \
            logging.console=quiet training.steps=2 training.prompts_per_step=4 training.checkpoint_every=1
        status=$?
        find {tmp_path}/run | sort
        wc -l < {tmp_path}/run/metrics.jsonl
        exit $status
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("needs a user namespace that may mount")
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "step-000002 cannot be written" in done.stderr and "--resume" in done.stderr
    assert f"{tmp_path}/run/checkpoints/step-000001/manifest.json" in done.stdout
    assert "step-000002" not in done.stdout
    assert done.stdout.split()[-1] == "2"


# -- the other verbs


def test_evaluate_and_export_of_a_run_without_a_checkpoint(train: Ends, ends: Ends, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextGrader, "rewards", lambda *_: [])
        train(3)
    for message in (
        ends(2, "evaluate", tmp_path / "run", f"run_dir={tmp_path / 'evaluation'}"),
        ends(2, "export", tmp_path / "run", tmp_path / "exported"),
    ):
        assert "has no checkpoint yet; let it reach one" in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_evaluate_of_an_unknown_model_leaves_nothing(ends: Ends, tmp_path: Path) -> None:
    run_dir = f"run_dir={tmp_path / 'evaluation'}"
    assert "Did you mean 'demo'?" in ends(2, "evaluate", "dmo", run_dir)
    (tmp_path / "data.jsonl").write_text("{")
    data = ("task=math", "task.template=none", f"task.path={tmp_path / 'data.jsonl'}")
    assert "row 1: it is not JSON" in ends(2, "evaluate", "demo", *data, run_dir)
    assert not (tmp_path / "evaluation").exists()
    ends(0, "evaluate", "demo", "evaluate.max_prompts=2", "evaluate.samples=1", "logging.console=quiet", run_dir)
    assert "already holds a run" in ends(2, "evaluate", "demo", run_dir)


def test_report_refuses_what_is_no_run(ends: Ends, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in (
        (tmp_path / "gone", "is not a folder"),
        (tmp_path / "empty", "is not a run folder"),
        (DEMO_MODEL, "is not a run folder"),
    ):
        assert words in ends(2, "report", folder, f"run_dir={tmp_path / 'page'}")
        assert words in ends(2, "export", folder, tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_report_and_export_leave_what_they_would_overwrite(train: Ends, ends: Ends, tmp_path: Path) -> None:
    train(0)
    run, taken, file = tmp_path / "run", tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    for path in (taken / "mine", file):
        path.write_text("mine")
    for target in (taken, file):
        assert "is not an empty folder; name a new one" in ends(2, "export", run, target)
    assert "cannot be made" in ends(2, "export", run, file / "below")
    assert "cannot be made" in ends(2, "report", run, f"run_dir={file / 'below'}")
    with file_size_limit(2**18):
        message = ends(3, "export", run, tmp_path / "model")
    assert "File too large" in message and "name another folder" in message and "free disk space" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run", "taken"]
    assert [path.read_text() for path in (taken / "mine", file)] == ["mine", "mine"]
    ends(0, "export", run, tmp_path / "model")
