"""Parse `key=value` settings of the command line into the nested form of TOML files."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from betterhalf.config import keys
from betterhalf.config.sanity import ArmTables
from betterhalf.config.schema import RunConfig, Section
from betterhalf.errors import ConfigError

RUN_DIR_KEY = "run_dir"
"""Key of the run folder, on the command line only; it is not part of the configuration."""

SHORT_KEYS = {"arms": "sanity.arms"}
"""Short keys, on the command line and as keyword arguments only."""


def split_overrides(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take `run_dir=PATH` out of the overrides: it is the place of a run, not part of its configuration.

    Returns:
        The last PATH given, or None; and the other overrides in order.

    Raises:
        ConfigError: an argument is not `key=value`, or PATH is empty.
    """
    run_dir, others = None, []
    for argument in arguments:
        key, value = _split(argument)
        if key == RUN_DIR_KEY:
            if not value:
                raise ConfigError("run_dir is empty. Write run_dir=PATH.")
            run_dir = value
        else:
            others.append(argument)
    return run_dir, others


def parse_overrides(overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Return each override as a nested dictionary.

    Raises:
        ConfigError: an override is not `key=value`.
    """
    return [_nested(*_split(override)) for override in overrides]


def expand(layer: Mapping[str, Any], holders: Sequence[type[Section]] = (RunConfig,)) -> dict[str, Any]:
    """Expand shorthands (`precision = "fp16"` sets `precision.preset`) and turn "none" into None in optional keys."""
    expanded = {}
    for key, value in layer.items():
        info = keys.field(holders, key)
        expanded[key] = value if info is None else _expand_value(value, info.annotation)
    return expanded


def merge(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `layer` over `base`. A section whose `type` changes drops the keys of the other type."""
    changes_type = "type" in base and layer.get("type", base["type"]) != base["type"]
    merged = {} if changes_type else dict(base)
    for key, value in layer.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def expand_table(table: Any) -> Any:
    """Expand a table of settings whose keys may be dotted, as an arm and a sweep have them.

    `"engine.rounding" = "aligned"` becomes `{"engine": {"rounding": "aligned"}}`.
    """
    if not isinstance(table, Mapping):
        return table
    expanded: dict[str, Any] = {}
    for key, value in table.items():
        expanded = merge(expanded, expand(_at(key.split("."), value)))
    return expanded


def _expand_value(value: Any, annotation: Any) -> Any:
    if annotation == ArmTables and isinstance(value, Mapping):
        return {name: expand_table(table) for name, table in value.items()}
    named = keys.tables(annotation)
    if named and isinstance(value, Mapping):
        return {name: _expand_table(table, named) for name, table in value.items()}
    inner = keys.sections(annotation)
    if isinstance(value, Mapping):
        return expand(value, inner) if inner else dict(value)
    short = keys.shorthand(annotation)
    if isinstance(value, str) and short is not None:
        return {short: value}
    return None if value == "none" and keys.is_optional(annotation) else value


def _expand_table(table: Any, holders: tuple[type[Section], ...]) -> Any:
    """Expand a table that the user names; a bare value is its type, or the key of its shorthand."""
    short = "type" if len(holders) > 1 else holders[0].shorthand
    if isinstance(table, str) and short is not None:
        return {short: table}
    return expand(table, holders) if isinstance(table, Mapping) else table


def _split(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    key = key.strip()
    if not equals or not key or key.startswith("-"):
        example = key.lstrip("-") if equals and key.strip("-") else "precision"
        raise ConfigError(f"{override!r} is not a setting. Write key=value, such as {example}={value or 'fp16'}.")
    return key, value.strip()


def _nested(key: str, text: str) -> dict[str, Any]:
    path = SHORT_KEYS.get(key, key).split(".")
    info = keys.find(path)
    while info is not None and (short := keys.shorthand(info.annotation)) is not None:
        path.append(short)
        info = keys.find(path)
    return _at(path, _literal(text) if info is None else _value(text, info.annotation))


def _at(path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return nested dictionaries that hold `value` at `path`."""
    for part in reversed(path[1:]):
        value = {part: value}
    return {path[0]: value}


def _value(text: str, annotation: Any) -> Any:
    """Convert `text` to the type of a field; text that does not fit is kept, and the schema refuses it."""
    value = _literal(text)
    if keys.items(annotation):
        return [value] if isinstance(value, dict) else value
    if (
        keys.is_tuple(annotation)
        and not isinstance(value, list)
        and not (text == "none" and keys.is_optional(annotation))
    ):
        parts = [part.strip() for part in text.split(",")]
        return parts if keys.holds_text(annotation) else [_literal(part) for part in parts]
    if keys.is_text(annotation) and not isinstance(value, str):
        return text
    return value


def _literal(text: str) -> Any:
    """Parse a TOML value, or a JSON list or object; otherwise return the text. True and false in any case."""
    try:
        return tomllib.loads(f"value = {text.lower() if text.lower() in ('true', 'false') else text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return _json_literal(text) if text.startswith(("[", "{")) else text


def _json_literal(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
