"""`tokens.parquet`: one row for each token and pair, for whoever wants to look further than the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from betterhalf.errors import RunError
from betterhalf.runs.examine.pairs import Sample, Scores


class TokenTable:
    """The rows so far; the file on disk is whole after every pair."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: list[Any] = []

    def add(self, train: str, sample: Sample, trainer_logprobs: Scores) -> None:
        """Add a pair's tokens and replace the file.

        Raises:
            RunError: it cannot be written; the file that was there is untouched.
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
    lengths = [len(completion.token_ids) for completion in completions]
    tokens = sum(lengths)
    return {
        "train": [train] * tokens,
        "rollout": [sample.rollout] * tokens,
        "completion": [number for number, length in enumerate(lengths) for _ in range(length)],
        "position": [position for length in lengths for position in range(length)],
        "token_id": [token for completion in completions for token in completion.token_ids],
        "behavior_logprob": [value for completion in completions for value in completion.behavior_logprobs],
        "trainer_logprob": [value for row in trainer_logprobs for value in row],
    }
