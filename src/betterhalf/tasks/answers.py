"""The answer that a completion gives, as a string: what maj@k counts as a vote.

Equal answers must be equal strings, so numbers and the answers of math problems are normalised. Answers that are equal
in value and differ in form, such as 1/2 and 0.5, are different votes, as in other evaluations.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from betterhalf.config.schema import ArithmeticTask, MathTask, PerfectibleTask, ReasoningGymTask, Section
from betterhalf.errors import RewardError
from betterhalf.tasks.arithmetic import last_number
from betterhalf.tasks.math_answer import extract_answer, spell_plainly
from betterhalf.tasks.reasoning_gym_grader import EXTRACTIONS
from betterhalf.tasks.task import Tokenizer

Extract = Callable[[str], str | None]
"""Function from the text of a finished completion to its answer; None without one."""

_LONGEST = 256
"""Maximum length of a math answer that is normalised; the patterns for it are not meant for long texts."""

_WITHOUT_MEANING = (
    (re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[,;:]"), ""),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"(?<!\d)\s+|\s+(?!\d)"), ""),
)
"""(pattern, replacement) of markup and spacing without meaning; a space between digits, as in 3 1/2, has one."""

_FINAL_SUM = re.compile(r"=([0-9]{1,9})\.\s*$")


@runtime_checkable
class GivesAnswers(Protocol):
    """Optional method of a user-defined task; without it, the task has no maj@k."""

    def answer(self, text: str) -> str | None:
        """Return the answer of a finished completion; None without one."""
        ...


def answer_extractor(task: object, config: Section, tokenizer: Tokenizer) -> Extract | None:
    """Return the function that extracts answers; None for a task whose completions have no answer to compare.

    Args:
        task: the task, which may have a method of its own for it (`GivesAnswers`).
        config: its configuration.
        tokenizer: tokenizer of the model, which decides on the style `auto`.
    """
    own = _giver(task)
    if own is not None:
        return lambda text: _asked(own, text)
    match config:
        case ArithmeticTask(style=style):
            words = style == "word_problem" or (style == "auto" and bool(tokenizer.chat_template))
            return word_problem_answer if words else running_sum_answer
        case MathTask(template=template):
            return lambda text: math_answer(text, template)
        case ReasoningGymTask(extract=part):
            return lambda text: _spaced_plainly(EXTRACTIONS[part](text))
        case PerfectibleTask(base=base):
            return answer_extractor(None, base, tokenizer)
        case _:
            return None


def _giver(task: object) -> GivesAnswers | None:
    """Return the object with the method `answer`: the task, or the user's class behind its problems; None without."""
    problems: Any = getattr(task, "problems", None)
    while hasattr(problems, "base"):
        problems = problems.base
    found = (task, getattr(problems, "task", None))
    return next((one for one in found if isinstance(one, GivesAnswers)), None)


def _asked(own: GivesAnswers, text: str) -> str | None:
    """Return the answer of the user's own method.

    Raises:
        RewardError: it raises an error, or returns neither a string nor None.
    """
    name = f"{type(own).__name__}.answer"
    try:
        answer = own.answer(text)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise RewardError(
            f"{name} raises {type(error).__name__}: {error}. Return the answer as text, or None."
        ) from error
    if answer is not None and not isinstance(answer, str):
        raise RewardError(f"{name} returned {reprlib.repr(answer)}. Return the answer as text, or None.")
    return answer


def running_sum_answer(text: str) -> str | None:
    """Return the final total of a running sum; None unless the text ends with one."""
    found = _FINAL_SUM.search(text)
    return str(int(found[1])) if found else None


def word_problem_answer(text: str) -> str | None:
    """Return the last number of a text; None without one."""
    number = last_number(text)
    return None if number is None else f"{number:.12g}"


def _spaced_plainly(answer: str | None) -> str | None:
    """Return an answer with one space between its words; None if it is empty or missing."""
    return answer and (" ".join(answer.split()) or None)


def math_answer(text: str, template: str) -> str | None:
    """Return the boxed answer of a completion, without spacing and markup that have no meaning; None without one."""
    answer = extract_answer(text, template)
    if answer is None or len(answer) > _LONGEST:
        return answer
    plain = spell_plainly(answer)
    for pattern, replacement in _WITHOUT_MEANING:
        plain = pattern.sub(replacement, plain)
    return plain
