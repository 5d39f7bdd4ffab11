"""Configurations as TOML.

A section is a table, a list of sections an array of tables. TOML has no null, so an absent value is written as "none",
which every optional key accepts; in the tables of a list, it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from betterhalf.config.schema import RunConfig

_ABSENT = "none"
"""Value that makes an optional key absent."""
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def toml_text(config: RunConfig) -> str:
    """Return every setting as TOML, section by section; loading the text restores the configuration."""
    return "\n".join(_lines(config.model_dump(mode="json"), "")).strip() + "\n"


def toml_value(value: object) -> str:
    """Return a value as TOML; None as `none`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Sequence):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        present = [f"{toml_key(key)} = {toml_value(item)}" for key, item in value.items() if item is not None]
        return f"{{ {', '.join(present)} }}" if present else "{}"
    return str(value)


def toml_key(key: str) -> str:
    """Return a key as TOML: in quotes, unless it consists of letters, digits, underscores and dashes."""
    return key if _BARE_KEY.fullmatch(key) else _quoted(key)


def _lines(section: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield a section's header and plain values, then its inner sections; the root has no header."""
    inner = {key: value for key, value in section.items() if (isinstance(value, Mapping) and value) or _is_array(value)}
    plain = {key: _ABSENT if value is None else value for key, value in section.items() if key not in inner}
    if name and plain:
        yield from ("", f"[{name}]")
    for key, value in plain.items():
        yield f"{toml_key(key)} = {toml_value(value)}"
    for key, value in inner.items():
        path = f"{name}.{toml_key(key)}" if name else key
        if isinstance(value, Mapping):
            yield from _lines(value, path)
        for item in value if _is_array(value) else ():
            yield from ("", f"[[{path}]]")
            yield from (f"{toml_key(leaf)} = {toml_value(held)}" for leaf, held in item.items() if held is not None)


def _is_array(value: object) -> bool:
    """Return True for a list of sections; an empty list is a plain value."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _quoted(text: str) -> str:
    """Return a TOML basic string, with quotes, backslashes and control characters escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
