"""Limits of a worker process: its memory."""

from __future__ import annotations

import os

SCORER_MEMORY_BYTES = 4 * 2**30
"""Address space beyond its imports of a worker that runs no user code, so that 10^{10^{10}} ends in its own
MemoryError, not the trainer's."""


def memory_bytes(gib: float | None) -> int | None:
    """Return a limit in bytes; None without one."""
    return None if gib is None else int(gib * 2**30)


def bound_memory(more: int) -> None:
    """Limit the address space to `more` bytes beyond what is in use, where the system has such a limit."""
    try:
        import resource

        limit = _address_space() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, ValueError, OSError):
        pass  # Windows has no such limit, and some systems refuse it.


def _address_space() -> int:
    """Return the address space in use; a main module that imports CUDA may already exceed the limit."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0  # only Linux has this file
