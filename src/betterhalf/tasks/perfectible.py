"""The perfectible set: prompts that the base policy solves sometimes (arXiv 2510.26788, section 4.1).

A policy can learn to solve every one of them, so a correct training system must get it there. The file
`perfectible.jsonl` starts with its provenance, followed by one row for each prompt that was tried. Rows are appended as
they are counted, so that an interrupted count can continue.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from betterhalf.config.schema import BaseTaskConfig
from betterhalf.errors import InputError
from betterhalf.run_dir import append_jsonl, plain_json, read_jsonl, write_text_atomic

SAME_DATA_KEYS = frozenset({"path", "reward_seconds", "reward_workers", "bad_rows", "allow_changed_data"})
"""Task settings that may differ between counting and training; a file that was moved holds the same problems."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PerfectibleResult:
    """Result of filtering prompts by their solved counts."""

    kept: tuple[int, ...]
    """Positions in `solved_counts`, in order; at least one."""
    too_easy: int
    """Number of prompts solved more often than `upper`."""
    too_hard: int
    """Number of prompts solved less often than `lower`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Origin of a perfectible set; the first line of its file."""

    model: str
    """Model, as the user named it."""
    weights_digest: str
    """Digest of the weights that sampled."""
    task: dict[str, Any]
    """Configuration of the base task."""
    seed: int
    """Seed of the sampling."""
    candidates: int
    """Number of prompts to try: 0 to candidates - 1 of the base task."""
    samples: int
    """Number of completions sampled for each prompt."""
    lower: float
    """Smallest solved share at which a prompt is kept."""
    upper: float
    """Largest solved share at which a prompt is kept."""
    temperature: float
    """Sampling temperature."""
    max_tokens: int
    """Length limit of a completion."""
    engine_dtype: str
    """Dtype in which the engine computed."""
    versions: dict[str, str]
    """Versions of the relevant packages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedRow:
    """Number of times one prompt was solved."""

    index: int
    """Index of the candidate among the usable rows of the base task."""
    prompt_id: str
    """Stable name of the row."""
    solved: int
    """Number of completions that solved the prompt."""
    samples: int
    """Number of completions sampled."""
    digest: str = ""
    """Digest of the row's content; empty in files of older versions."""


def select(solved_counts: Sequence[int], samples: int, lower: float, upper: float) -> PerfectibleResult:
    """Keep prompts solved between `lower` and `upper` of the time, both included.

    Raises:
        InputError: nothing is kept; the message says how many were too easy and too hard.
    """
    # Without tolerance, upper = 0.29 of 100 samples is 28.999999999999996 and drops a prompt solved 29 times.
    fewest, most = lower * samples - 1e-6, upper * samples + 1e-6
    too_easy = sum(count > most for count in solved_counts)
    too_hard = sum(count < fewest for count in solved_counts)
    kept = tuple(index for index, count in enumerate(solved_counts) if fewest <= count <= most)
    if not kept:
        raise InputError(
            f"none of {len(solved_counts)} prompts is perfectible: {too_easy} too easy (solved over {upper:.0%} of the "
            f"time), {too_hard} too hard (under {lower:.0%}); choose {_alternative(too_easy, too_hard)}, or widen the "
            "range of sanity.lower and sanity.upper (--resume with the same run_dir keeps the counts)"
        )
    return PerfectibleResult(kept=kept, too_easy=too_easy, too_hard=too_hard)


def _alternative(too_easy: int, too_hard: int) -> str:
    if too_easy and too_hard:
        return "another task or model, or more sanity.candidates"
    return "a harder task" if too_easy else "an easier task, a stronger model, or a larger sampling.max_tokens"


def open_perfectible(path: Path, provenance: Provenance) -> list[SolvedRow]:
    """Create the file, or return the rows that an interrupted count left; an incomplete last line is dropped.

    Counts stay valid under other bounds and for more candidates; the provenance is then replaced.

    Raises:
        InputError: the file has another provenance (the message names the differences), or is damaged.
        RunError: the disk is full.
    """
    header = {"provenance": plain_json(asdict(provenance))}
    if not read_jsonl(path):
        append_jsonl(path, header)
        return []
    found, rows = read_perfectible(path)
    settled = replace(found, **_filter_of(provenance)) if provenance.candidates >= len(rows) else found
    _require_same(path, plain_json(asdict(settled)), header["provenance"])
    if settled != found:
        lines = [header, *map(asdict, rows)]
        write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
    return rows


def _filter_of(provenance: Provenance) -> dict[str, Any]:
    """Return the settings that decide which prompts are tried and kept, but not how often one is solved."""
    return {"candidates": provenance.candidates, "lower": provenance.lower, "upper": provenance.upper}


def append_solved(path: Path, row: SolvedRow) -> None:
    """Append the count of one prompt.

    Raises:
        RunError: the disk is full; the rows already written are intact.
    """
    append_jsonl(path, asdict(row))


def read_perfectible(path: Path) -> tuple[Provenance, list[SolvedRow]]:
    """Return the provenance and the rows, which may be incomplete.

    Raises:
        InputError: there is no such file, or it is not a perfectible set.
    """
    if not path.is_file():
        raise InputError(f"there is no perfectible set {path}; make one with `betterhalf sanity`, or check task.path")
    objects = read_jsonl(path)
    try:
        provenance = Provenance(**objects[0]["provenance"])
        rows = [SolvedRow(**row) for row in objects[1:]]
    except (IndexError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a perfectible set ({error}); make one with `betterhalf sanity`, or check task.path"
        ) from error
    _require_order(path, rows)
    return provenance, rows


def read_kept(path: Path) -> tuple[Provenance, list[SolvedRow]]:
    """Return the provenance and the rows of the kept prompts of a finished file.

    Raises:
        InputError: as in `read_perfectible`; or the count is unfinished; or nothing is kept.
    """
    provenance, rows = read_perfectible(path)
    if len(rows) < provenance.candidates:
        raise InputError(
            f"{path} is unfinished: {len(rows)} of {provenance.candidates} prompts are counted; finish it with "
            "`betterhalf sanity ... --resume`"
        )
    result = select([row.solved for row in rows], provenance.samples, provenance.lower, provenance.upper)
    return provenance, [rows[index] for index in result.kept]


def with_defaults(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return a base task's settings as an earlier version recorded them, with the defaults of those added since."""
    try:
        known = TypeAdapter[Any](BaseTaskConfig).validate_python(dict(task))
    except ValidationError:  # a setting that no longer exists: the comparison names it
        return dict(task)
    filled = plain_json(known.model_dump())
    assert isinstance(filled, dict)
    return filled


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignored: frozenset[str] = frozenset()) -> list[str]:
    """Return `key: old -> new` for each key that differs; nested keys are dotted."""
    found = []
    for key in [name for name in {**old, **new} if name not in ignored]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += [f"{key}.{line}" for line in differences(before, after, ignored)]
        elif before != after:
            found.append(f"{key}: {before!r} -> {after!r}")
    return found


def _require_same(path: Path, old: Any, new: Any) -> None:
    old = {**old, "task": with_defaults(old["task"])}
    found = differences(old, new, ignored=frozenset({"bad_rows", "allow_changed_data"}))
    if found:
        raise InputError(
            f"{path} was counted under other circumstances ({'; '.join(found)}); "
            "restore them, or choose another run_dir"
        )


def _require_order(path: Path, rows: Sequence[SolvedRow]) -> None:
    """Refuse rows that are not prompts 0, 1, 2, ...: the file was edited, or two runs wrote to it."""
    for expected, row in enumerate(rows):
        if row.index != expected:
            raise InputError(
                f"{path} has prompt {row.index} where prompt {expected} belongs; delete the file and count again"
            )
