"""The verbs of the command line as functions. Each returns the folder it wrote as a `Run`.

Settings are keyword arguments, as in an experiment file: `precision="fp16"`, `training={"steps": 3}`, or dotted,
`**{"optimizer.learning_rate": 1e-5}`. Errors are those of `betterhalf.errors`; none exits the process. An interrupted
call keeps what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from betterhalf.api.run import Run, load_run
from betterhalf.api.targets import DEMO, PROBE, run_config, run_to_resume
from betterhalf.config.load import ConfigSource, configuration_of
from betterhalf.config.schema import RunConfig
from betterhalf.errors import InputError
from betterhalf.process import prepare_process

if TYPE_CHECKING:
    from betterhalf.examine.plan import RunPlan
    from betterhalf.runs.compare import Comparison

Folder = str | Path | None
"""Folder to write to; None for a new one under `runs/`."""


def train(config: ConfigSource = None, *, run_dir: Folder = None, resume: bool = False, **settings: Any) -> Run:
    """Fine-tune a model with RL.

    Args:
        config: experiment file, run folder, mapping of settings, `RunConfig`, or None for the defaults.
        run_dir: folder to write to.
        resume: continue the run in `run_dir`, or in `config` if that is a run folder.
        **settings: further settings, which override those of `config`.

    Raises:
        InputError: bad input, found before the first step.
        RunError: a failure while running; what is written is kept.
    """
    if resume and run_dir is None and isinstance(config, str | Path):
        run_dir = run_to_resume(config)
    chosen = _prepared(config, settings)
    from betterhalf.runs.train import train as run_train

    return _run(run_train(chosen, _text(run_dir), resume))


def sanity(config: ConfigSource = DEMO, *, run_dir: Folder = None, resume: bool = False, **settings: Any) -> Run:
    """Run the sanity test of arXiv 2510.26788; `Run.passed` is its verdict, `Run.arms` its runs.

    Arguments and errors are those of `train`. Without `config` it runs the demo.
    """
    chosen = _prepared(config, settings)
    from betterhalf.runs.sanity import sanity as run_sanity

    return _run(run_sanity(chosen, _text(run_dir), resume))


def probe(
    target: str | Path | None = None,
    config: ConfigSource = None,
    *,
    run_dir: Folder = None,
    from_dump: str | Path | None = None,
    gradient: bool = False,
    localize: bool = False,
    **settings: Any,
) -> Run:
    """Measure the mismatch for every pair of precisions, without training; `Run.result` has the pairs.

    Args:
        target: model or run folder; may be None for a dump that includes trainer logprobs.
        config: experiment; by default that of the run folder, or a small sample of the model's own completions.
        run_dir: folder to write to.
        from_dump: file with another framework's rollouts (docs/probe.md), analysed instead of new ones.
        gradient: also measure the effect of the mismatch on the policy gradient.
        localize: also find the first operation where trainer and engine diverge.
        **settings: further settings, which override those of `config`.

    Raises:
        InputError: model, dump or settings cannot be used.
        RunError: a pair could not be measured; all others are on disk.
    """
    if target is None and from_dump is None:
        raise InputError("probe has no model to examine. Name a model or a run, or give from_dump=FILE.")
    chosen = _prepared(_source(target, config, PROBE), settings)
    from betterhalf.examine.probe import probe as run_probe

    parts = {"gradient": gradient, "localize": localize}
    return _run(run_probe(_text(target), chosen, _text(run_dir), from_dump=_text(from_dump), **parts))


def doctor(target: str | Path, config: ConfigSource = None, *, run_dir: Folder = None, **settings: Any) -> Run:
    """Recommend a precision for a model or a run; `Run.result` has verdicts, census and mismatch.

    Args:
        target: model or run folder.
        config: as for `probe`.
        run_dir: folder to write to.
        **settings: further settings, which override those of `config`.

    Raises:
        InputError: model or settings cannot be used.
        RunError: a failure while running; results so far are in `doctor.json`.
    """
    chosen = _prepared(_source(target, config, PROBE), settings)
    from betterhalf.examine.doctor import doctor as run_doctor

    return _run(run_doctor(str(target), chosen, _text(run_dir)))


def evaluate(
    target: str | Path,
    config: ConfigSource = None,
    *,
    run_dir: Folder = None,
    resume: bool = False,
    checkpoint: str | int = "latest",
    **settings: Any,
) -> Run:
    """Measure the accuracy of a model or a run with the rollout engine; `Run.summary` has avg@k, pass@k and maj@k.

    Args:
        target: model or run folder.
        config: experiment; by default that of the run folder, or the defaults for a model.
        run_dir: folder to write to.
        resume: continue the evaluation in `run_dir`.
        checkpoint: checkpoint of a run: `latest`, `best`, or its step.
        **settings: further settings, which override those of `config`.

    Raises:
        InputError: model, data or settings cannot be used.
        RunError: a failure while running; results so far are kept.
    """
    chosen = _prepared(_source(target, config, None), settings)
    from betterhalf.runs.evaluate import evaluate as run_evaluate

    return _run(run_evaluate(str(target), chosen, _text(run_dir), resume, str(checkpoint)))


def plan(config: ConfigSource = None, *, gpu_gib: float | None = None, **settings: Any) -> RunPlan:
    """Compute memory, traffic and packing of a run on its `[cluster]`, without loading weights.

    Args:
        config: as for `train`.
        gpu_gib: memory of one GPU to plan for, in GiB; by default that of this machine's first GPU.
        **settings: further settings, which override those of `config`.

    Raises:
        InputError: the model's configuration files or the data cannot be read.
    """
    chosen = _prepared(config, settings)
    from betterhalf.examine.plan import plan as plan_run

    return plan_run(chosen, gpu_gib)


def compare(*runs: str | Path | Run) -> Comparison:
    """Compare runs side by side; the folder of a sanity run or of a sweep stands for all runs in it.

    Raises:
        InputError: a folder is not that of a run, or there are none.
    """
    from betterhalf.runs.compare import compare_runs

    return compare_runs([run.path if isinstance(run, Run) else Path(run) for run in runs])


def _prepared(config: ConfigSource, settings: Mapping[str, Any]) -> RunConfig:
    """Return the configuration, and choose the threads of this process if torch is not loaded yet."""
    chosen = configuration_of(config, settings)
    prepare_process()
    return chosen


def _source(target: str | Path | None, config: ConfigSource, default: str | None) -> ConfigSource:
    if config is not None:
        return config
    return (run_config(target) if target is not None else None) or default


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _run(result: Mapping[str, Any]) -> Run:
    return load_run(result["run_dir"])
