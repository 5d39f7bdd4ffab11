"""The data of a report, read from run folders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from betterhalf.errors import InputError
from betterhalf.report.fields import mapping, number
from betterhalf.run_dir import RunDir, read_json, read_jsonl

_TAG_LENGTH = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One run in the report: an arm of a sanity run, or a run in its own folder."""

    name: str
    """Full name of the arm, or name of the run folder."""
    tag: str
    """Short name for the end of a line in a figure: see `_tags`."""
    index: int
    """Position on the page; decides colour, dash and marker."""
    rows: list[dict[str, Any]]
    """`metrics.jsonl`, in step order."""
    rollouts: list[dict[str, Any]]
    """`rollouts.jsonl`."""
    mismatch: list[dict[str, Any]]
    """`mismatch.jsonl`: bins and completions of each step."""
    watchdog: list[dict[str, Any]]
    """`watchdog.jsonl`: events of the watchdog."""
    config: dict[str, Any]
    """`config.json`; empty if absent, as are the next three."""
    contract: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    evaluated: list[dict[str, Any]] = field(default_factory=list)
    """`evaluated_steps.jsonl`: evaluations during training, step 0 included."""
    columns: dict[str, list[float]] = field(default_factory=dict, repr=False, compare=False)
    """Values of the metrics that `values` has read: several figures and tables ask for the same."""
    steps: list[int] = field(init=False, repr=False, compare=False)
    """Step of each row."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", [int(row["step"]) for row in self.rows if "step" in row])

    def values(self, name: str) -> list[float]:
        """Return the metric `name` at each of `steps`; NaN where it is missing, null or not a number."""
        if name not in self.columns:
            self.columns[name] = [number(row.get(name)) for row in self.rows if "step" in row]
        return self.columns[name]

    def finite(self, name: str) -> list[float]:
        """Return the finite values of the metric `name`."""
        return [value for value in self.values(name) if math.isfinite(value)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A folder that `probe`, `doctor` or `evaluate` wrote: one measurement, without steps."""

    name: str
    """Name of the folder."""
    index: int
    """Position on the page, which makes the keys of its figures unique."""
    result: dict[str, Any]
    """`probe.json`, `doctor.json`, or the `summary.json` of an evaluation; empty if damaged."""
    damage: str
    """Error in that file; empty without one."""
    config: dict[str, Any]
    """`config.json`; empty if absent, as are the next two."""
    contract: dict[str, Any]
    environment: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Results of a sweep, from its two files of results alone."""

    name: str
    """Name of the folder."""
    index: int
    """Position on the page, which makes the keys of its figures unique."""
    rows: list[dict[str, Any]]
    """`results.jsonl`."""
    curves: list[dict[str, Any]]
    """`curves.jsonl`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything the page shows."""

    titles: list[str]
    """Name of each run folder given."""
    summaries: dict[str, dict[str, Any]]
    """Run folder name -> its `summary.json`, of runs that have one."""
    arms: list[Arm]
    """All arms of all runs."""
    probes: list[Study]
    """Folders with a `probe.json`."""
    doctors: list[Study]
    """Folders with a `doctor.json`."""
    evaluations: list[Study]
    """Folders with an `evaluation.json`."""
    sweeps: list[Sweep]
    """Folders with a `results.jsonl`."""
    environment: dict[str, Any]
    """Environment of the first run that recorded one."""


def load(runs: Sequence[RunDir | Path | str]) -> ReportData:
    """Read the run folders.

    Raises:
        InputError: a folder is not a run, or a file in it is damaged.
    """
    folders = [run if isinstance(run, RunDir) else RunDir(Path(run)) for run in runs]
    opened = [RunDir.open(folder.path) for folder in folders]
    titles = [_folder_name(run) for run in opened]
    probes, doctors = (_studies(opened, file) for file in ("probe.json", "doctor.json"))
    evaluations = [_read_study(run, run.summary, i) for i, run in enumerate(opened) if run.evaluated.exists()]
    runs_of_steps = [run for run in opened if _has_steps(run)]
    named = [pair for run in runs_of_steps for pair in _arms_of(run, _folder_name(run), len(runs_of_steps) > 1)]
    tags = _tags([name for name, _ in named])
    arms = [_read_arm(run, name, tags[index], index) for index, (name, run) in enumerate(named)]
    sweeps = [_read_sweep(run, index) for index, run in enumerate(opened) if run.results.exists()]
    machines = [dict(mapping(row, "machine")) for sweep in sweeps for row in sweep.rows[:1]]
    recorded = [*(_optional(run.environment) for run in opened), *(arm.environment for arm in arms)]
    environments = [*recorded, *machines, {}]
    return ReportData(
        titles=titles,
        summaries={_folder_name(run): _optional(run.summary) for run in runs_of_steps if run.summary.exists()},
        arms=arms,
        probes=probes,
        doctors=doctors,
        evaluations=evaluations,
        sweeps=sweeps,
        environment=next((found for found in environments if found), {}) | _cluster(recorded),
    )


def _cluster(environments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the cluster of the first run that recorded one: that of an arm, if the folder is that of a sanity run."""
    return next(({"cluster": found["cluster"]} for found in environments if found.get("cluster")), {})


def _has_steps(run: RunDir) -> bool:
    """Return whether the folder is shown as a run: it is, unless it only holds results of another verb."""
    if run.results.exists():
        return False
    studies = ("probe.json", "doctor.json", "evaluation.json")
    only_studied = any((run.path / name).exists() for name in studies)
    return run.metrics.exists() or run.arms.is_dir() or not only_studied


def _studies(opened: Sequence[RunDir], file: str) -> list[Study]:
    return [_read_study(run, run.path / file, index) for index, run in enumerate(opened) if (run.path / file).exists()]


def _read_study(run: RunDir, path: Path, index: int) -> Study:
    """Read a study; a damaged result is recorded as such, and the rest of the page is still written."""
    result: dict[str, Any] = {}
    damage = ""
    try:
        result = _optional(path)
    except InputError as error:
        damage = str(error)
    return Study(
        name=_folder_name(run),
        index=index,
        result=result,
        damage=damage,
        config=_optional(run.config),
        contract=_optional(run.contract),
        environment=_optional(run.environment),
    )


def _read_sweep(run: RunDir, index: int) -> Sweep:
    return Sweep(name=_folder_name(run), index=index, rows=read_jsonl(run.results), curves=read_jsonl(run.curves))


def _arms_of(run: RunDir, title: str, several: bool) -> list[tuple[str, RunDir]]:
    names = run.arm_names()
    if not names:
        return [(title, run)]
    return [(f"{title} / {name}" if several else name, run.arm(name)) for name in names]


def _tags(names: list[str]) -> list[str]:
    """Return the names themselves if all are short; else letters, or nothing for a single run."""
    if all(len(name) <= _TAG_LENGTH for name in names):
        return names
    return [ascii_uppercase[index % 26] if len(names) > 1 else "" for index in range(len(names))]


def _read_arm(run: RunDir, name: str, tag: str, index: int) -> Arm:
    return Arm(
        name=name,
        tag=tag,
        index=index,
        rows=_metric_rows(run.metrics),
        rollouts=read_jsonl(run.rollouts),
        mismatch=read_jsonl(run.path / "mismatch.jsonl"),
        watchdog=read_jsonl(run.path / "watchdog.jsonl"),
        config=_optional(run.config),
        contract=_optional(run.contract),
        environment=_optional(run.environment),
        summary=_optional(run.summary),
        evaluated=[row for row in read_jsonl(run.evaluated_steps) if isinstance(row.get("step"), int)],
    )


def _metric_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of `metrics.jsonl`; a step that is not a number is refused, because figures are drawn over it."""
    rows = read_jsonl(path)
    for row in rows:
        if type(row.get("step", 0)) is not int:
            raise InputError(f"{path} has a row with step {row['step']!r}, not a number. Repair or delete that line.")
    return rows


def _folder_name(run: RunDir) -> str:
    return run.path.resolve().name or "run"


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to dotted keys: `{"model": {"name": 1}}` -> `{"model.name": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
