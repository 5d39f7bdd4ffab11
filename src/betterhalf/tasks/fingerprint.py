"""Digests of a task's rows and of what its reward is made of: a resumed run must find the same ones."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from betterhalf.tasks.row import Row

ROW_BYTES = 8
"""Length of a row's digest: in a million rows, the chance that two different ones agree is under 1e-7."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecord:
    """The data that a run learns from, as a checkpoint keeps it."""

    row_digests: bytes
    """ROW_BYTES for each row, in order."""
    reward: dict[str, str]
    """Settings and code that make rewards and prompts from the rows."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_digests) // ROW_BYTES

    def row(self, index: int) -> str:
        """Digest of one row, in hexadecimal."""
        return self.row_digests[index * ROW_BYTES : (index + 1) * ROW_BYTES].hex()

    def to_json(self) -> dict[str, Any]:
        """The record as JSON can hold it."""
        return {"rows": self.rows, "row_digests": base64.b64encode(self.row_digests).decode(), "reward": self.reward}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The record that `to_json` wrote."""
        return cls(row_digests=base64.b64decode(values["row_digests"]), reward=dict(values["reward"]))

    def rows_that_differ(self, other: DataRecord) -> list[int]:
        """Positions that both have, and whose rows are not the same."""
        pairs = zip(_split(self.row_digests), _split(other.row_digests), strict=False)
        return [index for index, (left, right) in enumerate(pairs) if left != right]

    def reward_changes(self, other: DataRecord) -> list[str]:
        """`name: old -> new` of everything about the reward that is not the same in `other`."""
        names = sorted(self.reward.keys() | other.reward.keys())
        pairs = {name: (self.reward.get(name, "none"), other.reward.get(name, "none")) for name in names}
        return [f"{name}: {old} -> {new}" for name, (old, new) in pairs.items() if old != new]


def row_digest(row: Row) -> bytes:
    """Digest of a row's content, not of its place.

    Taken before the chat template: templates may print the date, and a run may be resumed on another day.
    """
    return _digest([row.question, row.answer], ROW_BYTES)


def reward_source(settings: Mapping[str, Any], *, modules: Iterable[str], packages: Iterable[str]) -> dict[str, str]:
    """Collect the settings and the code that make rewards and prompts.

    Args:
        settings: those of the task that decide prompts and rewards.
        modules: files of this package that hold the reward.
        packages: packages that the reward calls.
    """
    folder = Path(__file__).parent
    code = hashlib.blake2b(digest_size=8)
    for name in modules:
        code.update((folder / f"{name}.py").read_bytes())
    return {
        **{name: str(value) for name, value in settings.items()},
        "code": code.hexdigest(),
        **{name: _version(name) for name in packages},
    }


def text_digest(text: str) -> str:
    """Digest of one text, such as a chat template."""
    return _digest([text], 8).hex()


def _digest(texts: Iterable[str], size: int) -> bytes:
    found = hashlib.blake2b(digest_size=size)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "big") + data)
    return found.digest()


def _split(digests: bytes) -> list[bytes]:
    return [digests[start : start + ROW_BYTES] for start in range(0, len(digests), ROW_BYTES)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
