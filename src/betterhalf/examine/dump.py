"""Dumps: rollouts of another framework or of an earlier probe, in the JSONL schema of docs/probe.md.

Each line is one completion:

    prompt_token_ids   [int]    at least one
    token_ids          [int]    sampled tokens, at least one
    behavior_logprobs  [float]  log mu of each token, by the engine that sampled it
    trainer_logprobs   [float]  optional: log pi of each token, by the trainer
    prompt_id          str      optional: shared by siblings
    finish_reason      str      optional: `stop` or `length`
    temperature        float    optional: both logprobs are of softmax(logits / temperature)
    rollout_dtype, trainer_dtype   optional: a format such as fp16, bf16 or fp32
    response_mask      [0, 1]   optional: 1 for the tokens that the engine sampled; other names in `dump_masks`

A bad line is reported with its number and the reason; the others are kept. The names and shapes of TRL, verl, OpenRLHF
and prime-rl are recognised (`dump_shapes`), and tensors that `torch.save` wrote are read, too (`dump_files`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from betterhalf.errors import InputError
from betterhalf.examine.dump_files import Record, records
from betterhalf.examine.dump_masks import Kept, read_masks, refuse_unknown_masks
from betterhalf.examine.dump_shapes import shape_of
from betterhalf.examine.scoring import Item
from betterhalf.run_dir import write_text_atomic
from betterhalf.types import Completion, DtypeName

UNKNOWN = "dump"
"""Name of a dtype that the file does not give."""

_TOKEN_IDS = 2**31
"""Bound of token ids: larger numbers are not ids, and do not fit the files of a probe."""

_SMALLEST_LOGPROB = {"behavior_logprobs": -700.0, "trainer_logprobs": -1e6}
"""Smallest logprobs that are accepted: float64 has no probability below exp(-745), so no engine sampled such a token,
and vLLM writes -9999 for minus infinity; a trainer whose logits are FP16 may give a token -131008."""

LARGEST_LOGPROB = 1e-3
"""Largest logprob that is accepted: half arithmetic may round a logprob to slightly more than 0."""

OTHER_NAMES = {
    "rollout_log_probs": "verl, OpenRLHF, slime",
    "rollout_logprobs": "SkyRL",
    "sampling_per_token_logps": "TRL's trainer",
    "logprobs": "TRL's rollout functions, vLLM",
    "generation_logprobs": "NeMo-RL",
    "inference_logprobs": "prime-rl",
    "output_logprobs": "AReaL",
}
"""Name of the behavior logprobs in other frameworks -> those frameworks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpLine:
    """One completion of the file."""

    number: int
    """Line number in the file, from 1."""
    prompt_id: str
    """Id that the line gives; without one, a name for each distinct prompt."""
    prompt_token_ids: tuple[int, ...]
    """Tokens of the prompt without padding."""
    completion: Completion
    """Tokens up to the last sampled one. The logprob of a token that the engine did not sample is 0."""
    scored: tuple[bool, ...]
    """For each token of the completion, True if the engine sampled it."""
    trainer_logprobs: tuple[float, ...] | None
    """Logprob of each token of the completion, 0 for those that the engine did not sample; None without any."""
    temperature: float | None
    """Temperature of the logprobs; None if the line does not give it."""
    rollout: str
    """Rollout dtype, or `UNKNOWN`."""
    train: str
    """Dtype of `trainer_logprobs`, or `UNKNOWN`."""

    @property
    def length(self) -> int:
        """Number of tokens of prompt and completion."""
        return len(self.prompt_token_ids) + len(self.completion.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A line that cannot be used, or one completion of a line that holds several."""

    line: int
    """Line number in the file, from 1."""
    reason: str
    """Reason, as shown to the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dump:
    """Content of a dump file."""

    lines: tuple[DumpLine, ...]
    """Usable completions, at least one."""
    rejected: tuple[Rejection, ...]
    """Lines and completions that cannot be used."""

    def keep(self, problem: Callable[[DumpLine], str | None]) -> Dump:
        """Keep the lines for which `problem` returns None; reject the others with the reason that it returns.

        Raises:
            InputError: no line is left.
        """
        found = [(line, problem(line)) for line in self.lines]
        good = tuple(line for line, reason in found if reason is None)
        bad = tuple(Rejection(line=line.number, reason=reason) for line, reason in found if reason is not None)
        rejected = tuple(sorted(self.rejected + bad, key=lambda rejection: rejection.line))
        if not good:
            raise InputError(f"no line can be used; {_first(rejected)}")
        return Dump(lines=good, rejected=rejected)


def read_dump(path: Path) -> Dump:
    """Read and check a file; reject lines that are not a completion, and ignore blank ones.

    Raises:
        InputError: the file cannot be read, has a format that is not read, or holds no usable line.
    """
    lines: list[DumpLine] = []
    rejected: list[Rejection] = []
    for number, record in records(path):
        try:
            for found in _completions(number, record):
                (lines if isinstance(found, DumpLine) else rejected).append(found)  # type: ignore[arg-type]
        except ValueError as error:
            rejected.append(Rejection(line=number, reason=str(error)))
    if not lines:
        raise InputError(_nothing_usable(path, rejected))
    return Dump(lines=_with_prompt_ids(lines), rejected=tuple(rejected))


def write_dump(path: Path, rollout: str, prompt_ids: Sequence[str], items: Sequence[Item], temperature: float) -> None:
    """Write completions in the format that `read_dump` reads.

    Raises:
        RunError: the file cannot be written, for example because the disk is full.
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
    """Return a check for `Dump.keep`: can a model score the line at this temperature?

    Args:
        vocabulary: number of token ids of the model.
        context: maximum number of positions of the model.
        temperature: temperature at which the whole dump is scored.
    """

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
    """Return a reason if the line cannot be measured without a model, else None; a check for `Dump.keep`."""
    return None if line.trainer_logprobs is not None else "no trainer_logprobs, and no MODEL is named to score with"


def _completions(number: int, record: Record) -> Iterator[DumpLine | Rejection]:
    """Yield the completions of one record; a framework that writes batches puts several into it.

    Raises:
        ValueError: the record as a whole cannot be used.
    """
    if isinstance(record, ValueError):
        raise record
    shape = shape_of(record)
    refuse_unknown_masks(record)
    if shape is None:
        yield _parsed(number, record)
        return
    for place, row in enumerate(shape.rows(record), start=1):
        try:
            yield _parsed(number, shape.line(row))
        except ValueError as error:
            yield Rejection(line=number, reason=f"completion {place}: {error}")


def _parsed(number: int, record: Mapping[str, Any]) -> DumpLine:
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
    """Name the prompts of lines without `prompt_id`: equal prompts share the number of the first line with them."""
    first: dict[tuple[int, ...], int] = {}
    return tuple(
        line
        if line.prompt_id
        else replace(line, prompt_id=f"line-{first.setdefault(line.prompt_token_ids, line.number)}")
        for line in lines
    )


def _list(record: Mapping[str, Any], key: str) -> list[Any]:
    values = record.get(key)
    if values is None:
        raise ValueError(f"{key} is missing")
    if not isinstance(values, list):
        raise ValueError(f"{key} is not a list")
    if not values:
        raise ValueError(f"{key} is empty")
    return values


def _token_ids(key: str, values: Sequence[Any], places: range) -> tuple[int, ...]:
    for place in places:
        if type(values[place]) is not int or not 0 <= values[place] < _TOKEN_IDS:
            raise ValueError(f"{key}[{place}] = {_shown(values[place])} is not a token id")
    if not places:
        raise ValueError(f"{key} is empty")
    return tuple(values[places.start : places.stop])


def _logprobs(record: Mapping[str, Any], key: str, count: int, kept: Kept) -> tuple[float, ...]:
    """Return the logprobs of the tokens that are scored; 0 for the others, whatever placeholder they have."""
    values = record.get(key)
    if values is None:
        raise ValueError(f"{key} is missing{_other_name(record)}")
    if not isinstance(values, list):
        raise ValueError(f"{key} is not a list")
    if len(values) != count:
        raise ValueError(f"{key} has {len(values)} values for {count} token_ids")
    return tuple(_logprob(key, place, values[place]) if scored else 0.0 for place, scored in enumerate(kept.scored))


def _logprob(key: str, place: int, value: Any) -> float:
    if type(value) not in (int, float) or (type(value) is float and not math.isfinite(value)):
        raise ValueError(f"{key}[{place}] = {_shown(value)} is not a finite number")
    if value < _SMALLEST_LOGPROB[key]:
        raise ValueError(f"{key}[{place}] = {_shown(value)} is too low for a logprob; it may stand for a missing one")
    if value > LARGEST_LOGPROB:
        raise ValueError(f"{key}[{place}] = {_shown(value)} is positive, so it is not a logprob")
    return float(value)


def _temperature(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"temperature = {_shown(value)} is not a positive number")
    return float(value)


def _dtype(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None or value == UNKNOWN:
        return UNKNOWN
    if value not in get_args(DtypeName):
        raise ValueError(f"{key} = {_shown(value)} is none of {', '.join(get_args(DtypeName))}")
    return cast(str, value)


def _other_name(record: Mapping[str, Any]) -> str:
    for name, owner in OTHER_NAMES.items():
        if name in record:
            return f"; if {name} ({owner}) is log mu from the engine, rename it"
    return ""


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:40]


def _nothing_usable(path: Path, rejected: Sequence[Rejection]) -> str:
    if not rejected:
        return f"{path} is empty. Write one JSON object for each completion; docs/probe.md has the schema."
    if all("behavior_logprobs is missing" in rejection.reason for rejection in rejected):
        known = ", ".join(f"{name} ({owner})" for name, owner in OTHER_NAMES.items())
        return (
            f"{path} holds no behavior_logprobs, so the mismatch cannot be measured: {_first(rejected)} "
            f"Let the engine return the logprob of each sampled token, and write it as behavior_logprobs. Other "
            f"frameworks call it {known}."
        )
    return f"{path} holds no usable line; {_first(rejected)} docs/probe.md has the schema."


def _first(rejected: Sequence[Rejection]) -> str:
    more = f" ({len(rejected) - 1} more)" if len(rejected) > 1 else ""
    return f"line {rejected[0].line}: {rejected[0].reason}{more}."
