"""`betterhalf compare`: runs side by side, in numbers and in the settings that differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from betterhalf.config.load import flat
from betterhalf.diagnostics.course import FINAL_STEPS, reward_course
from betterhalf.errors import InputError
from betterhalf.report.compare_table import comparison_html, comparison_text
from betterhalf.report.fields import finite, mean, number
from betterhalf.run_dir import RunDir, read_json, read_jsonl

_IGNORED = ("name", "logging", "sweep", "evaluate", "sanity", "probe", "doctor")
"""Settings and sections that are not compared: they change no number of a training run."""

_LEVELS = "watchdog.levels"

_K3 = "mismatch/k3/mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """One run in numbers; None for what it did not record."""

    name: str
    """Shortest path that tells the runs apart."""
    path: str
    """The folder."""
    verb: str | None
    """Verb that wrote it."""
    outcome: str
    """Course of the reward in a word (`learned`, `collapsed`, ...), `stopped`, or `unfinished`; `finished` for a run
    without rewards, such as an evaluation."""
    passed: bool | None
    """Verdict of an arm."""
    cluster: str | None
    """Backend with its numbers of ranks and engines, such as `ray 2+1`; None for one process."""
    steps: int
    """Number of recorded steps."""
    first_reward: float | None
    """Mean reward of the first steps."""
    final_reward: float | None
    """Mean reward of the last steps."""
    accuracy: float | None
    """Accuracy at the end of an arm, or avg@k of an evaluation."""
    k3: float | None
    """Mean of `mismatch/k3/mean` over the steps where it is finite."""
    k3_not_finite: int | None
    """Number of steps whose k3 is infinite or not a number, which the mean leaves out; None if there is none."""
    ratio_max: float | None
    """Largest `policy/ratio/max`."""
    skipped: int | None
    """Number of skipped optimizer steps."""
    seconds: float | None
    """Duration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Several runs side by side."""

    runs: tuple[ComparedRun, ...]
    """One for each run, in the order given."""
    differences: dict[str, tuple[Any, ...]]
    """Dotted key -> its value in each run, for the settings that differ; None where a run does not have the key."""

    def to_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            "verb": "compare",
            "runs": [asdict(run) for run in self.runs],
            "differences": {key: list(values) for key, values in self.differences.items()},
        }

    def __str__(self) -> str:
        """Return the table as the command line prints it."""
        return comparison_text([asdict(run) for run in self.runs], self.differences)

    def _repr_html_(self) -> str:
        """Return the tables and the figures of all runs, which a notebook shows."""
        folders = [RunDir(Path(run.path)) for run in self.runs]
        return comparison_html([asdict(run) for run in self.runs], self.differences, folders)


def compare_runs(paths: Sequence[Path]) -> Comparison:
    """Compare runs; the folder of a sanity run stands for its arms, that of a sweep for its runs.

    Raises:
        InputError: a folder is not that of a run, a sweep has no run folders, or there is nothing to compare.
    """
    folders = [folder for path in paths for folder in _runs_in(RunDir.open(path))]
    if not folders:
        raise InputError("there is no run to compare. Name run folders, or the folder of a sanity run or a sweep.")
    configs = [_settings(folder) for folder in folders]
    names = _names(folders)
    runs = tuple(_compared(folder, name) for folder, name in zip(folders, names, strict=True))
    return Comparison(runs=runs, differences=_differences(configs))


def _runs_in(run: RunDir) -> Iterator[RunDir]:
    """Yield the arms of a sanity run, the runs of a sweep, or the run itself."""
    if run.arm_names():
        yield from map(run.arm, run.arm_names())
    elif run.results.exists() or run.cells.is_dir():
        cells = sorted(child.name for child in run.cells.iterdir() if child.is_dir()) if run.cells.is_dir() else []
        if not cells:
            raise InputError(f"{run.path} holds no run folders. `betterhalf report {run.path}` shows its results.")
        yield from map(run.cell, cells)
    else:
        yield run


def _names(folders: Sequence[RunDir]) -> list[str]:
    """Return the shortest ends of the paths that are all different."""
    parts = [folder.path.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(_without_layout(path[-length:])) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder.path) for folder in folders]


def _without_layout(parts: Sequence[str]) -> list[str]:
    """Drop the folders between a run and the sanity run or the sweep that it belongs to."""
    return [part for part in parts[:-1] if part not in ("arms", "runs")] + [parts[-1]]


def _compared(run: RunDir, name: str) -> ComparedRun:
    summary, rows = _optional(run.summary), read_jsonl(run.metrics)
    rewards = finite(rows, "rollout/reward/mean")
    course = reward_course(rewards, FINAL_STEPS) if rewards else None
    skipped = finite(rows, "optim/skipped")
    return ComparedRun(
        name=name,
        path=str(run.path),
        verb=str(summary["verb"]) if "verb" in summary else None,
        outcome=_outcome(summary, course.outcome if course else None),
        passed=verdict if isinstance(verdict := summary.get("passed"), bool) else None,
        cluster=_cluster(_optional(run.config).get("cluster")),
        steps=len(rows),
        first_reward=course.first if course else None,
        final_reward=course.final if course else None,
        accuracy=_accuracy(summary),
        k3=mean(finite(rows, _K3)),
        k3_not_finite=sum(_K3 in row and not math.isfinite(number(row[_K3])) for row in rows) or None,
        ratio_max=max(finite(rows, "policy/ratio/max"), default=None),
        skipped=int(sum(skipped)) if skipped else None,
        seconds=_finite(summary.get("seconds")),
    )


def _cluster(settings: Any) -> str | None:
    if not isinstance(settings, Mapping) or settings.get("backend") in (None, "local"):
        return None
    return f"{settings['backend']} {settings.get('trainers')}+{settings.get('engines')}"


def _outcome(summary: Mapping[str, Any], course: str | None) -> str:
    if not summary:
        return "unfinished"
    if "stopped" in summary or "reason" in summary:
        return "stopped"
    return course or "finished"


def _accuracy(summary: Mapping[str, Any]) -> float | None:
    averages = [value for key, value in summary.items() if key.startswith("avg@")]
    return _finite(summary.get("final_accuracy", next(iter(averages), None)))


def _settings(run: RunDir) -> dict[str, Any]:
    """Return a run's settings by dotted key, without the rules of the watchdog that only warn."""
    settings = flat(_optional(run.config))
    if isinstance(levels := settings.get(_LEVELS), list):
        settings[_LEVELS] = [level for level in levels if not _only_warns(level)]
    return settings


def _only_warns(level: object) -> bool:
    return isinstance(level, Mapping) and level.get("action") == "warn"


def _differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """Return the settings that differ between runs that recorded any, without those that change no number."""
    keys = dict.fromkeys(key for config in configs for key in config if key.partition(".")[0] not in _IGNORED)
    values = {key: tuple(config.get(key) for config in configs) for key in sorted(keys)}
    return {key: found for key, found in values.items() if any(one != found[0] for one in found)}


def _finite(value: object) -> float | None:
    """Return a number; None for anything else, which a damaged file may hold."""
    return found if math.isfinite(found := number(value)) else None


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
