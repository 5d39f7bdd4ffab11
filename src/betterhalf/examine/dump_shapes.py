"""Shapes in which other frameworks hold rollouts, and their conversion to lines of a dump.

| framework | recognised by | behavior logprobs | trainer logprobs |
|---|---|---|---|
| TRL 1.16 | `completion_ids` | `sampling_per_token_logps`, `logprobs` | `old_per_token_logps` |
| verl 0.9.1 | `responses` | `rollout_log_probs` | `old_log_probs` |
| OpenRLHF 0.11.2 | `sequences` | `rollout_log_probs` | `action_log_probs` |
| prime-rl 559b44772 | `inference_logprobs` and `loss_mask` | `inference_logprobs` | `trainer_logprobs` |

verl's batch is padded: prompts on the left, responses on the right. OpenRLHF's per-action tensors cover the last tokens
of `sequences`, all but the first one as a rule. prime-rl's token export has one sequence without a boundary between
prompt and completion; the first trainable token starts the completion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from betterhalf.examine.dump_rows import PASSED_ON, batch_rows
from betterhalf.examine.trl_dump import is_trl, trl_line, trl_rows

Row = Mapping[str, Any]
"""One completion of a framework's record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Shape of one framework's records."""

    recognises: Callable[[Row], bool]
    """Return whether a record has this shape."""
    rows: Callable[[Row], list[dict[str, Any]]]
    """Split a record into one for each completion."""
    line: Callable[[Row], dict[str, Any]]
    """Convert one completion to the schema of `dump`."""


def shape_of(record: Row) -> Shape | None:
    """Return the shape of a record, None for one in the schema of `dump` itself.

    Raises:
        ValueError: the record is a log that holds text alone.
    """
    if "token_ids" not in record and {"input", "output"} <= record.keys():
        raise ValueError(
            "text without token ids and logprobs, as verl's trainer.rollout_data_dir writes it; save the tensors of "
            "the batch instead (docs/probe.md)"
        )
    return next((shape for shape in SHAPES if shape.recognises(record)), None)


def _passed_on(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in PASSED_ON if row.get(name) is not None}


def _with_logprobs(line: dict[str, Any], behavior: Any, trainer: Any, missing: str) -> dict[str, Any]:
    """Add the logprobs of both sides.

    Raises:
        ValueError: those of the engine are missing; `missing` says how the framework keeps them.
    """
    if behavior is None:
        raise ValueError(f"behavior_logprobs is missing; {missing}")
    return line | {"behavior_logprobs": behavior} | ({} if trainer is None else {"trainer_logprobs": trainer})


# -- verl

_VERL = {"prompts", "responses", "rollout_log_probs", "old_log_probs", "uid", *PASSED_ON}


def _verl_line(row: Row) -> dict[str, Any]:
    if row.get("attention_mask") is None:
        raise ValueError("attention_mask is missing; without it the padding before verl's prompts cannot be told apart")
    line = _passed_on(row) | {"prompt_token_ids": row.get("prompts", []), "token_ids": row["responses"]}
    if row.get("uid") is not None:
        line["prompt_id"] = row["uid"]
    fix = "verl keeps them as rollout_log_probs with actor_rollout_ref.rollout.calculate_log_probs=True"
    return _with_logprobs(line, row.get("rollout_log_probs"), row.get("old_log_probs"), fix)


# -- OpenRLHF

_OPENRLHF = {"sequences", "rollout_log_probs", "action_log_probs", *PASSED_ON}


def _openrlhf_line(row: Row) -> dict[str, Any]:
    sequence, mask = _required(row, "sequences"), _required(row, "action_mask")
    first = _first_one(mask, "action_mask")
    split = len(sequence) - len(mask) + first
    if split < 1:
        raise ValueError(f"action_mask has {len(mask)} values for {len(sequence)} sequences, so there is no prompt")
    line = _passed_on(row) | {
        "prompt_token_ids": sequence[:split],
        "token_ids": sequence[split:],
        "action_mask": mask[first:],
    }
    fix = "OpenRLHF keeps them as rollout_log_probs with --algo.advantage.is_correction_level token"
    return _with_logprobs(line, _tail(row, "rollout_log_probs", first), _tail(row, "action_log_probs", first), fix)


# -- prime-rl


def _prime_rl_line(row: Row) -> dict[str, Any]:
    tokens, mask = _required(row, "token_ids"), _required(row, "loss_mask")
    first = _first_one(mask, "loss_mask")
    line = _passed_on(row) | {
        "prompt_token_ids": tokens[:first],
        "token_ids": tokens[first:],
        "loss_mask": mask[first:],
    }
    trainer = _tail(row, "trainer_logprobs", first)
    return _with_logprobs(line, _tail(row, "inference_logprobs", first), trainer, "prime-rl has inference_logprobs")


def _required(row: Row, key: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{key} is {'missing' if value is None else 'not a list'}")
    return value


def _first_one(mask: list[Any], key: str) -> int:
    """Return the position of the first sampled token."""
    found = next((place for place, value in enumerate(mask) if value), None)
    if found is None:
        raise ValueError(f"no token is left to score after applying {key}")
    return found


def _tail(row: Row, key: str, first: int) -> list[Any] | None:
    return None if row.get(key) is None else _required(row, key)[first:]


SHAPES = (
    Shape(recognises=is_trl, rows=trl_rows, line=trl_line),
    Shape(
        recognises=lambda record: "responses" in record and "token_ids" not in record,
        rows=lambda record: batch_rows(record, "responses", _VERL),
        line=_verl_line,
    ),
    Shape(
        recognises=lambda record: "sequences" in record and "token_ids" not in record,
        rows=lambda record: batch_rows(record, "sequences", _OPENRLHF),
        line=_openrlhf_line,
    ),
    Shape(
        recognises=lambda record: (
            {"token_ids", "inference_logprobs", "loss_mask"} <= record.keys() and "prompt_token_ids" not in record
        ),
        rows=lambda record: [dict(record)],
        line=_prime_rl_line,
    ),
)
"""Every shape; the first that recognises a record reads it."""
