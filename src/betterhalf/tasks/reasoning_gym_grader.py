"""Score completions by a reasoning-gym generator's own `score_answer`, in worker processes with a time limit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from betterhalf.errors import RewardError
from betterhalf.tasks.reasoning_gym_worker import Entry, packed
from betterhalf.tasks.worker_limits import SCORER_MEMORY_BYTES
from betterhalf.tasks.worker_pool import WorkerPool, WorkerStartError
from betterhalf.types import AnswerExtraction, FinishReason, Prompt

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerFailure:
    """A call of the scorer without a result."""

    resources: bool
    """True if it ran out of time or memory, or ended its worker; false if it raised an error."""
    message: str
    """Reason, as a clause."""


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
        self._pool = WorkerPool(
            "reasoning_gym_worker",
            {"generator": generator, "settings": dict(settings)},
            workers=workers,
            seconds=seconds,
            memory_bytes=SCORER_MEMORY_BYTES,
        )
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
        failures = [result for result in results if isinstance(result, ScorerFailure)]
        self._timeouts += sum(failure.resources for failure in failures)
        self._unparsed += sum(not failure.resources for failure in failures)
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
            if not (isinstance(score, ScorerFailure) and score.resources):
                break
        if not isinstance(score, ScorerFailure):
            return
        if score.resources:
            raise RewardError(
                f"the generator cannot score its own answer within {self._seconds:g} s and its memory limit; raise "
                "task.reward_seconds, or reduce the load on the machine"
            )
        raise RewardError(f"the generator fails to score its own answer ({score.message}); choose another generator")

    def _scores(self, pairs: Sequence[tuple[str, str | None]]) -> list[float | ScorerFailure]:
        """Return the score of each (prompt id, answer), or why there is none."""
        requests = [{"answer": answer, "entry": packed(self._entries[name])} for name, answer in pairs]
        try:
            return [_read(reply) for reply in self._pool.run(requests)]
        except WorkerStartError as error:
            raise RewardError(
                f"the workers that score completions cannot start: {error.message}; check the package reasoning-gym, "
                "and whether the machine has run out of memory"
            ) from error


def _read(reply: Mapping[str, Any]) -> float | ScorerFailure:
    """Return the score in a worker's reply, or why there is none."""
    if "score" in reply:
        return _checked(reply["score"])
    return ScorerFailure(resources=reply.get("error") != "exception", message=str(reply.get("cause", reply["message"])))


def _checked(score: Any) -> float:
    """Return a score as a float.

    Raises:
        RewardError: it is not a finite number.
    """
    try:
        number = float(score)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(f"the generator's scorer returned {score!r}, not a finite number; choose another generator")
    return number
