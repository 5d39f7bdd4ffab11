"""Small runs of the demo model, in this process and through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from betterhalf import cli
from betterhalf.config.schema import RunConfig

Ends = Callable[..., str]

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "experiments" / "smoke" / "demo.toml")
ONE_STEP = (
    *("training.steps=1", "training.prompts_per_step=2", "training.group_size=2", "training.optimizer_steps=1"),
    "logging.console=quiet",
)

SMALL: dict[str, Any] = {
    "name": "small",
    "task": {"type": "arithmetic", "num_prompts": 64},
    "sampling": {"max_tokens": 40},
    "training": {"steps": 2, "prompts_per_step": 4, "group_size": 4, "optimizer_steps": 2},
    "optimizer": {"learning_rate": 3e-4},
    "logging": {"console": "quiet"},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge `changes` into `base`, section by section."""
    out = dict(base)
    for key, value in changes.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


@pytest.fixture
def small_config() -> Callable[..., RunConfig]:
    """Configure a few steps on the demo model; keyword arguments replace sections or parts of them."""
    return lambda **changes: RunConfig.model_validate(merged(SMALL, changes))


@pytest.fixture
def betterhalf() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in its own process."""

    def run(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "betterhalf.cli", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment, check=False
        )

    return run


@pytest.fixture
def ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ends:
    """Run a command in this process; check its status and that it prints one message, and return standard error."""
    monkeypatch.delenv("BETTERHALF_TRACEBACK", raising=False)

    def run(status: int, *arguments: str | Path) -> str:
        capsys.readouterr()
        found = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert found == status, err
        assert "Traceback" not in err
        if status in (2, 3):
            found_at = [number for number, line in enumerate(err.splitlines()) if line.startswith("error: ")]
            # Warnings of the steps before may come first.
            assert found_at == [0] if status == 2 else len(found_at) == 1, err
            assert out == ""
        return err

    return run


@pytest.fixture
def train(ends: Ends, tmp_path: Path) -> Ends:
    """Run one small training step in `run`, or in the run_dir given last."""
    return lambda status, *more: ends(status, "train", SMOKE, *ONE_STEP, f"run_dir={tmp_path / 'run'}", *more)
