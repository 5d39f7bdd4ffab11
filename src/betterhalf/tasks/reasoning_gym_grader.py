"""Score completions by a reasoning-gym generator's own `score_answer`, in worker processes with a time limit."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from betterhalf.errors import RewardError
from betterhalf.tasks.grader_worker import WORKER_MEMORY_BYTES, last_error
from betterhalf.tasks.scorer_pool import OutOfResourcesError, ScorerPool
from betterhalf.tasks.worker_limits import bound_memory
from betterhalf.types import AnswerExtraction, FinishReason, Prompt

Entry = Mapping[str, Any]
"""A problem as the generator returns it: question, answer, metadata."""

_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"(?<![\d.])(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_PUNCTUATION = ".,;:!?\"'`*_()[]{}<>$"
_TRIALS = 3


def inside_tags(text: str) -> str | None:
    """Return the text inside the last answer tags, or None without them."""
    found = _TAGS.findall(text)
    return found[-1].strip() if found else None


def last_line(text: str) -> str | None:
    """Return the last line that is not empty, or None without one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


def last_word(text: str) -> str | None:
    """Return the last word without the punctuation around it, or None without one."""
    words = [word.strip(_PUNCTUATION) for word in text.split()]
    return next((word for word in reversed(words) if word), None)


def last_number(text: str) -> str | None:
    """Return the last number, without thousands separators, or None without one; the minus in `5-3` is not a sign."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def whole_text(text: str) -> str | None:
    """Return the text, or None if it is empty."""
    return text.strip() or None


EXTRACTIONS: dict[AnswerExtraction, Callable[[str], str | None]] = {
    "tags": inside_tags,
    "last_line": last_line,
    "last_word": last_word,
    "last_number": last_number,
    "all": whole_text,
}
"""Functions that find the answer in a completion."""


class ReasoningGymGrader:
    """Grader that rewards a finished completion with the generator's score of its answer.

    An answer that the generator's scorer cannot handle gets reward 0 and counts in `unparsed_answers`; one that takes
    too long, too much memory, or crashes its worker gets reward 0 and counts in `timeouts`.
    """

    def __init__(
        self,
        generator: str,
        settings: Mapping[str, Any],
        entries: Mapping[str, Entry],
        *,
        extract: AnswerExtraction,
        seconds: float,
        workers: int,
    ) -> None:
        """Create the grader, without starting its workers.

        Args:
            generator: name of the generator.
            settings: its settings.
            entries: each problem by the id of its prompt.
            extract: part of a completion that is scored.
            seconds: time limit for each completion.
            workers: number of worker processes.
        """
        self._entries = entries
        self._extract = EXTRACTIONS[extract]
        self._seconds = seconds
        self._pool = ScorerPool(start_scorer, (generator, json.dumps(dict(settings))), seconds=seconds, workers=workers)
        self._call = (generator, json.dumps(dict(settings)))
        self._tried = False
        self._timeouts = 0
        self._unparsed = 0

    @property
    def timeouts(self) -> int:
        """Number of completions so far whose scoring ran out of time or memory, or crashed its worker."""
        return self._timeouts

    @property
    def unparsed_answers(self) -> int:
        """Number of answers so far on which the scorer failed."""
        return self._unparsed

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """Return one reward for each completion; truncated ones and those without an answer get 0 without scoring.

        Raises:
            RewardError: the workers cannot start, or a score is not a finite number.
        """
        pairs = [
            (prompt.prompt_id, self._extract(text) if reason == "stop" else None)
            for prompt, text, reason in zip(prompts, texts, finish_reasons, strict=True)
        ]
        wanted = list(dict.fromkeys(pair for pair in pairs if pair[1] is not None))
        scores = dict(zip(wanted, self._scores(wanted), strict=True))
        results = [scores.get(pair, 0.0) for pair in pairs]
        self._timeouts += sum(isinstance(result, OutOfResourcesError) for result in results)
        self._unparsed += sum(
            isinstance(result, Exception) and not isinstance(result, OutOfResourcesError) for result in results
        )
        return [result if isinstance(result, float) else 0.0 for result in results]

    def check_golds(self, answers: Sequence[str], *, will_grade: bool = True) -> list[str | None]:
        """Return None for every answer: the generator made them. With `will_grade`, test a worker first.

        Raises:
            RewardError: the workers cannot start, or cannot score an answer.
        """
        if will_grade and not self._tried:
            self._try_out()
            self._tried = True
        return [None] * len(answers)

    def close(self) -> None:
        """Stop the workers, even busy ones."""
        self._pool.close()

    def _try_out(self) -> None:
        """Score one gold answer, so that a scorer that does not work is found before anything is sampled."""
        name, entry = next(iter(self._entries.items()))
        for _ in range(_TRIALS):  # a busy machine may exceed a short time limit once
            (score,) = self._scores([(name, entry.get("answer"))])
            if not isinstance(score, OutOfResourcesError):
                break
        if isinstance(score, OutOfResourcesError):
            raise RewardError(
                f"the generator cannot score its own answer within {self._seconds:g} s and its memory limit; raise "
                "task.reward_seconds, or reduce the load on the machine"
            )
        if isinstance(score, Exception):
            raise RewardError(
                f"the generator fails to score its own answer ({last_error(score)}); choose another generator"
            ) from score

    def _scores(self, pairs: Sequence[tuple[str, str | None]]) -> list[float | Exception]:
        """Return the score of each (prompt id, answer), or the exception that the scorer raised."""
        calls = [(*self._call, answer, self._entries[name]) for name, answer in pairs]
        return [_checked(score) for score in self._pool.run(score_answer, calls)]


def _checked(score: Any) -> float | Exception:
    """Return a score as a float.

    Raises:
        RewardError: it is not a finite number.
    """
    if isinstance(score, Exception):
        return score
    try:
        number = float(score)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(f"the generator's scorer returned {score!r}, not a finite number; choose another generator")
    return number


def start_scorer(generator: str, settings: str) -> None:
    """Leave interrupts to the parent, create the generator before any time limit runs, and limit the memory.

    What the generator prints is dropped: standard output belongs to the command.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open as long as the worker)
    _generator(generator, settings)
    bound_memory(WORKER_MEMORY_BYTES)


def score_answer(generator: str, settings: str, answer: str | None, entry: Entry) -> float:
    """Score an answer in a worker."""
    score: float = _generator(generator, settings).score_answer(answer, dict(entry))
    return score


@lru_cache(maxsize=1)
def _generator(name: str, settings: str) -> Any:
    return create_generator(name, json.loads(settings), seed=0, size=1)


def create_generator(name: str, settings: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """Return a generator of reasoning-gym; a mixture of several (`composite`) takes each as a table."""
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec

    given = dict(settings)
    if name == "composite":
        given["datasets"] = [DatasetSpec(**spec) for spec in settings.get("datasets", ())]
    return reasoning_gym.create_dataset(name, **given, seed=seed, size=size)
