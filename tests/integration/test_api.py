"""The Python functions run the same code as the command line, and fail with exceptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import betterhalf
from betterhalf import cli
from betterhalf.runs.checkpoints import Checkpoints

SETTINGS: dict[str, Any] = {
    "task": {"num_prompts": 64},
    "sampling": {"max_tokens": 40},
    "training": {"steps": 2, "prompts_per_step": 4, "group_size": 4, "optimizer_steps": 2},
    "logging": {"console": "quiet"},
}
OVERRIDES = [
    *("task.num_prompts=64", "sampling.max_tokens=40", "training.steps=2", "training.prompts_per_step=4"),
    *("training.group_size=4", "training.optimizer_steps=2", "logging.console=quiet"),
]
BASE = "experiments/base/demo.toml"


def numbers(run: betterhalf.Run) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "system/"))} for row in run.metrics
    ]


def test_train_and_the_command_line_give_the_same_numbers(tmp_path: Path) -> None:
    run = betterhalf.train(BASE, run_dir=tmp_path / "api", precision="bf16", **SETTINGS)
    assert cli.main(["train", BASE, "precision=bf16", *OVERRIDES, f"run_dir={tmp_path / 'cli'}", "--json"]) == 0
    other = betterhalf.load_run(tmp_path / "cli")
    assert run.config == other.config
    assert numbers(run) == numbers(other)
    assert run.summary["policy_version"] == 4
    found = betterhalf.compare(run, other)
    assert found.differences == {}
    assert [each.steps for each in found.runs] == [2, 2]


def test_an_interrupted_run_keeps_what_is_written_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "steps": 3, "checkpoint_every": 1}}
    save = Checkpoints.save

    def interrupted(checkpoints: Checkpoints, progress: Any) -> None:
        save(checkpoints, progress)
        if progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    with pytest.raises(KeyboardInterrupt, match="finished work is in"):
        betterhalf.train(BASE, run_dir=tmp_path / "r", **settings)
    assert len(betterhalf.load_run(tmp_path / "r").metrics) == 2
    assert [path.name for path in (tmp_path / "r" / "checkpoints").iterdir()] == ["step-000001", "step-000002"]
    monkeypatch.setattr(Checkpoints, "save", save)
    done = betterhalf.train(tmp_path / "r", resume=True)
    assert [row["step"] for row in done.metrics] == [1, 2, 3]


def test_what_new_writes_can_be_trained_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "mine"]) == 0
    run = betterhalf.train(
        "mine.toml", training={"steps": 1, "prompts_per_step": 4, "group_size": 4}, logging={"console": "quiet"}
    )
    assert run.path.name.startswith("train-mine-")
    # the demo model solves some of the sums, and ends nearly all its completions with a number
    assert 0.1 < run.metrics[0]["rollout/reward/mean"] < 1.0
    assert {row["reward"] for row in run.rollouts()} <= {0.0, 0.1, 1.0}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ("betterhalf.train('nothing.toml')", "ConfigError", "there is no experiment file"),
        ("betterhalf.train(lr=1)", "ConfigError", "Did you mean 'optimizer.learning_rate'?"),
        ("betterhalf.train(resume=True)", "InputError", "needs the folder of the run to continue"),
        ("betterhalf.train(model='/nowhere/model')", "InputError", "/nowhere/model"),
        ("betterhalf.probe()", "InputError", "probe has no model to examine"),
        ("betterhalf.evaluate('demo', sampling={'top_p': 0.0})", "ConfigError", "sampling.top_p"),
        ("betterhalf.load_run('nothing')", "InputError", "is not a folder"),
    ],
)
def test_errors_are_exceptions_and_nothing_is_left_behind(call: str, error: str, words: str, tmp_path: Path) -> None:
    code = (
        f"import betterhalf, json\ntry:\n    {call}\nexcept betterhalf.BetterhalfError as found:\n"
        "    print(json.dumps([type(found).__name__, str(found)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    name, message = json.loads(done.stdout.splitlines()[-1])
    assert name == error and words in message
    assert list(tmp_path.iterdir()) == []
