"""Split a record that holds a batch into one record for each completion."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from betterhalf.examine.dump_masks import KNOWN_MASKS

PASSED_ON = ("prompt_id", "finish_reason", "temperature", "rollout_dtype", "trainer_dtype", *KNOWN_MASKS)
"""Keys that have the same name and meaning in a dump."""


def batch_rows(
    record: Mapping[str, Any], key: str, columns: Set[str], for_prompts: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Split a record into one record for each completion of its batch.

    Args:
        record: parsed record, of one completion or of a batch.
        key: column of the completions' tokens.
        columns: columns that are read; others, such as images and rewards, are ignored and may have any shape.
        for_prompts: columns that may have a row for each prompt instead of each completion.

    Raises:
        ValueError: the columns have different lengths.
    """
    completions = record[key]
    if not isinstance(completions, list):
        raise ValueError(f"{key} is not a list")
    if not (completions and isinstance(completions[0], list)):
        return [dict(record)]
    count = len(completions)
    found = {
        name: _column(name, value, count, key, name in for_prompts)
        for name, value in record.items()
        if name in columns and value is not None
    }
    return [{name: column[index] for name, column in found.items()} for index in range(count)]


def _column(name: str, value: Any, count: int, key: str, for_prompts: bool) -> list[Any]:
    """Return a value for each completion from a list of such values, one value for all, or one for each prompt."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) == count:
        return value
    if for_prompts and value and count % len(value) == 0:
        return [row for row in value for _ in range(count // len(value))]
    raise ValueError(f"{name} has {len(value)} rows for {count} {key}")
