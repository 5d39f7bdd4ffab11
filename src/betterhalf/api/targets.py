"""Experiments and configurations that a verb starts from; the command line and the Python functions share them."""

from __future__ import annotations

from pathlib import Path

from betterhalf.errors import InputError
from betterhalf.run_dir import RunDir

DEMO = "experiments/sanity/demo.toml"
"""Experiment of `sanity` without an argument; it comes with the package."""

PROBE = "experiments/base/probe.toml"
"""Experiment that `probe` and `doctor` use for a model."""


def run_to_resume(experiment: str | Path) -> Path | None:
    """Return EXPERIMENT if it is a run folder, which a resumed run then continues; None for a file."""
    return Path(experiment) if RunDir(Path(experiment)).config.exists() else None


def run_config(target: str | Path) -> Path | None:
    """Return the path of a run folder's configuration; None for a model.

    Raises:
        InputError: the folder is that of a sanity run, which holds several policies.
    """
    run = RunDir(Path(target))
    if run.arm_names():
        arm = run.arm(run.arm_names()[0])
        raise InputError(f"{target} is a sanity run with several policies. Name one of its arms, such as {arm.path}.")
    return run.config if run.configured else None
