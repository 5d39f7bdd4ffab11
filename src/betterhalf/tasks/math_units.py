"""Split an answer into a value and the unit written after it."""

from __future__ import annotations

import re

_TEXT_UNIT = re.compile(
    r"(.*[\d})%a-zA-Z$])(?:\\[ ,;:]|[\s~])*\\(?:text|mbox|mathrm|textrm)\s*\{([^{}]*)\}(\^\{?\d\}?)?", re.S
)
_BARE_UNIT = re.compile(
    r"(.*[\d})])(?:\\[ ,;:]|[\s~])*((?:[A-Za-z]+\.?)(?:\s+[A-Za-z]+\.?){0,2})(\^\{?\d\}?)?", re.DOTALL
)
_RATE = re.compile(
    r"(.*[\d})%$])(?:\\[ ,;:]|[\s~])+([A-Za-z]+(?:\^?\{?\d\}?)?\s*/\s*[A-Za-z]+(?:\^?\{?\d\}?)?)", re.DOTALL
)
"""Pattern of a rate such as 5 km/h, but not 5m/s: without a space, it is a quotient of variables."""
_SHORT = frozenset({"mm", "cm", "dm", "km", "ft", "in", "yd", "mi", "kg", "mg", "lb", "lbs", "oz", "ml", "mph", "sq"})
_SHORT_WORDS = frozenset(
    {"day", "men", "sec", "min", "hrs", "hr", "yr", "yrs", "kph", "feet", "inch", "cup", "tsp", "ton", "gal"}
)
_NOT_UNITS = frozenset(
    {
        *("or", "and", "if", "is", "for", "when", "where", "not", "over", "times", "plus", "minus", "mod", "modulo"),
        *("hundred", "thousand", "million", "billion", "trillion", "dozen", "percent", "base", "even", "odd", "prime"),
        *("pi", "sqrt", "sin", "cos", "tan", "log", "exp", "infinity", "infty"),
        *("alpha", "beta", "gamma", "delta", "theta", "lambda", "sigma", "omega"),
    }
)
"""Words after a number that are part of its value, or turn it into a condition."""
_POWER = re.compile(r"(square|sq|cubic|cu|)(.*?)(\d?)", re.DOTALL)
_SAME = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram",
    "kg": "kilogram",
    "lb": "pound",
    "s": "sec second",
    "min": "minute",
    "h": "hr hour",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "year yr",
    "dollar": "dollar",
    "cent": "cent",
    "l": "liter litre",
    "ml": "milliliter millilitre",
    "am": "am",
    "pm": "pm",
    "radian": "radian rad",
    "degree": "degree deg",
}
_NAME = {word: unit for unit, words in _SAME.items() for word in (unit, *words.split())}
_RATES = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h"}
_PER = re.compile(r"/|\bper\b")
Unit = tuple[tuple[str, str], ...]
"""(name, power) of each factor; a rate has two factors: ((km, 1), (h, 1))."""


def split_unit(answer: str) -> tuple[str, str]:
    """Split an answer into value and unit: (5, cm) for `5 \\text{ cm}` or `5 cm`; the unit is empty if there is none.

    A single letter after a number, as in 2h, is a variable; 5 m/s has a unit.
    """
    found = _RATE.fullmatch(answer)
    if found and _name(found[2]) is not None:
        return found[1].strip(), found[2]
    found = _TEXT_UNIT.fullmatch(answer)
    if found and _may_be_unit(found[2]):
        return found[1].strip(), found[2] + (found[3] or "")
    found = _BARE_UNIT.fullmatch(answer)
    if found and _may_be_unit(found[2]) and _is_word(found[2].split()[0].rstrip(".").lower()):
        return found[1].strip(), found[2] + (found[3] or "")
    return answer, ""


def units_differ(first: str, second: str) -> bool:
    """Return whether both units are known and different; a missing or unknown unit agrees with every other."""
    names = [_name(unit) for unit in (first, second)]
    return None not in names and names[0] != names[1]


def _may_be_unit(text: str) -> bool:
    words = re.findall(r"[a-z]+", text.lower())
    return bool(words) and not re.search(r"\d", text) and not _NOT_UNITS & set(words) and len(words) <= 4


def _is_word(word: str) -> bool:
    return len(word) >= 4 or word in _SHORT or word in _SHORT_WORDS


def _name(unit: str) -> Unit | None:
    """Return the canonical names and powers of a unit: ((ft, 2),) of `sq. ft`; None for one not in the table."""
    bare = re.sub(r"[.{}^]|\\[ ,;:]", " ", unit).strip().lower()
    parts = [_simple_name(part) for part in _PER.split(_RATES.get(bare, bare))]
    known = tuple(part for part in parts if part is not None)
    return known if len(known) == len(parts) else None


def _simple_name(unit: str) -> tuple[str, str] | None:
    found = _POWER.fullmatch(re.sub(r"\s", "", unit))
    assert found is not None  # the pattern matches any text
    area, word, power = found.groups()
    name = _NAME.get(word) or _NAME.get(word.removesuffix("s"))
    return (name, power or {"s": "2", "c": "3"}.get(area[:1], "1")) if name else None
