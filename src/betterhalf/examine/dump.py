"""Rollouts of another framework, or of an earlier probe: the JSONL schema of docs/probe.md.

Each line is one completion:

    prompt_token_ids   [int]    at least one
    token_ids          [int]    what was sampled, at least one
    behavior_logprobs  [float]  log mu of each, by the engine that sampled it
    trainer_logprobs   [float]  optional: log pi of each, by the trainer
    prompt_id          str      optional: siblings share it
    finish_reason      str      optional: `stop` or `length`
    temperature        float    optional: both logprobs are of softmax(logits / temperature)
    rollout_dtype, trainer_dtype   optional: fp16, bf16 or fp32
    response_mask      [0, 1]   optional: 1 for the tokens that the engine sampled; other names in `dump_masks`

A bad line is reported by number and reason, and the rest is kept. TRL's names and shapes are recognised (`trl_dump`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from betterhalf.errors import InputError
from betterhalf.examine.dump_masks import Kept, read_masks, refuse_unknown_masks
from betterhalf.examine.scoring import Item
from betterhalf.examine.trl_dump import is_trl, trl_line, trl_rows
from betterhalf.run_dir import write_text_atomic
from betterhalf.types import Completion, DtypeName

UNKNOWN = "dump"
"""Stands for a dtype that the file does not say."""

LARGEST_LOGPROB = 1e-3
"""A logprob is at most 0; half arithmetic may round it to a little more."""

OTHER_NAMES = {
    "rollout_log_probs": "verl, OpenRLHF, slime",
    "rollout_logprobs": "SkyRL",
    "sampling_per_token_logps": "TRL's trainer",
    "logprobs": "TRL's rollout functions, vLLM",
    "generation_logprobs": "NeMo-RL",
    "inference_logprobs": "prime-rl",
    "output_logprobs": "AReaL",
}
"""What others call the behavior logprobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpLine:
    """One completion of the file."""

    number: int
    """Line in the file, from 1."""
    prompt_id: str
    """As given, else one name for each distinct prompt."""
    prompt_token_ids: tuple[int, ...]
    completion: Completion
    """Tokens up to the last that was sampled; 0 stands for the logprob of those that were not."""
    scored: tuple[bool, ...]
    """For each token of the completion: whether the engine sampled it."""
    trainer_logprobs: tuple[float, ...] | None
    """For each token of the completion; 0 for those that were not sampled."""
    temperature: float | None
    rollout: str
    """Rollout dtype, or `UNKNOWN`."""
    train: str
    """Dtype of `trainer_logprobs`, or `UNKNOWN`."""

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_token_ids) + len(self.completion.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A line that cannot be used, or one completion of a line that holds several."""

    line: int
    """From 1."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """A file, read."""

    lines: tuple[DumpLine, ...]
    """At least one."""
    rejected: tuple[Rejection, ...]

    def keep(self, problem: Callable[[DumpLine], str | None]) -> Dump:
        """The lines that have no problem; the others are rejected with it.

        Raises:
            InputError: none is left.
        """
        found = [(line, problem(line)) for line in self.lines]
        good = tuple(line for line, reason in found if reason is None)
        bad = tuple(Rejection(line=line.number, reason=reason) for line, reason in found if reason is not None)
        rejected = tuple(sorted(self.rejected + bad, key=lambda rejection: rejection.line))
        if not good:
            raise InputError(f"no line can be used; {_first(rejected)}")
        return Dump(lines=good, rejected=rejected)


def read_dump(path: Path) -> Dump:
    """Read and check a file; lines that are no completion are rejected, blank ones passed over.

    Raises:
        InputError: the file cannot be read, is no JSONL, or holds no usable line.
    """
    lines: list[DumpLine] = []
    rejected: list[Rejection] = []
    for number, text in _text_lines(path):
        try:
            for found in _completions(number, text):
                (lines if isinstance(found, DumpLine) else rejected).append(found)  # type: ignore[arg-type]
        except ValueError as error:
            rejected.append(Rejection(line=number, reason=str(error)))
    if not lines:
        raise InputError(_nothing_usable(path, rejected))
    return Dump(lines=_with_prompt_ids(lines), rejected=tuple(rejected))


def write_dump(path: Path, rollout: str, prompt_ids: Sequence[str], items: Sequence[Item], temperature: float) -> None:
    """Write completions so that `read_dump` reads them back.

    Raises:
        RunError: the disk is full or cannot be written.
    """
    rows = (
        {
            "prompt_id": prompt_id,
            "prompt_token_ids": list(token_ids),
            "token_ids": list(completion.token_ids),
            "behavior_logprobs": list(completion.behavior_logprobs),
            "finish_reason": completion.finish_reason,
            "temperature": temperature,
            "rollout_dtype": rollout,
        }
        for prompt_id, (token_ids, completion) in zip(prompt_ids, items, strict=True)
    )
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def fits_model(vocabulary: int, context: int, temperature: float) -> Callable[[DumpLine], str | None]:
    """What keeps a line from being scored by a model with so many token ids and positions, at one temperature."""

    def problem(line: DumpLine) -> str | None:
        highest = max(*line.prompt_token_ids, *line.completion.token_ids)
        if highest >= vocabulary:
            return f"token id {highest} is outside the model's vocabulary of {vocabulary}"
        if line.length > context:
            return f"{line.length} tokens exceed the model's context of {context}"
        if line.temperature is not None and line.temperature != temperature:
            return f"temperature {line.temperature:g} differs from {temperature:g}, at which this dump is scored"
        return None

    return problem


def lacks_trainer_logprobs(line: DumpLine) -> str | None:
    """What keeps a line from being measured without a model."""
    return None if line.trainer_logprobs is not None else "no trainer_logprobs, and no MODEL is named to score with"


def _text_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line), without the blank ones."""
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                if number == 1 and text.startswith(b"PAR1"):
                    raise InputError(
                        f"{path} is a Parquet file, and --from-dump reads JSON lines. The completions that TRL logs as "
                        "Parquet hold text alone, no token ids and no logprobs; docs/probe.md shows how to write both."
                    )
                if text.strip():
                    yield number, text
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Name a file of JSON lines.") from error


def _completions(number: int, text: bytes) -> Iterator[DumpLine | Rejection]:
    """The completions of one line; it holds several where a framework writes batches.

    Raises:
        ValueError: the line as a whole is bad.
    """
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    refuse_unknown_masks(record)
    if not is_trl(record):
        yield _parsed(number, record)
        return
    for place, row in enumerate(trl_rows(record), start=1):
        try:
            yield _parsed(number, trl_line(row))
        except ValueError as error:
            yield Rejection(line=number, reason=f"completion {place}: {error}")


def _parsed(number: int, record: dict[str, Any]) -> DumpLine:
    prompt, token_ids = _list(record, "prompt_token_ids"), _list(record, "token_ids")
    kept = read_masks(record, prompt, token_ids)
    count = len(kept.scored)
    return DumpLine(
        number=number,
        prompt_id="" if record.get("prompt_id") is None else str(record["prompt_id"]),
        prompt_token_ids=_token_ids("prompt_token_ids", prompt, kept.prompt),
        completion=Completion(
            token_ids=_token_ids("token_ids", token_ids, range(count)),
            behavior_logprobs=_logprobs(record, "behavior_logprobs", len(token_ids), kept),
            finish_reason="length" if record.get("finish_reason") == "length" else "stop",
            policy_version=0,
        ),
        scored=kept.scored,
        trainer_logprobs=None
        if record.get("trainer_logprobs") is None
        else _logprobs(record, "trainer_logprobs", len(token_ids), kept),
        temperature=_temperature(record.get("temperature")),
        rollout=_dtype(record, "rollout_dtype"),
        train=_dtype(record, "trainer_dtype"),
    )


def _with_prompt_ids(lines: Sequence[DumpLine]) -> tuple[DumpLine, ...]:
    """Where a line names no prompt, equal prompts get one name, after the line where they first stand."""
    first: dict[tuple[int, ...], int] = {}
    return tuple(
        line
        if line.prompt_id
        else replace(line, prompt_id=f"line-{first.setdefault(line.prompt_token_ids, line.number)}")
        for line in lines
    )


def _list(record: dict[str, Any], key: str) -> list[Any]:
    values = record.get(key)
    if values is None:
        raise ValueError(f"{key} is missing")
    if not isinstance(values, list):
        raise ValueError(f"{key} is no list")
    if not values:
        raise ValueError(f"{key} is empty")
    return values


def _token_ids(key: str, values: Sequence[Any], places: range) -> tuple[int, ...]:
    for place in places:
        if type(values[place]) is not int or values[place] < 0:
            raise ValueError(f"{key}[{place}] = {_shown(values[place])} is no token id")
    if not places:
        raise ValueError(f"{key} is empty")
    return tuple(values[places.start : places.stop])


def _logprobs(record: dict[str, Any], key: str, count: int, kept: Kept) -> tuple[float, ...]:
    """Logprobs of the tokens that are scored; 0 for the others, whatever placeholder they have."""
    values = record.get(key)
    if values is None:
        raise ValueError(f"{key} is missing{_other_name(record)}")
    if not isinstance(values, list):
        raise ValueError(f"{key} is no list")
    if len(values) != count:
        raise ValueError(f"{key} has {len(values)} values for {count} token_ids")
    return tuple(_logprob(key, place, values[place]) if scored else 0.0 for place, scored in enumerate(kept.scored))


def _logprob(key: str, place: int, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{key}[{place}] = {_shown(value)} is no finite number")
    if value > LARGEST_LOGPROB:
        raise ValueError(f"{key}[{place}] = {value:g} is positive: no logprob")
    return float(value)


def _temperature(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"temperature = {_shown(value)} is no positive number")
    return float(value)


def _dtype(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None or value == UNKNOWN:
        return UNKNOWN
    if value not in get_args(DtypeName):
        raise ValueError(f"{key} = {_shown(value)} is none of {', '.join(get_args(DtypeName))}")
    return cast(str, value)


def _other_name(record: dict[str, Any]) -> str:
    for name, owner in OTHER_NAMES.items():
        if name in record:
            return f"; {name} ({owner}) is there: rename it if it is log mu from the engine"
    return ""


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:40]


def _nothing_usable(path: Path, rejected: Sequence[Rejection]) -> str:
    if not rejected:
        return f"{path} is empty. Write one JSON object for each completion; docs/probe.md has the schema."
    if all("behavior_logprobs is missing" in rejection.reason for rejection in rejected):
        known = ", ".join(f"{name} ({owner})" for name, owner in OTHER_NAMES.items())
        return (
            f"{path} holds no behavior_logprobs, without which there is no mismatch to measure: {_first(rejected)} "
            f"Let the engine return the logprob of each sampled token, and write it as behavior_logprobs. Other "
            f"frameworks call it {known}."
        )
    return f"{path} holds no usable line; {_first(rejected)} docs/probe.md has the schema."


def _first(rejected: Sequence[Rejection]) -> str:
    more = f" ({len(rejected) - 1} more)" if len(rejected) > 1 else ""
    return f"line {rejected[0].line}: {rejected[0].reason}{more}."
