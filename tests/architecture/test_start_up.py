"""The command line starts quickly."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from pathlib import Path

SRC = Path(__file__).parents[2] / "src"
MAX_SECONDS = 0.5


def cpu_seconds() -> float:
    """Return the processor time of one `betterhalf --help`, which does not depend on the machine's load."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "betterhalf", "--help"], capture_output=True, text=True, check=True, cwd=SRC
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "sanity" in done.stdout
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_answers_in_under_half_a_second() -> None:
    assert statistics.median(cpu_seconds() for _ in range(3)) < MAX_SECONDS
