"""Messages for an invalid configuration, one line for each error: the key, the given value, and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from betterhalf.config import keys
from betterhalf.config.precision import about_emulated
from betterhalf.config.render import toml_value
from betterhalf.config.schema import RunConfig, Section

_Location = tuple[str | int, ...]


def explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    """Return the message of a ConfigError.

    Args:
        error: error of validating the merged configuration.
        origins: source of each dotted key: the name of a file, or the command line.
    """
    lines = list(dict.fromkeys(_line(details, origins) for details in error.errors(include_url=False)))
    if len(lines) == 1:
        return lines[0]
    return "\n  ".join([f"the configuration has {len(lines)} errors:", *lines])


def _line(details: ErrorDetails, origins: Mapping[str, str]) -> str:
    path = _path(details["loc"])
    what = _EXPLANATIONS.get(details["type"], _fallback)(details, path)
    origin = _origin(_names(path), origins)
    return f"{what} [{origin}]" if origin else what


def _origin(names: list[str], origins: Mapping[str, str]) -> str | None:
    """Return the source of the key, those of the keys in it, or that of the list that holds it; None for a default."""
    key = ".".join(names)
    inside = dict.fromkeys(origins[k] for k in origins if key and k.startswith(f"{key}."))
    around = (".".join(names[:end]) for end in range(len(names) - 1, 0, -1))
    return origins.get(key) or ", ".join(inside) or next((origins[k] for k in around if k in origins), None)


def _path(location: _Location) -> _Location:
    """Remove the tags that the validator adds for a field with several forms."""
    path: list[str | int] = []
    holders: tuple[type[Section], ...] = (RunConfig,)
    tagged = named = False
    for part in location:
        if tagged:
            tagged = False
            continue
        path.append(part)
        if isinstance(part, int):
            continue
        if named:  # the name of a table, such as that of a data set to evaluate
            tagged, named = len(holders) > 1, False
            continue
        info = keys.field(holders, part)
        named = info is not None and bool(keys.tables(info.annotation))
        tagged = info is not None and not named and keys.alternatives(info.annotation) > 1
        holders = _inner(info.annotation) if info else ()
    return tuple(path)


def _inner(annotation: Any) -> tuple[type[Section], ...]:
    """Return the sections in a field: its own, or those of a list or of named tables."""
    return keys.sections(annotation) or keys.items(annotation) or keys.tables(annotation)


def _names(path: _Location) -> list[str]:
    return [str(part) for part in path if not isinstance(part, int)]


def _key(path: _Location) -> str:
    """Return the dotted key, with positions in lists of sections: `watchdog.levels[0].metric`."""
    key = ""
    for end, part in enumerate(path):
        if not isinstance(part, int):
            key += f".{part}" if key else part
        elif keys.items(_annotation(path[:end])):
            key += f"[{part}]"
    return key


def _annotation(path: _Location) -> Any:
    info = keys.find(_names(path))
    return info.annotation if info else None


def _given(details: ErrorDetails, path: _Location) -> str:
    """Return `key = value`, as in TOML."""
    return f"{_key(path)} = {toml_value(details['input'])}"


def _unknown(details: ErrorDetails, path: _Location) -> str:
    held = keys.items(_annotation(path[:-1])) or keys.tables(_annotation(path[:-2]))
    if held and keys.find(_names(path)) is None:
        known = list(dict.fromkeys(name for section in held for name in section.model_fields))
        hint = keys.nearest(path[-1], known)
        fix = f"Did you mean {hint!r}?" if hint else f"Its keys are {', '.join(known)}."
        return f"unknown key {_key(path)!r}. {fix}"
    key = _first_leaf(".".join(_names(path)), details["input"])
    if keys.find(_names(path)) is not None:
        section = ".".join(_names(path)[:-1])
        return f"{key} is not a key of the chosen {section}.type. Remove it, or set another {section}.type."
    fix = keys.advice(key) or "`betterhalf config EXPERIMENT` lists the valid keys."
    return f"unknown key {key!r}. {fix}"


def _first_leaf(key: str, value: object) -> str:
    """Extend the key of a wrong section by the first key in it, which makes it easier to recognise."""
    while isinstance(value, Mapping) and value:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return key


def _missing(details: ErrorDetails, path: _Location) -> str:
    if isinstance(path[-1], int):
        wanted = len(get_args(_annotation(path[:-1])))
        return f"{_key(path)} has too few values. Give all {wanted}, separated by commas."
    sections = keys.sections(_annotation(path[:-1])) or keys.tables(_annotation(path[:-2]))
    chosen = [section for section in sections if _type_of(section) in details["loc"]]
    info = keys.field(chosen, str(path[-1])) or keys.find(_names(path))
    meaning = f" ({' '.join(info.description.split()).rstrip('.')})" if info and info.description else ""
    return f"{_key(path)} is required{meaning}. Set it."


def _type_of(section: type[Section]) -> str | None:
    """Return the value of `type` that chooses a section; None for a section without types."""
    info = section.model_fields.get("type")
    return info.default if info else None


def _choice(details: ErrorDetails, path: _Location) -> str:
    allowed = keys.choices(_annotation(path))
    hint = keys.nearest(keys.current_value(_names(path)[-1], details["input"]), allowed)
    fix = about_emulated(details["input"]) or (f" Did you mean {hint}?" if hint else "")
    return f"{_given(details, path)} is not one of {', '.join(map(str, allowed))}.{fix}"


def _type_tag(details: ErrorDetails, path: _Location) -> str:
    sections = keys.sections(_annotation(path)) or keys.tables(_annotation(path[:-1]))
    allowed = [str(_type_of(section)) for section in sections]
    given = details["input"].get("type") if isinstance(details["input"], Mapping) else details["input"]
    hint = keys.nearest(given, allowed)
    fix = f" Did you mean {hint}?" if hint else ""
    return f"{'.'.join(_names(path))}.type = {toml_value(given)} is not one of {', '.join(allowed)}.{fix}"


def _not_a_section(details: ErrorDetails, path: _Location) -> str:
    annotation = _annotation(path)
    holders, name = keys.sections(annotation) or keys.items(annotation), _key(path)
    if keys.tables(annotation):
        return f"{_given(details, path)} does not fit: each of its tables has a name. Write [{name}.NAME]."
    example = next(iter(holders[0].model_fields)) if holders else "key"
    return f"{_given(details, path)} does not fit: {name} is a section. Set one of its keys, such as {name}.{example}."


def _must_be(what: str) -> Callable[[ErrorDetails, _Location], str]:
    def explanation(details: ErrorDetails, path: _Location) -> str:
        return f"{_given(details, path)} must be {what.format(**details.get('ctx', {}))}."

    return explanation


def _own_words(details: ErrorDetails, path: _Location) -> str:
    """Return the message of one of the schema's own validators."""
    return str(details["ctx"]["error"])


def _fallback(details: ErrorDetails, path: _Location) -> str:
    return f"{_given(details, path)}: {details['msg']}."


_EXPLANATIONS: dict[str, Callable[[ErrorDetails, _Location], str]] = {
    "extra_forbidden": _unknown,
    "missing": _missing,
    "literal_error": _choice,
    "union_tag_invalid": _type_tag,
    "union_tag_not_found": _type_tag,
    "model_type": _not_a_section,
    "model_attributes_type": _not_a_section,
    "dict_type": _not_a_section,
    "value_error": _own_words,
    "int_type": _must_be("a whole number"),
    "int_from_float": _must_be("a whole number"),
    "int_parsing": _must_be("a whole number"),
    "float_type": _must_be("a number"),
    "finite_number": _must_be("a finite number"),
    "bool_type": _must_be("true or false"),
    "string_type": _must_be("text"),
    "tuple_type": _must_be("a list"),
    "too_short": _must_be("a list of at least {min_length}"),
    "too_long": _must_be("a list of {max_length} values"),
    "greater_than": _must_be("above {gt:g}"),
    "greater_than_equal": _must_be("at least {ge:g}"),
    "less_than": _must_be("below {lt:g}"),
    "less_than_equal": _must_be("at most {le:g}"),
}
"""Explanations by the kinds of errors that the schema can raise."""
