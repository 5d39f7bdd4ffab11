"""From a completion to the answer it gives, and from two answers to whether they are the same. String work first."""

from __future__ import annotations

import re

_THINK_END = "</think>"
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_SAME_LOOK = (
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;:]|[$]|(?<!\d)\s+|\s+(?!\d)"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:text|mbox|mathrm)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\.$"), ""),
)


def answer_part(text: str, template: str) -> str | None:
    """The part of a completion that may hold the answer; None if the template's format is broken.

    `r1_distill`: the prompt has opened <think>, so exactly one </think> must follow, and the answer after it
    (arXiv 2510.26788, the authors' grader). Other templates: the whole text.
    """
    if template != "r1_distill":
        return text
    _, mark, rest = text.partition(_THINK_END)
    return rest if mark and _THINK_END not in rest else None


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} or \\fbox{...} holds; None if there is none, or its braces never close."""
    found = list(_BOX.finditer(text))
    if not found:
        return None
    start, depth = found[-1].end(), 1
    for brace in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()].strip() or None
    return None


def extract_answer(text: str, template: str) -> str | None:
    """The boxed answer of a completion, or None: then it is wrong."""
    part = answer_part(text, template)
    return None if part is None else last_boxed(part)


def look_alike(gold: str, candidate: str) -> bool:
    """Whether two answers are the same text but for spacing and LaTeX that changes no meaning."""
    return _plain(gold) == _plain(candidate)


def shape_fault(gold: str) -> str | None:
    """Return the reason why a box cannot hold this gold answer; None if it can."""
    if not gold.strip():
        return "it is empty"
    if last_boxed(f"\\boxed{{{gold}}}") != gold.strip():
        return "its braces do not balance, or it holds a box of its own, so a box cannot hold it"
    return None


def _plain(answer: str) -> str:
    for pattern, replacement in _SAME_LOOK:
        answer = pattern.sub(replacement, answer)
    return answer
