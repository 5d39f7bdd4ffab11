"""Grade mathematics in worker processes, with a wall-clock time limit for each completion."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from betterhalf.errors import RewardError
from betterhalf.tasks.math_answer import extract_answer, gold_answer, is_surely_finite, look_alike, shape_fault
from betterhalf.tasks.math_equal import equivalent
from betterhalf.tasks.worker_limits import SCORER_MEMORY_BYTES
from betterhalf.tasks.worker_pool import WorkerPool, WorkerStartError
from betterhalf.types import FinishReason, Prompt

Pair = tuple[str, str]
"""Gold answer and candidate."""
_TRIVIAL_PAIR = ("1/2", "0.5")
_TRIALS = 3
_IMPORT_ERROR = re.compile(r"(ModuleNotFound|Import)Error\b")

MAX_ANSWER_LENGTH = 10_000
"""Maximum length of an answer that is compared as mathematics; parsing a longer one only exhausts the time limit."""


class Failure(Enum):
    """Reasons why a comparison has no result."""

    RESOURCES = "ran out of time or memory, or crashed its worker"
    UNPARSED = "cannot be parsed"


class MathGrader:
    """Grader that rewards a finished completion with 1 if its boxed answer equals the gold answer, and else with 0.

    A worker that exceeds its time limit is killed and replaced. Its completion gets reward 0 and counts in `timeouts`,
    as does one that runs out of memory or crashes its worker. An answer that cannot be parsed gets reward 0 and counts
    in `unparsed_answers`. The workers start when the gold answers are checked, and run until `close`.
    """

    def __init__(
        self, template: str, *, seconds: float, workers: int, equal: Callable[[str, str], bool] = equivalent
    ) -> None:
        """Create the grader, without starting its workers.

        Args:
            template: template of the prompts; see `answer_part`.
            seconds: time limit for each completion.
            workers: number of worker processes.
            equal: comparison of (gold answer, candidate), importable by name; it may raise `UnparsedAnswerError`.
        """
        self._template = template
        self._seconds = seconds
        self._pool = WorkerPool(
            "math_worker",
            {"equal": _import_path(equal)},
            workers=workers,
            seconds=seconds,
            memory_bytes=SCORER_MEMORY_BYTES,
        )
        self._tried = False
        self._timeouts = 0
        self._unparsed = 0

    @property
    def timeouts(self) -> int:
        """Number of completions so far whose grading ran out of time or memory, or crashed its worker."""
        return self._timeouts

    @property
    def unparsed_answers(self) -> int:
        """Number of boxed answers so far that could not be parsed."""
        return self._unparsed

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """Return one reward for each completion; truncated ones get 0 without grading.

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
        """Return, for each gold answer, the reason why a completion that boxes it cannot match it, or None.

        With `will_grade`, start the workers first, and test one of them on two answers that are known to be equal.

        Raises:
            RewardError: the workers cannot start, or the comparison itself failed.
        """
        if will_grade and not self._tried:
            self._try_out()
            self._tried = True
        faults = {gold: shape_fault(gold) for gold in dict.fromkeys(answers)}
        hard = {gold: gold_answer(gold) for gold, fault in faults.items() if fault is None}
        hard = {gold: answer for gold, answer in hard.items() if not is_surely_finite(answer)}
        for gold, reason in zip(hard, self._run("gold", [(answer,) for answer in hard.values()]), strict=True):
            limit = f"comparing it with itself takes more than {self._seconds:g} s or more memory than a worker has"
            faults[gold] = limit if isinstance(reason, Failure) else reason
        return [faults[gold] for gold in answers]

    def close(self) -> None:
        """Stop the workers, even busy ones."""
        self._pool.close()

    def _try_out(self) -> None:
        """Compare two equal answers, so that a grader that does not work is found before anything is sampled."""
        for _ in range(_TRIALS):  # a busy machine may exceed a short time limit once
            verdict = self._compare([_TRIVIAL_PAIR])[_TRIVIAL_PAIR]
            if verdict is not Failure.RESOURCES:
                break
        if verdict is Failure.RESOURCES:
            raise RewardError(
                f"the grader's workers cannot compare {' and '.join(_TRIVIAL_PAIR)} within {self._seconds:g} s and "
                "their memory limit; raise task.reward_seconds, or reduce the load on the machine"
            )
        if verdict is not True:
            raise RewardError(
                f"the grader does not find {' and '.join(_TRIVIAL_PAIR)} equal; "
                "install the versions of math-verify and sympy that betterhalf requires"
            )

    def _pair(self, prompt: Prompt, text: str) -> Pair | None:
        candidate = extract_answer(text, self._template)
        return None if candidate is None else (gold_answer(prompt.answer), candidate)

    def _compare(self, pairs: Sequence[Pair]) -> dict[Pair, bool | Failure]:
        """Return whether each pair is equal, or the failure that left this open."""
        verdicts: dict[Pair, bool | Failure] = {pair: True for pair in pairs if look_alike(*pair)}
        too_long = [pair for pair in pairs if pair not in verdicts and len(pair[1]) > MAX_ANSWER_LENGTH]
        verdicts |= dict.fromkeys(too_long, Failure.UNPARSED)
        waiting = [pair for pair in pairs if pair not in verdicts]
        for pair, verdict in zip(waiting, self._run("equal", waiting), strict=True):
            if not isinstance(verdict, bool | Failure):
                raise RewardError(
                    f"the comparison of answers returned {verdict!r} for {pair[0]!r} and {pair[1]!r}; "
                    "make it return True or False"
                )
            verdicts[pair] = verdict
        return verdicts

    def _run(self, function: str, calls: Sequence[tuple[str, ...]]) -> list[Any]:
        """Return the result of each call in a worker, or its `Failure`."""
        try:
            replies = self._pool.run([{"function": function, "answers": call} for call in calls])
        except WorkerStartError as error:
            raise RewardError(_start_fault(error)) from error
        return [_read(reply) for reply in replies]


def _import_path(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _read(reply: Mapping[str, Any]) -> Any:
    """Return the result in a worker's reply, or the failure that the answers caused; raise any other error."""
    if "result" in reply:
        return reply["result"]
    if "failure" in reply:
        return Failure[reply["failure"]]
    if "cause" not in reply:
        return Failure.RESOURCES
    fix = "install what it needs" if _IMPORT_ERROR.match(reply["cause"]) else "fix the comparison"
    raise RewardError(f"the comparison of answers failed in a worker: {reply['cause']}; {fix}")


def _start_fault(error: WorkerStartError) -> str:
    """Return why no worker can start, and the fix."""
    fix = {
        "config": "name a function that can be imported",
        "exception": "check that `import math_verify` works in this environment",
        "process": "check whether the machine has run out of memory",
    }[error.kind]
    if _IMPORT_ERROR.match(error.cause):
        fix = "install the package that is missing"
    return f"the grader's workers cannot start ({error.cause.rstrip('.')}); {fix}"
