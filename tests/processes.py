"""Processes that a test started, and the shared memory they leave."""

from __future__ import annotations

import os
import time
from pathlib import Path


def descendants(pid: int) -> set[int]:
    """Return the processes that `pid` started, and those that they started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found, grown = {pid}, True
    while grown:
        new = {child for child, parent in parents.items() if parent in found} - found
        found, grown = found | new, bool(new)
    return found - {pid}


def running(pid: int) -> bool:
    """Return whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def left_after(pids: set[int], seconds: float) -> set[int]:
    """Return those of `pids` that still run after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := {pid for pid in pids if running(pid)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def shared_memory() -> set[str]:
    """Return the files of shared memory; other tests make semaphores there."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


def abandoned_memory(before: set[str], seconds: float) -> set[str]:
    """Return the files of shared memory that are new since `before` and that no process uses after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := shared_memory() - before - _in_use()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _in_use() -> set[str]:
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:
            continue
        found |= {line.rpartition("/dev/shm/")[2].split(" ")[0] for line in lines if "/dev/shm/" in line}
    return found
