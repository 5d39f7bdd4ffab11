"""`Run`: the folder of a run as an object, for notebooks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from betterhalf.api.rows import Rows
from betterhalf.config.load import load_config
from betterhalf.config.schema import RunConfig
from betterhalf.report.notebook import facts_html, figures_html
from betterhalf.report.page import write_report
from betterhalf.run_dir import RunDir, read_json, read_jsonl

_SHOWN = ("name", "outcome", "passed", "recommended", "steps", "first_reward", "last_reward", "mismatch_k3")
"""Entries of a summary that a notebook shows first."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run, finished or not. Every attribute is read from its folder when it is asked for."""

    path: Path
    """The folder."""

    @property
    def folder(self) -> RunDir:
        """The folder with the names of its files."""
        return RunDir(self.path)

    @property
    def config(self) -> RunConfig:
        """The resolved configuration.

        Raises:
            ConfigError: the folder has none yet.
        """
        return load_config(self.folder.config)

    @property
    def summary(self) -> dict[str, Any]:
        """Content of `summary.json`: the result of the run; empty while it runs."""
        return _optional(self.folder.summary)

    @property
    def result(self) -> dict[str, Any]:
        """The whole result: `doctor.json` or `probe.json` of such a folder, else the summary."""
        doctor = self.path / "doctor.json"
        found = next((path for path in (doctor, self.folder.probe) if path.exists()), self.folder.summary)
        return _optional(found)

    @property
    def passed(self) -> bool | None:
        """Verdict of a sanity run, of an arm or of a doctor; None without one."""
        verdict = self.result.get("passed")
        return None if verdict is None else bool(verdict)

    @property
    def metrics(self) -> Rows:
        """One row for each step; empty for a folder of several runs, whose `arms` have them."""
        return Rows(read_jsonl(self.folder.metrics))

    @property
    def contract(self) -> dict[str, Any]:
        """Content of `contract.json`: what trainer and engine reported of their precision; empty without one."""
        return _optional(self.folder.contract)

    @property
    def arms(self) -> dict[str, Run]:
        """Arms of a sanity run by name; empty for any other run."""
        return {name: Run(self.folder.arm(name).path) for name in self.folder.arm_names()}

    def rollouts(self) -> Rows:
        """Return the recorded sample of rollouts, with the logprobs of both policies for each token."""
        return Rows(read_jsonl(self.folder.rollouts))

    def report(self) -> Path:
        """Write `report.html` with all figures into the folder, and return its path."""
        return write_report([self.path], self.folder.report)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """Return a small table and the main figures, which a notebook shows."""
        return facts_html(self._facts()) + figures_html([self.folder])

    def _facts(self) -> dict[str, object]:
        result, rows = self.result, self.metrics
        facts: dict[str, object] = {"run": self.path, "verb": result.get("verb", "unfinished")}
        facts |= {key: result[key] for key in _SHOWN if key in result}
        facts |= {key: value for key, value in result.items() if key.startswith(("avg@", "pass@", "maj@"))}
        facts |= {"steps": len(rows)} if rows else {}
        return facts | ({"seconds": result["seconds"]} if isinstance(result.get("seconds"), float) else {})


def load_run(path: str | Path) -> Run:
    """Return the run in a folder that any verb wrote.

    Raises:
        InputError: the folder does not exist, or is not that of a run.
    """
    return Run(RunDir.open(path).path.absolute())


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
