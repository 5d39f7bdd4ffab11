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

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

_BEHAVIOR = ("sampling_per_token_logps", "logprobs")
_OWN_WORDS = ("tool_mask", "env_mask")
_MASKS = ("prompt_mask", "completion_mask")
_PASSED_ON = ("prompt_id", "finish_reason", "temperature", "rollout_dtype", "trainer_dtype")


_COLUMNS = {
    *("prompt_ids", "completion_ids", "logprob_token_ids", "old_per_token_logps"),
    *(*_BEHAVIOR, *_OWN_WORDS, *_MASKS, *_PASSED_ON),
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


def trl_lines(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The lines that one completion makes, in the schema of `dump`.

    Tokens that an environment wrote were not sampled: each stretch of the model's own becomes a line, with everything
    before it as its prompt.

    Raises:
        ValueError: its parts do not belong together.
    """
    yield from _own_stretches(_unpadded(row))


def _column(key: str, value: Any, count: int) -> list[Any]:
    """A value for each completion: given so, one for all, or one for the siblings of each prompt."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) == count:
        return value
    if key in ("prompt_ids", "prompt_mask") and value and count % len(value) == 0:
        return [row for row in value for _ in range(count // len(value))]
    raise ValueError(f"{key} has {len(value)} rows for {count} completion_ids")


def _unpadded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Names of the schema, without padding; `own` marks the tokens that the model sampled."""
    tokens, mask = row["completion_ids"], row.get("completion_mask")
    behavior = next((row[name] for name in _BEHAVIOR if row.get(name) is not None), None)
    own = next((row[name] for name in _OWN_WORDS if row.get(name) is not None), None)
    out = {name: row[name] for name in _PASSED_ON if row.get(name) is not None}
    out["prompt_token_ids"] = _masked("prompt_ids", row.get("prompt_ids", []), row.get("prompt_mask"))
    out["token_ids"] = _masked("completion_ids", tokens, mask)
    if behavior is not None:
        out["behavior_logprobs"] = _sampled(_masked("logprobs", behavior, mask), row, out["token_ids"])
    if row.get("old_per_token_logps") is not None:
        out["trainer_logprobs"] = _masked("old_per_token_logps", row["old_per_token_logps"], mask)
    if own is not None:
        out["own"] = _masked("env_mask", own, mask)
    return out


def _masked(name: str, values: Any, mask: Any) -> list[Any]:
    """The values where the mask is 1; all without a mask."""
    if not isinstance(values, list):
        raise ValueError(f"{name} is no list")
    if mask is None:
        return values
    if not isinstance(mask, list) or len(values) != len(mask):
        raise ValueError(f"{name} has {len(values)} values, which its mask does not match")
    return [value for value, keep in zip(values, mask, strict=True) if keep]


def _sampled(logprobs: list[Any], row: Mapping[str, Any], tokens: list[Any]) -> list[Any]:
    """One logprob for each token, out of vLLM's list of the most likely ones."""
    if not any(isinstance(value, list) for value in logprobs):
        return logprobs
    if all(isinstance(value, list) and len(value) == 1 for value in logprobs):
        return [value[0] for value in logprobs]
    if "logprob_token_ids" not in row:
        raise ValueError("logprobs lists several candidates for a token; add logprob_token_ids, or generate with one")
    ids = _masked("logprob_token_ids", row["logprob_token_ids"], row.get("completion_mask"))
    if not len(ids) == len(logprobs) == len(tokens):
        raise ValueError(f"{len(ids)} logprob_token_ids and {len(logprobs)} logprobs for {len(tokens)} tokens")
    return [_of_token(*candidate) for candidate in zip(tokens, ids, logprobs, strict=True)]


def _of_token(token: Any, ids: Any, values: Any) -> Any:
    if not isinstance(ids, list) or not isinstance(values, list) or len(ids) != len(values) or token not in ids:
        raise ValueError(f"logprobs has none for the sampled token {token}")
    return values[ids.index(token)]


def _own_stretches(line: dict[str, Any]) -> Iterator[dict[str, Any]]:
    own = line.pop("own", None)
    if own is None or all(own):
        yield line
        return
    if len(own) != len(line["token_ids"]):
        raise ValueError(f"env_mask has {len(own)} values for {len(line['token_ids'])} tokens")
    start = 0
    for sampled, stretch in groupby(own, key=bool):
        end = start + len(list(stretch))
        if sampled:
            yield _cut(line, start, end)
        start = end


def _cut(line: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    parts = {key: line[key][start:end] for key in ("token_ids", "behavior_logprobs", "trainer_logprobs") if key in line}
    return {**line, **parts, "prompt_token_ids": line["prompt_token_ids"] + line["token_ids"][:start]}
