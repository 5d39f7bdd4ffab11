"""Grade mathematics in worker processes, each completion within a limit of wall-clock time."""

from __future__ import annotations

import multiprocessing
import re
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from betterhalf.tasks.math_answer import extract_answer, look_alike, shape_fault
from betterhalf.tasks.math_equal import equivalent, why_unmeetable
from betterhalf.types import FinishReason, Prompt

Pair = tuple[str, str]
"""Gold answer and candidate."""

Result = TypeVar("Result")

PLAIN_NUMBER = re.compile(r"-?[0-9]+(?:[.][0-9]+)?")
"""Golds that need no worker to be found equal to themselves."""

WORKER_MEMORY_BYTES = 4 * 2**30
"""Address space of a worker: 10^{10^{10}} must end in its own MemoryError, not in the trainer's."""


class MathGrader:
    """1 for a finished completion whose boxed answer equals the gold answer, else 0.

    A worker that is still busy when its time is up is killed and replaced; that completion scores 0 and counts in
    `timeouts`, and so does one that brings its worker down. Workers start with the first answers that need them.
    """

    def __init__(
        self, template: str, *, seconds: float, workers: int, equal: Callable[[str, str], bool] = equivalent
    ) -> None:
        """Args: template of the prompts; limit per completion; processes; the comparison, importable by name."""
        self._template = template
        self._seconds = seconds
        self._workers = workers
        self._equal = equal
        self._pool: ProcessPool | None = None
        self._timeouts = 0

    @property
    def timeouts(self) -> int:
        """Completions whose grading ran out of time, or brought its worker down, so far."""
        return self._timeouts

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """One reward for each completion; truncated ones score 0 without grading."""
        pairs = [
            self._pair(prompt, text) if reason == "stop" else None
            for prompt, text, reason in zip(prompts, texts, finish_reasons, strict=True)
        ]
        verdicts = self._compare([pair for pair in dict.fromkeys(pairs) if pair is not None])
        self._timeouts += sum(pair is not None and verdicts[pair] is None for pair in pairs)
        return [float(pair is not None and verdicts[pair] is True) for pair in pairs]

    def check_golds(self, answers: Sequence[str]) -> list[str | None]:
        """Return one reason for each gold answer that a completion cannot meet by boxing it; None for the others."""
        faults = {gold: shape_fault(gold) for gold in dict.fromkeys(answers)}
        hard = [gold for gold, fault in faults.items() if fault is None and not PLAIN_NUMBER.fullmatch(gold.strip())]
        waiting = {gold: self._submit(why_unmeetable, gold) for gold in hard}
        for gold, future in waiting.items():
            try:
                faults[gold] = future.result()
            except (FutureTimeoutError, ProcessExpired):
                faults[gold] = f"comparing it with itself takes longer than {self._seconds:g} s"
        return [faults[gold] for gold in answers]

    def close(self) -> None:
        """End the workers, busy or not."""
        if self._pool is not None:
            self._pool.stop()  # type: ignore[no-untyped-call]
            self._pool.join()
            self._pool = None

    def _pair(self, prompt: Prompt, text: str) -> Pair | None:
        candidate = extract_answer(text, self._template)
        return None if candidate is None else (prompt.answer, candidate)

    def _compare(self, pairs: Sequence[Pair]) -> dict[Pair, bool | None]:
        """Whether each pair is equal; None when it took too long."""
        alike = {pair: look_alike(*pair) for pair in pairs}
        waiting = {pair: self._schedule(pair) for pair, same in alike.items() if not same}
        return {pair: True if same else self._result(waiting[pair]) for pair, same in alike.items()}

    def _schedule(self, pair: Pair) -> ProcessFuture[bool]:
        return self._submit(self._equal, *pair)

    def _submit(self, function: Callable[..., Result], *args: str) -> ProcessFuture[Result]:
        if self._pool is None:
            # spawn: a fork of a process with torch's threads can deadlock.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(max_workers=self._workers, initializer=_start_worker, context=context)
        return self._pool.schedule(function, args=args, timeout=self._seconds)

    @staticmethod
    def _result(future: ProcessFuture[bool]) -> bool | None:
        try:
            return future.result()
        except (FutureTimeoutError, ProcessExpired):
            return None
        except Exception:
            # math-verify meets whatever a model writes; an answer it cannot digest is a wrong answer.
            return False


def _start_worker() -> None:
    """Leave interrupts to the parent, bound the memory, and import before any clock runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # Windows has no such limit, and some systems refuse it.
    import math_verify  # noqa: F401
