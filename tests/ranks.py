"""Ranks in processes of their own, joined by gloo, for tests of what is sharded; no Ray."""

from __future__ import annotations

import contextlib
import pickle
import queue
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import multiprocessing

from betterhalf.distributed.group import Membership, free_address, join

Result = TypeVar("Result")

LIMIT = 280.0
"""Seconds for all ranks together."""


def run_ranks(body: Callable[..., Result], world_size: int, *arguments: Any) -> list[Result]:
    """Call `body(ranks, *arguments)` in `world_size` processes, and return the results in rank order.

    Args:
        body: function of a module; its arguments and its result are pickled.
        world_size: number of processes.
        arguments: passed on to every rank.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    host, port = free_address()
    members = [
        Membership(rank=rank, world_size=world_size, host=host, port=port, seconds=120.0) for rank in range(world_size)
    ]
    processes = [context.Process(target=_run, args=(results, member, body, arguments)) for member in members]
    for process in processes:
        process.start()
    try:
        found = dict(_next(results, processes) for _ in processes)
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in sorted(found.items()) if not ok]
    assert not failed, "\n".join(failed)
    return [pickle.loads(found[rank][1]) for rank in range(world_size)]


def _next(results: Any, processes: list[Any]) -> tuple[int, tuple[bool, Any]]:
    """Return a rank and its answer.

    Raises:
        AssertionError: a process ended with an error and no answer, or `LIMIT` has passed.
    """
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        with contextlib.suppress(queue.Empty):
            answer: tuple[int, tuple[bool, Any]] = results.get(timeout=1.0)
            return answer
        codes = [process.exitcode for process in processes]
        assert not any(codes), f"a rank ended without an answer; exit codes: {codes}"
    raise AssertionError(f"no rank answered in {LIMIT:g} s")


def _run(results: Any, member: Membership, body: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        ranks = join(member, torch.device("cpu"))
        # Pickled here: the queue would pass tensors as shared memory, which ends with this process.
        answer: tuple[bool, Any] = (True, pickle.dumps(body(ranks, *arguments)))
        ranks.leave()
    except BaseException:
        answer = (False, traceback.format_exc())
    results.put((member.rank, answer))
