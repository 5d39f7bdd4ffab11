"""`tokens.parquet`: one row for each token and pair, for analyses beyond the report."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from betterhalf.errors import RunError
from betterhalf.examine.pairs import Sample, Scores


class TokenTable:
    """Rows so far; the file on disk is complete after every pair."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: list[Any] = []

    def add(self, train: str, sample: Sample, trainer_logprobs: Scores) -> None:
        """Add a pair's tokens and replace the file.

        Raises:
            RunError: the file cannot be written; the previous one is untouched.
        """
        import pyarrow
        import pyarrow.parquet

        self._parts.append(pyarrow.table(_columns(train, sample, trainer_logprobs)))
        temporary = self._path.with_name(f".{self._path.name}.part")
        try:
            pyarrow.parquet.write_table(pyarrow.concat_tables(self._parts), temporary, compression="zstd")
            os.replace(temporary, self._path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            reason = error.strerror or error
            raise RunError(f"{self._path} could not be written ({reason}). Free some space, or set run_dir.") from error


def _columns(train: str, sample: Sample, trainer_logprobs: Scores) -> dict[str, Sequence[Any]]:
    completions = [completion for _, completion in sample.items]
    positions = sample.only_scored([range(len(completion.token_ids)) for completion in completions])
    columns: dict[str, Iterable[Iterable[Any]]] = {
        "completion": [[number] * len(row) for number, row in enumerate(positions)],
        "position": positions,
        "token_id": sample.only_scored([completion.token_ids for completion in completions]),
        "behavior_logprob": sample.only_scored([completion.behavior_logprobs for completion in completions]),
        "trainer_logprob": sample.only_scored(trainer_logprobs),
    }
    flat = {name: list(chain.from_iterable(rows)) for name, rows in columns.items()}
    tokens = len(flat["position"])
    return {"train": [train] * tokens, "rollout": [sample.rollout] * tokens, **flat}
