"""TRL's completions as lines of a dump.

Two shapes are recognised, one completion a line or a whole batch a line:

* what a rollout function returns (`GRPOTrainer(rollout_func=...)`): `prompt_ids`, `completion_ids`, `logprobs`, and
  `env_mask` where an environment wrote some of the tokens;
* what the trainer scores (`_generate_and_score_completions`): padded `prompt_ids` and `completion_ids` with their
  masks, `sampling_per_token_logps` (log mu), and where TRL computed it `old_per_token_logps` (log pi before the
  update).

vLLM's logprobs come as [tokens][top]; the sampled token's is the only one, or is found through `logprob_token_ids`.
TRL's log of completions holds text alone and cannot be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from betterhalf.examine.dump_masks import KNOWN_MASKS, read_masks

_BEHAVIOR = ("sampling_per_token_logps", "logprobs")
_PASSED_ON = ("prompt_id", "finish_reason", "temperature", "rollout_dtype", "trainer_dtype", *KNOWN_MASKS)


_COLUMNS = {
    *("prompt_ids", "completion_ids", "logprob_token_ids", "old_per_token_logps"),
    *(*_BEHAVIOR, *_PASSED_ON),
}
"""All that matters of a batch; images, rewards and the like may have any shape."""


def is_trl(record: Mapping[str, Any]) -> bool:
    """Whether a line has TRL's names instead of the schema's."""
    return "token_ids" not in record and "completion_ids" in record


def trl_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One of TRL's records taken apart: one for each completion of a batch.

    Args:
        record: lists as JSON has them.

    Raises:
        ValueError: the columns of the batch do not belong together.
    """
    completions = record["completion_ids"]
    if not isinstance(completions, list):
        raise ValueError("completion_ids is no list")
    if not (completions and isinstance(completions[0], list)):
        return [dict(record)]
    count = len(completions)
    columns = {
        key: _column(key, value, count) for key, value in record.items() if key in _COLUMNS and value is not None
    }
    return [{key: column[index] for key, column in columns.items()} for index in range(count)]


def trl_line(row: Mapping[str, Any]) -> dict[str, Any]:
    """The line that one completion makes, in the schema of `dump`; padding and masks stay as they are.

    Raises:
        ValueError: its parts do not belong together.
    """
    line = {name: row[name] for name in _PASSED_ON if row.get(name) is not None}
    line["prompt_token_ids"] = row.get("prompt_ids", [])
    line["token_ids"] = row["completion_ids"]
    behavior = next((row[name] for name in _BEHAVIOR if row.get(name) is not None), None)
    if behavior is not None:
        line["behavior_logprobs"] = _sampled(behavior, row)
    if row.get("old_per_token_logps") is not None:
        line["trainer_logprobs"] = row["old_per_token_logps"]
    return line


def _column(key: str, value: Any, count: int) -> list[Any]:
    """A value for each completion: given so, one for all, or one for the siblings of each prompt."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) == count:
        return value
    if key in ("prompt_ids", "prompt_mask") and value and count % len(value) == 0:
        return [row for row in value for _ in range(count // len(value))]
    raise ValueError(f"{key} has {len(value)} rows for {count} completion_ids")


def _sampled(logprobs: Any, row: Mapping[str, Any]) -> Any:
    """One logprob for each token, out of vLLM's list of the most likely ones; None where none was sampled."""
    tokens, prompt = row["completion_ids"], row.get("prompt_ids", [])
    if not isinstance(logprobs, list) or not any(isinstance(value, list) for value in logprobs):
        return logprobs
    if not isinstance(prompt, list):
        raise ValueError("prompt_ids is no list")
    if len(logprobs) != len(tokens):
        raise ValueError(f"logprobs has {len(logprobs)} values for {len(tokens)} completion_ids")
    scored = read_masks(row, prompt, tokens).scored
    return [
        _of_token(place, value, row) if place < len(scored) and scored[place] else None
        for place, value in enumerate(logprobs)
    ]


def _of_token(place: int, value: Any, row: Mapping[str, Any]) -> Any:
    """The sampled token's logprob: the only one, or the one that `logprob_token_ids` gives it."""
    if not isinstance(value, list):
        return value
    if len(value) == 1:
        return value[0]
    token, ids = row["completion_ids"][place], row.get("logprob_token_ids")
    if ids is None:
        raise ValueError("logprobs lists several candidates for a token; add logprob_token_ids, or generate with one")
    if not isinstance(ids, list) or len(ids) != len(row["completion_ids"]):
        raise ValueError(f"logprob_token_ids does not match the {len(row['completion_ids'])} completion_ids")
    candidates = ids[place]
    if not isinstance(candidates, list) or len(candidates) != len(value) or token not in candidates:
        raise ValueError(f"logprobs has none for the sampled token {token}")
    return value[candidates.index(token)]
