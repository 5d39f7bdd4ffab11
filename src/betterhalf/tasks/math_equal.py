"""Compare two answers by mathematics, with math-verify. Every function here runs in a worker process.

Some calls never return, so they belong into a process that can be killed. math-verify's own time limits are off: they
are alarms, which cannot interrupt the arithmetic of huge integers.
"""

from __future__ import annotations

import logging
from typing import Any


class UnparsedAnswerError(Exception):
    """math-verify cannot read what the model wrote."""


def equivalent(gold: str, candidate: str) -> bool:
    """Return whether math-verify finds two answers equal."""
    from math_verify import verify

    return bool(verify(_parse(gold), _parse(candidate), timeout_seconds=None))


def why_unmeetable(gold: str) -> str | None:
    """Return the reason why no completion can meet this gold answer; None if one can."""
    from math_verify import verify

    parsed = _parse(gold)
    if not parsed or isinstance(parsed[0], str) or verify(parsed[0], parsed[0], timeout_seconds=None):
        return None
    return "does not equal itself"


def _parse(answer: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    boxes = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed: list[Any] = parse(f"\\boxed{{{answer}}}", extraction_config=boxes, parsing_timeout=None)
    return parsed
