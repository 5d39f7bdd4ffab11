"""Settings that libraries read from the environment of the process; what is set already stays."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


def prepare_process() -> None:
    """Call before torch is imported.

    Threads that spin while they wait stall each other on a busy machine; and Linux hands out the memory of every large
    temporary tensor in pages of 4 KiB, each faulted in by itself, unless torch asks for large ones (docs/LOG.md has
    both measured).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextmanager
def settled() -> Iterator[None]:
    """Keep Python's garbage collector off what exists now: models and libraries are a million objects, which it would
    look through again and again while a step makes some thousands."""
    if gc.get_freeze_count():
        # Somebody else has done it, and will undo it.
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
