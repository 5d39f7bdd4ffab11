"""Extract the answer from a completion, and normalise the spelling of answers. String operations only."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from betterhalf.tasks.math_markup import ascii_signs, without_markup

_THINK_END = "</think>"
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_THOUSANDS = (re.compile(r"(?<=\d)(?:\\[,;: ]|\{,\}|~)(?=\d{3}(?!\d))"), "")
"""Pattern of the separators in 10\\,000 and 10{,}000, but not the space in 3\\,1/2, which has a meaning."""
_SAME_LOOK = (
    (re.compile(r"\\!"), ""),
    _THOUSANDS,
    (re.compile(r"\\[,;:]"), " "),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|[$]|(?<!\d)\s+|\s+(?!\d)"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:text|mbox|mathrm)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\.$"), ""),
)
_WRAPPERS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$([^$]+)\$\$",
        r"\$((?:[^$\\]|\\.)+)\$",
        r"\\\(((?:(?!\\\)).)+)\\\)",
        r"\\\[((?:(?!\\\]).)+)\\\]",
    )
)
_SPELLING = (
    (re.compile(r"\\!|\\displaystyle(?![a-zA-Z])"), ""),
    _THOUSANDS,
    (re.compile(r"\N{SQUARE ROOT}\s*([0-9]+|[a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"\\?(?<![a-zA-Z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"^-?\d{1,3}(?: \d{3})+$"), lambda found: found[0].replace(" ", "")),
    (re.compile(r"(?<!\\)\{(\d{1,3}(?:,\d{3})+)\}"), lambda found: "{" + found[1].replace(",", "") + "}"),
    (re.compile(r"\\([dt]?frac)\s*\\pi\s*(\d)(?!\d)"), r"\\\1{\\pi}{\2}"),
    (re.compile(r"\s*(?:\\text\{\s*per\s?cent\s*\}|\bper\s?cent|\\?%)$", re.IGNORECASE), r"\\%"),
)
_FINAL_MARK = re.compile(r"(?<![.,;\\])[.,;]$")
_REPEATING = re.compile(r"(-?)(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
_FLOAT = re.compile(r"(?<![\w.\\^{])(\d+(?:\.\d+)?|\.\d+)([eE])([+-]?)(\d+)(?![\w.^])")
_ANSWER_IS = re.compile(
    r"(?:#+\s*)?(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:(?:final|correct|right)\s+)?answer\s*(?:is\b\s*:?|[:=])\s*(.+)",
    re.IGNORECASE | re.DOTALL,
)
_ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.IGNORECASE | re.DOTALL)
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_MARKUP = re.compile(r"\\(?:begin|end)\{[^{}]*\}|\\(?:text|mbox|mathrm|textbf|textit)\b")
_VERBS = frozenset({"is", "are", "was", "were", "equals", "becomes", "gives", "has", "have", "be", "gets"})
_FINITE = re.compile(
    r"(?:[0-9A-Za-z\s+=,.()\[\]{}<>|$%&-]|\\[\\{}$%!,;: ]"
    r"|\\[dt]?frac\s*(?:\{-?[\w+ -]*\}\s*\{[1-9][0-9]*\}|[1-9]\s*[1-9])|[0-9]\s*/\s*[1-9]|\^(?:[0-9]|\{[0-9]{1,2}\})"
    r"|\^\s*\{?\\circ\}?|_\{?[0-9]{1,2}\}?"
    r"|\\(?:sqrt(?!\s*\[)|pi|text|mbox|mathrm|left|right|le|leq|ge|geq|lt|gt|in|cup|cap|pm|cdot|times|infty|begin|end|quad)"
    r"(?![A-Za-z]))*"
)
"""Pattern of digits, variables, sums, products, roots, small powers, divisions by a number: never infinite or huge."""
MAX_WORDS = 6
"""Maximum number of words of a gold answer; anything longer is a sentence."""
MAX_DIGITS = 4000
"""Maximum number of digits; by default, Python's int() refuses more than 4,300."""


def answer_part(text: str, template: str) -> str | None:
    """Return the part of a completion that may hold the answer; None if the template's format is broken.

    `r1_distill`: the prompt has opened <think>, so exactly one </think> must follow, with the answer after
    it (arXiv 2510.26788, the authors' grader). Other templates: the whole text.
    """
    if template != "r1_distill":
        return text
    _, mark, rest = text.partition(_THINK_END)
    return rest if mark and _THINK_END not in rest else None


def last_boxed(text: str) -> str | None:
    """Return the content of the last \\boxed{...} or \\fbox{...}; None if there is none, or it never closes."""
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
    """Return the boxed answer of a completion, or None if it has none and is therefore wrong."""
    part = answer_part(text, template)
    return None if part is None else last_boxed(part)


def gold_answer(gold: str) -> str:
    """Extract the answer from a gold field, without markup and in ASCII.

    The answer is the content of its box or <answer> tag, or the text after `####` (GSM8K) or "The answer is"; else it
    is the whole field.
    """
    text = ascii_signs(gold).strip()
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    tagged = _ANSWER_TAG.findall(text)
    text = tagged[-1].strip() if tagged else text
    text = without_markup(last_boxed(text) or text)
    said = _ANSWER_IS.fullmatch(text)
    return without_markup(said[1].strip()) if said else text


def look_alike(gold: str, candidate: str) -> bool:
    """Return whether two answers differ at most in spacing and in LaTeX that has no meaning."""
    return _plain(gold) == _plain(candidate)


def _plain(answer: str) -> str:
    for pattern, replacement in _SAME_LOOK:
        answer = pattern.sub(replacement, answer)
    return answer


def spell_plainly(answer: str) -> str:
    """Rewrite an answer as math-verify parses it best: no $...$, markup or final period; plain numbers, ASCII signs."""
    answer = _unwrapped(ascii_signs(answer))
    for pattern, replacement in _SPELLING:
        answer = pattern.sub(replacement, answer).strip()
    answer = _REPEATING.sub(_fraction, answer)
    return answer if "_" in answer else _FLOAT.sub(_plain_float, answer)  # 1E5_{16} has no exponent


def _unwrapped(answer: str) -> str:
    """Strip $...$, \\(...\\), {...}, markup and a final period, until none is left."""
    before = None
    while before != answer:
        before, answer = answer, without_markup(_FINAL_MARK.sub("", answer.strip()))
        for wrapper in _WRAPPERS:
            found = wrapper.fullmatch(answer)
            answer = found[1] if found else answer
        if answer.startswith("{") and last_boxed(f"\\boxed{answer}") == answer[1:-1].strip():
            answer = answer[1:-1]
    return answer


def _fraction(repeating: re.Match[str]) -> str:
    """Write 0.1\\overline{6} as 15/90; leave numbers with more digits than int() reads."""
    sign, whole, fixed, turn = repeating.groups()
    if len(whole + fixed + turn) > MAX_DIGITS:
        return repeating[0]
    top = int(whole + fixed + turn) - int(whole + fixed or "0")
    return f"{sign}\\frac{{{top}}}{{{(10 ** len(turn) - 1) * 10 ** len(fixed)}}}"


def plain_number(text: str) -> str | None:
    """Write a number without an exponent (1e-05 -> 0.00001); None if it is not a number, not finite, or too long."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    if not number.is_finite() or abs(number.adjusted()) > MAX_DIGITS or len(text) > MAX_DIGITS:
        return None
    return f"{number:f}"


def _plain_float(found: re.Match[str]) -> str:
    """Write 1e-5, 1.5e-3, 1e+22, 2e3 and 1E5 in digits; leave 2e-3, which may be 2e - 3."""
    return found[0] if _may_be_sum(found) else plain_number(found[0]) or found[0]


def _may_be_sum(found: re.Match[str]) -> bool:
    """Return whether e may be Euler's number: no sum is written like 1e-5, 1.5e-3, 2e-05 or 2e+22."""
    front, letter, sign, digits = found.groups()
    # More than two digits are outside the range, and may be more than int() reads.
    far = len(digits) > 2 or (len(digits) == 2 and int(sign + digits) not in range(-4, 16))
    as_printed = digits.startswith("0") or far
    return letter == "e" and bool(sign) and front != "1" and "." not in front and not as_printed


def readings(value: str) -> list[str]:
    """Return the possible readings of a value: itself, and 0.002 for 2e-3, which spell_plainly leaves ambiguous."""
    front = "-" if value.startswith("-") else ""
    found = _FLOAT.fullmatch(value.removeprefix("-"))
    number = plain_number(found[0]) if found and _may_be_sum(found) else None
    return [value] if number is None else [value, front + number]


def is_surely_finite(answer: str) -> bool:
    """Return whether an answer has such a simple form that its value is finite and equals itself."""
    return _FINITE.fullmatch(answer) is not None and "inf" not in answer.replace("\\infty", "")


def shape_fault(gold: str) -> str | None:
    """Return the reason why no box can hold this gold answer, or no model would write it; None without one."""
    answer = gold_answer(gold)
    if not re.search(r"\w", answer) and not re.search(r"\\[a-zA-Z]", answer):
        return "it holds no answer"
    if answer.lower() in ("nan", "null"):
        return f"it is {answer}, a missing value"
    if last_boxed(f"\\boxed{{{answer}}}") != answer:
        return "its braces do not balance, so no box can hold it"
    words = _WORD.findall(_MARKUP.sub(" ", answer))
    around_value = len(words) > 1 and re.search(r"\d", answer) and _VERBS & {word.lower() for word in words}
    if len(words) > MAX_WORDS or around_value:
        return f"it is a sentence ({len(words)} words), which only the same sentence would match; give the value alone"
    return None
