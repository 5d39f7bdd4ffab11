"""Configurations as TOML, for people to read and to keep.

Sections are tables, lists of sections arrays of tables; TOML has no null, so absent values are left out. In the ratios
of an algorithm, where leaving a bound out means the preset's, an absent one is written as "none".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from betterhalf.config.schema import RunConfig

_ABSENT = "none"
"""Word that makes an optional value absent."""
_OVER_A_PRESET = ("algorithm.surrogate", "algorithm.correction")
"""Sections that change what a preset gives."""


def toml_text(config: RunConfig) -> str:
    """Every setting, section by section. Loading the text gives the configuration back."""
    return "\n".join(_lines(config.model_dump(mode="json"), "")).strip() + "\n"


def toml_value(value: object) -> str:
    """A value as TOML writes it; an absent one as `none`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Sequence):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        present = [f"{key} = {toml_value(item)}" for key, item in value.items() if item is not None]
        return f"{{ {', '.join(present)} }}" if present else "{}"
    return str(value)


def _lines(section: Mapping[str, Any], name: str) -> Iterator[str]:
    """The plain values of a section below its header, then the sections in it; the root has no header."""
    inner = {key: value for key, value in section.items() if isinstance(value, Mapping) or _is_array(value)}
    absent = _ABSENT if name in _OVER_A_PRESET else None
    values = {key: absent if value is None else value for key, value in section.items() if key not in inner}
    plain = {key: value for key, value in values.items() if value is not None}
    if name and plain:
        yield from ("", f"[{name}]")
    for key, value in plain.items():
        yield f"{key} = {toml_value(value)}"
    for key, value in inner.items():
        path = f"{name}.{key}" if name else key
        if isinstance(value, Mapping):
            yield from _lines(value, path)
        for item in value if _is_array(value) else ():
            yield from ("", f"[[{path}]]")
            yield from (f"{leaf} = {toml_value(held)}" for leaf, held in item.items() if held is not None)


def _is_array(value: object) -> bool:
    """Whether a value is a list of sections; an empty list is a plain value."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _quoted(text: str) -> str:
    """A basic string: quotes, backslashes and control characters escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
