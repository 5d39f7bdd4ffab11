"""Configurations as TOML, for people to read and to keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from betterhalf.config.schema import RunConfig


def toml_text(config: RunConfig) -> str:
    """Every setting, section by section; absent values are left out. Loading the text gives the configuration back."""
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
        return f"{{ {', '.join(f'{key} = {toml_value(item)}' for key, item in value.items())} }}"
    return str(value)


def _lines(section: Mapping[str, Any], name: str) -> Iterator[str]:
    inner = {key: value for key, value in section.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in section.items() if key not in inner and value is not None}
    if name and plain:
        yield from ("", f"[{name}]")
    for key, value in plain.items():
        yield f"{key} = {toml_value(value)}"
    for key, value in inner.items():
        yield from _lines(value, f"{name}.{key}" if name else key)


def _quoted(text: str) -> str:
    """A basic string: quotes, backslashes and control characters escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
