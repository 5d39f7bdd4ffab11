"""Digests of a task's rows and of the code behind its rewards; a resumed run must find the same ones."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from betterhalf.tasks.row import Row

ROW_BYTES = 8
"""Bytes of a row's digest: among a million different rows, the chance of a collision is below 1e-7."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecord:
    """Digests of the data that a run trains on, as saved in a checkpoint."""

    row_digests: bytes
    """Concatenated digests, `ROW_BYTES` for each row, in order."""
    reward: dict[str, str]
    """Settings, code digests and package versions that determine prompts and rewards."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_digests) // ROW_BYTES

    def row(self, index: int) -> str:
        """Return the digest of one row, in hexadecimal."""
        return self.row_digests[index * ROW_BYTES : (index + 1) * ROW_BYTES].hex()

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return {"rows": self.rows, "row_digests": base64.b64encode(self.row_digests).decode(), "reward": self.reward}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read a record that `to_json` wrote."""
        return cls(row_digests=base64.b64decode(values["row_digests"]), reward=dict(values["reward"]))

    def rows_that_differ(self, other: DataRecord) -> list[int]:
        """Return the positions, among those that both records have, where the rows differ."""
        pairs = zip(_split(self.row_digests), _split(other.row_digests), strict=False)
        return [index for index, (left, right) in enumerate(pairs) if left != right]

    def reward_changes(self, other: DataRecord) -> list[str]:
        """Return `name: old -> new` for every entry of `reward` that differs in `other`."""
        names = sorted(self.reward.keys() | other.reward.keys())
        pairs = {name: (self.reward.get(name, "none"), other.reward.get(name, "none")) for name in names}
        return [f"{name}: {old} -> {new}" for name, (old, new) in pairs.items() if old != new]


def row_digest(row: Row) -> bytes:
    """Return the digest of a row's content, without its place.

    It is computed before the chat template: templates may print the date, and a run may be resumed on another day.
    """
    return _digest([row.question, row.answer, *([row.context] if row.context else [])], ROW_BYTES)


def reward_source(settings: Mapping[str, Any], *, modules: Iterable[str], packages: Iterable[str]) -> dict[str, str]:
    """Collect the settings, the code digest and the package versions that determine prompts and rewards.

    Args:
        settings: task settings that affect prompts or rewards.
        modules: modules of this package that compute the reward.
        packages: other packages that the reward uses.
    """
    folder = Path(__file__).parent
    code = hashlib.blake2b(digest_size=8)
    for name in modules:
        code.update(code_text((folder / f"{name}.py").read_text(encoding="utf-8")).encode())
    return {
        **{name: str(value) for name, value in settings.items()},
        "code": code.hexdigest(),
        **{name: _version(name) for name in packages},
    }


def code_text(source: str) -> str:
    """Return the tokens of a module without comments, docstrings and layout, which change no reward."""
    prose = {
        (node.lineno, node.col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    tokens = [
        token.string if token.string.strip() else tokenize.tok_name[token.type]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE) and token.start not in prose
    ]
    return "\n".join(tokens)


def text_digest(text: str) -> str:
    """Return the digest of one text, such as a chat template."""
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
