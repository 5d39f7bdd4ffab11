"""Grade mathematics in worker processes, each completion within a limit of wall-clock time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from enum import Enum
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from betterhalf.errors import RewardError
from betterhalf.tasks.grader_worker import MAIN_MODULE_GRADES, last_error, start_worker, why_workers_fail
from betterhalf.tasks.math_answer import extract_answer, gold_answer, is_surely_finite, look_alike, shape_fault
from betterhalf.tasks.math_equal import UnparsedAnswerError, equivalent, why_unmeetable
from betterhalf.types import FinishReason, Prompt

Pair = tuple[str, str]
"""Gold answer and candidate."""
_TRIVIAL_PAIR = ("1/2", "0.5")
_TRIALS = 3
START_SECONDS = 20.0
"""Time after which workers without a first result are looked into."""


class Failure(Enum):
    """Reasons why a comparison has no result."""

    RESOURCES = "ran out of time or memory, or brought its worker down"
    UNPARSED = "cannot be read"


class MathGrader:
    """1 for a finished completion whose boxed answer equals the gold answer, else 0.

    A worker that is still busy when its time is up is killed and replaced; that completion scores 0 and counts in
    `timeouts`, and so does one that runs out of memory or brings its worker down. An answer that cannot be read scores
    0 and counts in `unparsed_answers`. Workers start with the check of the gold answers, and stay.
    """

    def __init__(
        self, template: str, *, seconds: float, workers: int, equal: Callable[[str, str], bool] = equivalent
    ) -> None:
        """Args: template of the prompts; limit per completion; processes; the comparison, importable by name.

        The comparison gets gold answer and candidate, and may raise `UnparsedAnswerError`.
        """
        self._template = template
        self._seconds = seconds
        self._workers = workers
        self._equal = equal
        self._pool: ProcessPool | None = None
        self._tried = False
        self._timeouts = 0
        self._unparsed = 0

    @property
    def timeouts(self) -> int:
        """Completions whose grading ran out of time or memory, or brought its worker down, so far."""
        return self._timeouts

    @property
    def unparsed_answers(self) -> int:
        """Boxed answers that could not be read, so far."""
        return self._unparsed

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """Return one reward for each completion; truncated ones score 0 without grading.

        Raises:
            RewardError: the workers cannot start, or the comparison itself failed.
        """
        pairs = [
            self._pair(prompt, text) if reason == "stop" else None
            for prompt, text, reason in zip(prompts, texts, finish_reasons, strict=True)
        ]
        verdicts = self._compare([pair for pair in dict.fromkeys(pairs) if pair is not None])
        results = [None if pair is None else verdicts[pair] for pair in pairs]
        self._timeouts += results.count(Failure.RESOURCES)
        self._unparsed += results.count(Failure.UNPARSED)
        return [float(result is True) for result in results]

    def check_golds(self, answers: Sequence[str], *, will_grade: bool = True) -> list[str | None]:
        """Return one reason for each gold answer that a completion cannot meet by boxing it; None for the others.

        A grader that will grade starts its workers, and has one of them compare two answers.

        Raises:
            RewardError: the workers cannot start, or the comparison itself failed.
        """
        if will_grade and not self._tried:
            self._try_out()
            self._tried = True
        faults = {gold: shape_fault(gold) for gold in dict.fromkeys(answers)}
        hard = {gold: gold_answer(gold) for gold, fault in faults.items() if fault is None}
        hard = {gold: answer for gold, answer in hard.items() if not is_surely_finite(answer)}
        for gold, reason in zip(hard, self._run(why_unmeetable, [(answer,) for answer in hard.values()]), strict=True):
            limit = f"comparing it with itself takes more than {self._seconds:g} s or the memory of a worker"
            faults[gold] = limit if isinstance(reason, Failure) else reason
        return [faults[gold] for gold in answers]

    def close(self) -> None:
        """End the workers, busy or not."""
        if self._pool is not None:
            self._pool.stop()  # type: ignore[no-untyped-call]
            self._pool.join()
            self._pool = None

    def _try_out(self) -> None:
        """Compare two answers that are equal, so that a grader that cannot work is found before anything is sampled."""
        for _ in range(_TRIALS):  # a busy machine may let a short limit pass once
            verdict = self._compare([_TRIVIAL_PAIR])[_TRIVIAL_PAIR]
            if verdict is not Failure.RESOURCES:
                break
        if verdict is Failure.RESOURCES:
            raise RewardError(
                f"the grader's workers cannot compare {' and '.join(_TRIVIAL_PAIR)} within {self._seconds:g} s and "
                "their memory; raise task.reward_seconds, or give the machine less to do"
            )
        if verdict is not True:
            raise RewardError(
                f"the grader does not find {' and '.join(_TRIVIAL_PAIR)} equal; "
                "install the versions of math-verify and sympy that betterhalf asks for"
            )

    def _pair(self, prompt: Prompt, text: str) -> Pair | None:
        candidate = extract_answer(text, self._template)
        return None if candidate is None else (gold_answer(prompt.answer), candidate)

    def _compare(self, pairs: Sequence[Pair]) -> dict[Pair, bool | Failure]:
        """Return whether each pair is equal, or why that is not known."""
        verdicts: dict[Pair, bool | Failure] = {pair: True for pair in pairs if look_alike(*pair)}
        waiting = [pair for pair in pairs if pair not in verdicts]
        for pair, verdict in zip(waiting, self._run(self._equal, waiting), strict=True):
            if not isinstance(verdict, bool | Failure):
                raise RewardError(
                    f"the comparison of answers returned {verdict!r} for {pair[0]!r} and {pair[1]!r}; "
                    "make it return True or False"
                )
            verdicts[pair] = verdict
        return verdicts

    def _run(self, function: Callable[..., Any], calls: Sequence[tuple[str, ...]]) -> list[Any]:
        """Return the result of each call in a worker, or its `Failure`.

        A pool also breaks when an idle worker is killed from outside, so it is replaced once before that is an error.
        """
        starting = self._pool is None
        try:
            futures = [self._submit(function, call) for call in calls]
            if starting and futures and not wait(futures, START_SECONDS, FIRST_COMPLETED).done:
                self._require_start()
            return self._results(futures)
        except BrokenProcessPool:
            self.close()
            self._require_start()
        try:
            return self._results([self._submit(function, call) for call in calls])
        except BrokenProcessPool as error:
            self.close()
            raise RewardError(
                f"the grader's workers ended twice without a result ({error}); "
                "see their messages above, and whether the machine has run out of memory"
            ) from error

    def _results(self, futures: Sequence[ProcessFuture[Any]]) -> list[Any]:
        return [_result(future) for future in futures]

    def _submit(self, function: Callable[..., Any], call: tuple[str, ...]) -> ProcessFuture[Any]:
        if self._pool is None:
            if getattr(multiprocessing.current_process(), "_inheriting", False):
                raise RewardError(MAIN_MODULE_GRADES)
            # spawn: a fork of a process with torch's threads can deadlock.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(max_workers=self._workers, initializer=start_worker, context=context)
        try:
            return self._pool.schedule(function, args=call, timeout=self._seconds)
        except RuntimeError as error:  # pebble's word for a pool that broke between two batches
            raise BrokenProcessPool(str(error)) from error

    def _require_start(self) -> None:
        """Raise an error if no worker can start; pebble replaces one that ends with status 0, for ever."""
        fault = why_workers_fail()
        if fault is not None:
            self.close()
            raise RewardError(fault)


def _result(future: ProcessFuture[Any]) -> Any:
    """Return what a call returned, or the failure that the answers caused; any other error is one of the grader."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, FutureTimeoutError | ProcessExpired | MemoryError):
        return Failure.RESOURCES
    if isinstance(error, UnparsedAnswerError):
        return Failure.UNPARSED
    if isinstance(error, BrokenProcessPool):
        raise error
    fix = "install what it needs" if isinstance(error, ImportError) else "fix the comparison"
    raise RewardError(f"the comparison of answers failed in a worker: {last_error(error)}; {fix}") from error
