"""Strip markup around an answer, and convert non-ASCII signs, both of which models and data sets use beside LaTeX."""

from __future__ import annotations

import re
import unicodedata

_SIGNS = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{HYPHEN}": "-",
    "\N{NON-BREAKING HYPHEN}": "-",
    "\N{FRACTION SLASH}": "/",
    "\N{DIVISION SLASH}": "/",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{DIVISION SIGN}": r"\div ",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{GREEK SMALL LETTER PI}": r"\pi ",
    "\N{INFINITY}": r"\infty ",
    "\N{ALMOST EQUAL TO}": r"\approx ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{DEGREE SIGN}": r"^\circ",
    "\N{NO-BREAK SPACE}": " ",
    "\N{IDEOGRAPHIC SPACE}": " ",
    "\N{IDEOGRAPHIC FULL STOP}": ".",
    "\N{IDEOGRAPHIC COMMA}": ",",
    "\N{EURO SIGN}": r"\$",
    "\N{POUND SIGN}": r"\$",
    "\N{YEN SIGN}": r"\$",
    "\N{INDIAN RUPEE SIGN}": r"\$",
}
"""Sign -> ASCII or LaTeX. All currency signs become $, which the grader ignores: it does not distinguish currencies."""
_VARIANTS = frozenset({"<wide>", "<narrow>", "<small>", "<font>"})
"""Unicode decomposition types of characters that are variants of others in width or typeface."""
_SUPERSCRIPTS = re.compile("[\u00b2\u00b3\u00b9\u2070\u2074-\u2079\u207a\u207b]+")
_EMPHASIS = (
    re.compile(r"(?<![\w)\]}*])\*\*(?=[^\s*])([^*]+?)(?<=\S)\*\*(?![\w(*])"),
    re.compile(r"(?<![\w)\]}])__(?=[^\s_])([^_]+?)(?<=\S)__(?![\w(])"),
)
"""Bold text in Markdown, but not the powers in 2**3**4."""
_AROUND = (
    re.compile(r"\*(?=\S)([^*]+)(?<=\S)\*"),
    re.compile(r"_(?=[^\s{])([^_]+)(?<=\S)_"),
    re.compile(r"`+([^`]+)`+"),
    re.compile(r"<([a-zA-Z]\w*)>(?P<inside>.*)</\1>", re.DOTALL),
    re.compile(r"(?:=|\\approx(?![a-zA-Z])|\\simeq(?![a-zA-Z])|~)\s*(?=[^\s=~])(.+)", re.DOTALL),
)
"""Markup around a whole answer (emphasis, code, a tag), and a relation without a left-hand side."""
_NUMBER_WORD = (
    r"zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    r"|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|billion"
)
_IN_WORDS = re.compile(rf"(-?[\d.,]+)\s*\((?:(?:minus|negative|and|{_NUMBER_WORD})\b[\s,-]*)+\)", re.IGNORECASE)


def ascii_signs(text: str) -> str:
    """Return a text with full-width and other non-ASCII digits, letters and signs as ASCII or LaTeX."""
    if text.isascii():
        return text
    text = _SUPERSCRIPTS.sub(_exponent, text)
    return "".join(char if char.isascii() else _ascii_sign(char) for char in text)


def without_markup(answer: str) -> str:
    """Return an answer without emphasis, code marks, tags, a leading `=` or `\\approx`, or its number in words."""
    before = None
    while before != answer:
        before = answer
        for pattern in _EMPHASIS:
            answer = pattern.sub(r"\1", answer)
        for pattern in _AROUND:
            found = pattern.fullmatch(answer)
            answer = found[found.lastindex or 0].strip() if found else answer
        found = _IN_WORDS.fullmatch(answer)
        answer = found[1] if found else answer
    return answer


def _ascii_sign(char: str) -> str:
    if char in _SIGNS:
        return _SIGNS[char]
    kind = unicodedata.decomposition(char).partition(" ")[0]
    if kind == "<fraction>":
        top, _, bottom = unicodedata.normalize("NFKC", char).partition("\N{FRACTION SLASH}")
        return rf"\frac{{{top}}}{{{bottom}}}" if bottom else char
    if kind in _VARIANTS:
        return "".join(_SIGNS.get(part, part) for part in unicodedata.normalize("NFKC", char))
    digit = unicodedata.decimal(char, None)
    return char if digit is None else str(digit)


def _exponent(found: re.Match[str]) -> str:
    digits = unicodedata.normalize("NFKC", found[0]).replace("\N{MINUS SIGN}", "-")
    if digits == "0":
        return r"^\circ"  # 90 with a raised zero is an angle
    return f"^{digits}" if len(digits) == 1 else f"^{{{digits}}}"
