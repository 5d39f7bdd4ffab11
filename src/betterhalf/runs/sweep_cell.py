"""One cell of a sweep: train it, evaluate the trained policy where asked, and record how it ended."""

from __future__ import annotations

import shutil
import time
from functools import partial
from typing import Any

from betterhalf.config.load import load_config
from betterhalf.config.schema import ArithmeticTask, PrecisionConfig, RunConfig, TaskConfig
from betterhalf.errors import EngineNumericsError, LossScaleError, NumericsError, WatchdogError
from betterhalf.run_dir import RunDir, read_json, write_json_atomic
from betterhalf.run_lock import run_lock
from betterhalf.runs.assembly import Parts, assemble
from betterhalf.runs.evaluation import average_reward, evaluate_prompts
from betterhalf.runs.progress import Progress
from betterhalf.runs.train import run_training, summarise
from betterhalf.runs.weight_sync import first_sync
from betterhalf.setup.trained_policy import load_policy

_FRESH_SEED = 1_000_003
"""Distance of the seed of fresh problems from that of the problems in training."""


def run_cell(config: RunConfig, label: str, run: RunDir) -> None:
    """Train one cell in its run folder; an unfinished one continues from its last checkpoint.

    A run that ends because of its precision (the loss scale at its floor, logprobs that are not finite, a mismatch at
    which the watchdog stops) is a result, recorded with its reason. Any other error is raised, also a crash of the
    engine beyond the allowed restarts.
    """
    resume, started = run.holds_run, time.perf_counter()

    def final_accuracy(parts: Parts, progress: Progress) -> dict[str, Any]:
        return {"final_accuracy": evaluate_masters(config, run)} if config.sweep.evaluate else {}

    try:
        RunDir.create(run.path, resume=resume)
        with run_lock(run.path):
            run_training(config, run, resume=resume, label=label, kind="cell", after=final_accuracy)
    except (LossScaleError, EngineNumericsError, NumericsError, WatchdogError) as error:
        stopped = isinstance(error, WatchdogError)
        measured = read_json(run.summary) if stopped else summarise(run, config) if run.metrics.exists() else {}
        seconds = time.perf_counter() - started
        write_json_atomic(run.summary, measured | {"reason": str(error), "seconds": seconds})
        if stopped:
            return  # its checkpoint stays: with other watchdog levels the run can continue
    if not config.sweep.keep_checkpoints:
        shutil.rmtree(run.checkpoints, ignore_errors=True)


def finished(config: RunConfig, run: RunDir) -> bool:
    """Return whether a cell has its result; one that the watchdog stopped continues if its levels have changed."""
    if not run.summary.exists():
        return False
    return "stopped" not in read_json(run.summary) or load_config(run.config).watchdog == config.watchdog


def evaluate_masters(config: RunConfig, run: RunDir) -> float:
    """Return avg@k of the run's newest checkpoint, sampled at temperature 1 by an engine in `sweep.evaluate`.

    The checkpoint holds FP32 masters, so an engine in FP32 samples from exactly the trained policy.
    """
    settings, prompts = evaluation_config(config), config.sweep.evaluation_prompts
    parts = assemble(settings, rows=prompts, evaluating=True, trained=partial(load_policy, str(run.path)))
    try:
        version = first_sync(parts).policy_version
        shown = [parts.task.prompt(index) for index in range(min(prompts, len(parts.task)))]
        results = evaluate_prompts(parts, shown, config.sweep.evaluation_samples, policy_version=version)
    finally:
        parts.close()
    return average_reward(results)


def evaluation_config(config: RunConfig) -> RunConfig:
    """Return the settings of the evaluation: its precision, temperature 1, and fresh problems if they are generated."""
    assert config.sweep.evaluate is not None
    return config.model_copy(
        update={
            "precision": PrecisionConfig(preset=config.sweep.evaluate),
            "sampling": config.sampling.model_copy(update={"temperature": 1.0}),
            "task": _fresh(config.task),
        }
    )


def _fresh(task: TaskConfig) -> TaskConfig:
    """Return other problems of a generated task; a data set and a perfectible set stay as they are."""
    return task.model_copy(update={"seed": task.seed + _FRESH_SEED}) if isinstance(task, ArithmeticTask) else task
