"""Convert TRL's completions to lines of a dump.

Two kinds of record are recognised, with one completion or a whole batch on a line:

* the result of a rollout function (`GRPOTrainer(rollout_func=...)`): `prompt_ids`, `completion_ids`, `logprobs`, and
  `env_mask` if an environment wrote some of the tokens;
* the batch that the trainer scores (`_generate_and_score_completions`): padded `prompt_ids` and `completion_ids` with
  their masks, `sampling_per_token_logps` (log mu), and, if TRL computed it, `old_per_token_logps` (log pi before the
  update).

vLLM's logprobs have the shape [tokens][top]. The sampled token's logprob is the only one of its row, or is found
through `logprob_token_ids`. TRL's log of completions holds only text and cannot be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from betterhalf.examine.dump_masks import read_masks
from betterhalf.examine.dump_rows import PASSED_ON, batch_rows

_BEHAVIOR = ("sampling_per_token_logps", "logprobs")
"""Names of the behavior logprobs, in order of preference."""

_COLUMNS = {
    *("prompt_ids", "completion_ids", "logprob_token_ids", "old_per_token_logps"),
    *(*_BEHAVIOR, *PASSED_ON),
}
"""Keys of a batch that are read; others, such as images and rewards, are ignored and may have any shape."""


def is_trl(record: Mapping[str, Any]) -> bool:
    """Return whether a line has TRL's key names instead of the schema's."""
    return "token_ids" not in record and "completion_ids" in record


def trl_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split one of TRL's records into one for each completion of its batch.

    Args:
        record: parsed JSON object.

    Raises:
        ValueError: the columns of the batch have different lengths.
    """
    return batch_rows(record, "completion_ids", _COLUMNS, for_prompts=("prompt_ids", "prompt_mask"))


def trl_line(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert one completion to the schema of `dump`; padding and masks stay as they are.

    Raises:
        ValueError: logprobs, candidates or masks do not match the completion.
    """
    line = {name: row[name] for name in PASSED_ON if row.get(name) is not None}
    line["prompt_token_ids"] = row.get("prompt_ids", [])
    line["token_ids"] = row["completion_ids"]
    behavior = next((row[name] for name in _BEHAVIOR if row.get(name) is not None), None)
    if behavior is not None:
        line["behavior_logprobs"] = _sampled(behavior, row)
    if row.get("old_per_token_logps") is not None:
        line["trainer_logprobs"] = row["old_per_token_logps"]
    return line


def _sampled(logprobs: Any, row: Mapping[str, Any]) -> Any:
    """Pick each sampled token's logprob from vLLM's list of candidates; None for tokens that were not sampled."""
    tokens, prompt = row["completion_ids"], row.get("prompt_ids", [])
    if not isinstance(logprobs, list) or not any(isinstance(value, list) for value in logprobs):
        return logprobs
    if not isinstance(prompt, list):
        raise ValueError("prompt_ids is not a list")
    if len(logprobs) != len(tokens):
        raise ValueError(f"logprobs has {len(logprobs)} values for {len(tokens)} completion_ids")
    scored = read_masks(row, prompt, tokens).scored
    return [
        _of_token(place, value, row) if place < len(scored) and scored[place] else None
        for place, value in enumerate(logprobs)
    ]


def _of_token(place: int, value: Any, row: Mapping[str, Any]) -> Any:
    """Return the sampled token's logprob: the only one, or the one that `logprob_token_ids` assigns to it."""
    if not isinstance(value, list):
        return value
    if len(value) == 1:
        return value[0]
    token, ids = row["completion_ids"][place], row.get("logprob_token_ids")
    if ids is None:
        raise ValueError(
            "logprobs lists several candidates for a token; add logprob_token_ids, or generate with one candidate"
        )
    if not isinstance(ids, list) or len(ids) != len(row["completion_ids"]):
        raise ValueError(f"logprob_token_ids does not match the {len(row['completion_ids'])} completion_ids")
    candidates = ids[place]
    if not isinstance(candidates, list) or len(candidates) != len(value) or token not in candidates:
        raise ValueError(f"logprobs has no value for the sampled token {token}")
    return value[candidates.index(token)]
