"""Reductions: each number of a record declares how several values of it are combined.

Micro-batches, optimizer steps and ranks are all combined by what is declared here, never by the name of a field.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

from betterhalf.types import Reduction

_KEY = "reduction"

REDUCTIONS: dict[Reduction, Callable[[Sequence[float]], float]] = {
    "sum": lambda values: float(sum(values)),
    "mean": statistics.fmean,
    "max": lambda values: float(max(values)),
    "last": lambda values: float(values[-1]),
}
"""Function for each reduction, which combines a sequence of at least one number."""


SUM: Mapping[str, Reduction] = {_KEY: "sum"}
"""Metadata of a dataclass field whose values are added: `tokens: float = field(metadata=SUM)`."""

MEAN: Mapping[str, Reduction] = {_KEY: "mean"}
"""Metadata of a dataclass field whose values are averaged."""

MAX: Mapping[str, Reduction] = {_KEY: "max"}
"""Metadata of a dataclass field whose largest value is kept."""


def declared_reductions(record: type) -> dict[str, Reduction]:
    """Return the reduction of every field of a dataclass that declares one, in order."""
    return {f.name: f.metadata[_KEY] for f in fields(record) if _KEY in f.metadata}
