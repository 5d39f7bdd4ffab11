"""Compare two answers mathematically, with math-verify. Every function here runs in a worker process.

Some calls never return, so they must run in a process that can be killed. math-verify's own time limits are off: they
are alarm signals, which cannot interrupt arithmetic on huge integers. math-verify compares within tolerances; here,
numbers that are written exactly are compared exactly, and a decimal with few digits counts as exact.
"""

from __future__ import annotations

import logging
import re
import traceback
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

from betterhalf.tasks.math_answer import readings, spell_plainly
from betterhalf.tasks.math_exact import (
    both_unsolvable,
    contradicts,
    differ_somewhere,
    equal_if_positive,
    exact,
    is_constant,
    lengths_differ,
    same_constant,
)
from betterhalf.tasks.math_units import split_unit, units_differ

_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|textit|textrm)\s*\{([^{}]*)\}")
_LETTERS = re.compile(r"[A-Za-z][A-Za-z' ,-]*")
_BASE = re.compile(r"(?<=[0-9A-Z)])_\s*(?:\{\s*(?:\\text\s*\{)?\s*(\w+)\s*\}?\s*\}|(\d))")
_TIME = re.compile(r"0*(\d{1,2}):(\d{2}(?::\d{2})?)")
_DOTS = re.compile(r"\\[lcdv]?dots[cbmi]?(?![a-zA-Z])|\.\.\.|\u2026")
_ROUNDED = re.compile(r"-?\d*\.(\d{6,})")
_LIBRARIES = frozenset({"sympy", "mpmath", "latex2sympy2_extended", "math_verify", "antlr4"})
_BASE_NAMES = {
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
    "eleven": "11",
    "twelve": "12",
    "sixteen": "16",
}


class UnparsedAnswerError(Exception):
    """The model's answer cannot be parsed as mathematics."""


def equivalent(gold: str, candidate: str) -> bool:
    """Return whether two answers are equal.

    Raises:
        UnparsedAnswerError: the candidate cannot be parsed, and is not the same text as the gold answer.
    """
    gold, candidate = spell_plainly(gold), spell_plainly(candidate)
    (gold, gold_unit), (candidate, unit) = split_unit(gold), split_unit(candidate)
    if units_differ(gold_unit, unit):
        return False
    return any(_equal(*pair) for pair in product(readings(gold), readings(candidate)))


def _equal(gold: str, candidate: str) -> bool:
    verdict = _by_form(gold, candidate)
    if verdict is not None:
        return verdict
    if gold.endswith("%") == candidate.endswith("%"):
        return _same(gold.removesuffix("\\%"), candidate.removesuffix("\\%"))
    return _same(gold, candidate) or _same(gold.removesuffix("\\%"), candidate.removesuffix("\\%"))


def why_unmatchable(gold: str) -> str | None:
    """Return the reason why a box with exactly this gold answer would not be graded as equal; None without one."""
    value = split_unit(spell_plainly(gold))[0]
    if _by_form(value, value):
        return None
    parsed = _parse(value.removesuffix("\\%"))[0]
    try:
        if parsed is None or _compared(value, parsed, parsed):
            return None
    except UnparsedAnswerError:
        pass
    return "its value does not equal itself; it may divide by zero"


def _by_form(gold: str, candidate: str) -> bool | None:
    """Compare answers that are text, not mathematics: words, times of day, numbers in another base. None if neither."""
    words = [_words(side) for side in (gold, candidate)]
    if None not in words and any(_is_wordy(side) for side in (gold, candidate)):
        return words[0] == words[1]
    times = [_TIME.fullmatch(side) for side in (gold, candidate)]
    if times[0] and times[1]:
        return times[0].groups() == times[1].groups()
    bases = [_bases(side) for side in (gold, candidate)]
    if bases[0] != bases[1]:
        return False
    if bases[0]:
        return _without_base(gold) == _without_base(candidate)
    if len(_DOTS.findall(gold)) != len(_DOTS.findall(candidate)):
        return False
    return None


def _words(answer: str) -> str | None:
    """Return an answer that consists of words alone, in lower case; None for any other."""
    text = _TEXT.sub(r"\1", answer).strip()
    text = text.removeprefix("(").removesuffix(")").strip()
    if not _LETTERS.fullmatch(text):
        return None
    return re.sub(r"\s*(?:,|\band\b)[\s,]*", ",", re.sub(r"\s+", " ", text)).casefold()


def _is_wordy(answer: str) -> bool:
    """Return whether the letters of an answer form a word, not a product of variables."""
    return bool(_TEXT.search(answer)) or any(len(word) >= 4 for word in re.findall(r"[A-Za-z]+", answer))


def _bases(answer: str) -> list[str]:
    found = [match[1] or match[2] for match in _BASE.finditer(answer) if _is_number(answer[: match.start()])]
    return [_BASE_NAMES.get(name.lower(), name) for name in found]


def _is_number(before: str) -> bool:
    """Return whether the text ends in digits, and not in a name as in A_1 or \\log_2."""
    digits = re.search(r"([0-9A-Z]+)\)?$", before)
    return bool(digits and re.search(r"[0-9]", digits[1]))


def _without_base(answer: str) -> str:
    return re.sub(r"[\s()]", "", _BASE.sub("_", answer)).lstrip("0")


def _same(gold: str, candidate: str) -> bool:
    (left, left_text), (right, right_text) = _parse(gold), _parse(candidate)
    if left_text == right_text:
        return True
    if right is None:
        raise UnparsedAnswerError(candidate)
    if left is None or ("\\{" not in gold + candidate and lengths_differ(left, right)):
        return False
    return _compared(gold, left, right)


def _compared(gold: str, left: Any, right: Any) -> bool:
    try:
        return _equal_values(gold, exact(left), exact(right))
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        if not _is_of_library(error):
            raise
        raise UnparsedAnswerError(f"{type(error).__name__} in sympy") from error


def _equal_values(gold: str, left: Any, right: Any) -> bool:
    if contradicts(right):
        return False
    if is_constant(left) and is_constant(right):
        rounded = _ROUNDED.fullmatch(gold)
        return same_constant(left, right, len(rounded[1]) if rounded else None)
    if differ_somewhere(left, right):
        return False
    if _verify(left, right):
        return not both_unsolvable(left, right)
    return equal_if_positive(left, right)


def _is_of_library(error: Exception) -> bool:
    """Return whether the error comes from sympy or a related library: models write expressions that make them fail."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES for frame, _ in frames)


def _verify(gold: Any, candidate: Any) -> bool:
    from math_verify import verify

    return bool(verify([gold], [candidate], timeout_seconds=None, raise_on_error=True))


def _parse(answer: str) -> tuple[Any | None, str]:
    """Return the expression, or None if it cannot be parsed, and math-verify's normalised text."""
    from math_verify import parse

    parsed = parse(f"\\boxed{{{answer}}}", extraction_config=[_config()], parsing_timeout=None)
    texts = [part for part in parsed if isinstance(part, str)]
    expressions = [part for part in parsed if not isinstance(part, str)]
    return (expressions[0] if expressions else None), (texts[0] if texts else answer)


@lru_cache(maxsize=1)
def _config() -> Any:
    """Return parser settings: parse the whole box or nothing; keep units, since math-verify reads 2h as 2 hours."""
    from math_verify import LatexExtractionConfig

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    default = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    return replace(default, normalization_config=replace(default.normalization_config, units=False))
