"""Small runs of the demo model, in process and through the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.schema import RunConfig

ROOT = Path(__file__).parents[2]

SMALL: dict[str, Any] = {
    "name": "small",
    "task": {"type": "arithmetic", "num_prompts": 64},
    "sampling": {"max_tokens": 40},
    "training": {"steps": 2, "prompts_per_step": 4, "group_size": 4, "optimizer_steps": 2},
    "optimizer": {"learning_rate": 3e-4},
    "logging": {"console": "quiet"},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` laid over `base`, section by section."""
    out = dict(base)
    for key, value in changes.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


@pytest.fixture
def small_config() -> Callable[..., RunConfig]:
    """A few steps on the demo model; keyword arguments replace sections or parts of them."""
    return lambda **changes: RunConfig.model_validate(merged(SMALL, changes))


@pytest.fixture
def betterhalf() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own."""

    def run(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "betterhalf.cli", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment, check=False
        )

    return run
