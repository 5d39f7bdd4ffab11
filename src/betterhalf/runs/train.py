"""One training run, from configuration to run folder, and its continuation with `--resume`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from betterhalf.algorithms.presets import resolve_algorithm
from betterhalf.config.load import config_difference, load_config, resolved_json
from betterhalf.config.schema import RunConfig
from betterhalf.environment import environment
from betterhalf.errors import InputError, WatchdogError
from betterhalf.metrics.console import Console
from betterhalf.precision.contract import Contract
from betterhalf.process import chosen_threads
from betterhalf.report.emulated import emulated_names, emulated_sentence, precision_words
from betterhalf.report.fields import finite, mean
from betterhalf.report.page import write_report
from betterhalf.run_dir import RunDir, read_json, read_jsonl, write_json_atomic
from betterhalf.runs.assembly import Parts, algorithm_record, assemble, unique_tasks
from betterhalf.runs.checkpoints import newest, require_known_metric, require_same_model, restore
from betterhalf.runs.data_check import RESUMABLE_KEYS, without_permission
from betterhalf.runs.loop import train_steps
from betterhalf.runs.progress import Progress
from betterhalf.runs.record import StepRecorder
from betterhalf.runs.track import tracked
from betterhalf.runs.trainer_recovery import TrainerRestarts, retry_on_trainer_death
from betterhalf.runs.watchdog import Alarm, Stopped, require_sound_levels
from betterhalf.runs.weight_sync import first_sync
from betterhalf.setup.data import write_left_out
from betterhalf.setup.folder import run_folder
from betterhalf.setup.trained_policy import best_evaluation
from betterhalf.tracking.kinds import require_trackers
from betterhalf.tracking.tracking import Tracking
from betterhalf.training.checkpoint import step_folder
from betterhalf.types import RunKind


def train(config: RunConfig, run_dir: str | None, resume: bool) -> dict[str, Any]:
    """Run, or continue, one fine-tuning run, and write its report.

    Args:
        config: the resolved configuration.
        run_dir: the run folder; `runs/train-<name>-<time>` by default.
        resume: continue from the folder's newest checkpoint.

    Returns:
        The summary, as written to `summary.json`.

    Raises:
        InputError: bad input, found before the first step.
        RunError: a failure while running; everything written so far is kept.
    """
    if resume and run_dir is None:
        raise InputError("--resume needs the folder of the run to continue; add run_dir=PATH")
    with run_folder(run_dir, "train", config.name, resume=resume) as run:
        summary = run_training(config, run, resume=resume, label=config.name)
        write_report([run.path], run.report)
        return summary


def run_training(
    config: RunConfig,
    run: RunDir,
    *,
    resume: bool,
    label: str,
    kind: RunKind = "train",
    after: Callable[[Parts, Progress], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train in `run`; `after` may evaluate the trained policy and add to the summary (an arm's final accuracy).

    Raises:
        InputError, RunError: see `train`; in particular a `WatchdogError` if the watchdog stopped the run.
    """
    started = time.perf_counter()
    check_settings(config)
    if run.config.exists():
        require_same_config(run, config)
        require_same_loss(run, config)
    saved = newest(run) if resume else None
    if saved is not None:
        require_same_model(saved, config)
    threads = _threads_note(run)
    parts = assemble(config, folder=run.path, restores=saved is not None)
    try:
        progress = restore(parts, run, saved) if resume else Progress()
        contract = first_sync(parts).contract
        if not run.config.exists():
            _write_head(run, parts, contract)
        # A resumed run may be on another cluster, which changes no setting of the algorithm.
        recorded = read_json(run.environment) if run.environment.exists() else {}
        write_json_atomic(run.environment, recorded | {"cluster": parts.sides.cluster()})
        write_left_out(run, *unique_tasks(parts))
        # A resumed run may have other watchdog levels; its own configuration must name those in force.
        write_json_atomic(run.config, resolved_json(without_permission(config)))
        # A run in progress has no summary; an earlier stop stays on record in watchdog.jsonl.
        run.summary.unlink(missing_ok=True)
        emulated = emulated_sentence(parts.precision.roles.model_dump().values())
        shown = f"{label}: {_formats(config)}" if emulated else label
        with tracked(config, run, label, kind) as tracking:
            with Console(config.logging.console, total_steps=config.training.steps, label=shown) as console:
                for note in filter(None, (threads, emulated, contract.table())):
                    console.note(note)
                progress = _train_and_record(parts, run, progress, console, tracking)
            extra = after(parts, progress) if after else {}
            summary = summarise(run, config) | extra | {"seconds": time.perf_counter() - started}
            write_json_atomic(run.summary, summary)
    finally:
        parts.close()
    return summary


def check_settings(config: RunConfig) -> None:
    """Refuse settings of a training run that cannot take effect, before anything is loaded; see also `assemble`.

    Raises:
        ConfigError: a level of the watchdog or `training.keep_best_metric` cannot take effect.
        InputError, MissingExtraError: a tracker cannot be used.
    """
    require_sound_levels(config)
    require_known_metric(config)
    require_trackers(config.logging)


def _formats(config: RunConfig) -> str:
    roles = config.precision.roles()
    return precision_words(roles.compute_dtype, roles.rollout_dtype)


def _threads_note(run: RunDir) -> str | None:
    """Return a note on the threads of this process, and on another number in the run that it continues."""
    threads = chosen_threads()
    if threads is None:
        return None
    before = recorded_threads(run)
    if before in (None, threads.count):
        return str(threads)
    return (
        f"{threads}\nearlier steps used {before}: sums now have another order, and so other last bits; set "
        f"OMP_NUM_THREADS={before} to continue bit for bit"
    )


def recorded_threads(run: RunDir) -> int | None:
    """Return the number of threads that the run was started with; None if it was not recorded."""
    if not run.environment.exists():
        return None
    return (read_json(run.environment).get("threads") or {}).get("count")


def require_same_config(run: RunDir, config: RunConfig, *, how: str = "") -> None:
    """Refuse to continue a run with another configuration; only some settings may change.

    The watchdog's levels may change, because a stopped run must be able to continue; their effects so far are in the
    checkpoint. The settings for bad or changed rows may change, because the need for them shows during a run; the data
    itself is compared row by row. `sanity.arms_at_once` may change, because a resumed arm keeps its threads, and
    `logging` and the settings for keeping checkpoints may, because they change no number. `cluster` may change, because
    any number of ranks reads a checkpoint of any other.

    Args:
        run: folder of the run.
        config: configuration to continue with.
        how: advice on what to repeat; by default the experiment and its overrides.

    Raises:
        InputError: a setting differs; the message lists all differences.
    """
    found = config_difference(load_config(run.config), config)
    changes = [change for change in found if not _may_change(change.key)]
    if changes:
        lines = "\n".join(f"  {change}" for change in changes)
        raise InputError(
            f"{run.path} was started with another configuration:\n{lines}\n"
            f"{how or _REPEAT_EXPERIMENT.format(run.path)}, or start again in another run_dir"
        )


def require_same_loss(run: RunDir, config: RunConfig) -> None:
    """Refuse to continue a run with other code behind `algorithm.loss`, as with another configuration.

    Raises:
        InputError: the file with the loss has changed.
    """
    own = resolve_algorithm(config.algorithm).loss
    if own is None or not run.environment.exists():
        return
    before = (read_json(run.environment).get("algorithm", {}).get("loss") or {}).get("digest", own.digest)
    if before != own.digest:
        raise InputError(
            f"{run.path} was started with other code in algorithm.loss={own.path}: its digest was {before} and is now "
            f"{own.digest}. Restore the file, or start again in another run_dir."
        )


_REPEAT_EXPERIMENT = "Resume with the same experiment and overrides (naming {} as the experiment uses its own)"


def _may_change(key: str) -> bool:
    section, _, rest = key.partition(".")
    if section == "task":
        return rest.removeprefix("base.") in RESUMABLE_KEYS
    if key.startswith("evaluate.data."):
        return key.rpartition(".")[2] in RESUMABLE_KEYS
    if section in ("watchdog", "logging", "cluster"):
        return True
    # Retention of checkpoints changes no number.
    return key in ("sanity.arms_at_once", "sweep.keep_checkpoints") or key.startswith("training.keep_")


def _write_head(run: RunDir, parts: Parts, contract: Contract) -> None:
    """Write contract and environment; the caller writes the configuration last, so a folder that has it is complete."""
    write_json_atomic(run.contract, contract.to_json())
    write_json_atomic(run.environment, environment() | {"algorithm": algorithm_record(parts.algorithm)})


def _train_and_record(parts: Parts, run: RunDir, progress: Progress, console: Console, tracking: Tracking) -> Progress:
    """Run the loop, and record each step; if the trainer dies, start it again and repeat the steps that it lost."""
    restarts = TrainerRestarts(parts.config.cluster.max_restarts, console.warn)
    recorder = StepRecorder(parts, run, console, restarts, tracking)

    def train_from(progress: Progress) -> Progress:
        recorder.begin(progress)
        finished = train_steps(parts, progress, recorder.record)
        recorder.checkpoints.wait()
        return finished

    def begin_again() -> Progress:
        recorder.checkpoints.drop()
        parts.trainer.restart()
        found = restore(parts, run, newest(run))
        first_sync(parts)
        return found

    def step() -> int:
        # After the last step, what is left belongs to it: its checkpoint.
        return min(recorder.finished.step + 1, parts.config.training.steps)

    try:
        return retry_on_trainer_death(train_from, progress, begin_again, step, restarts)
    except Stopped as stopped:
        recorder.record_alarms(stopped.watch.alarms, measured=stopped.measured)
        recorder.checkpoints.save(recorder.finished)
        recorder.checkpoints.wait()
        raise _stop(parts, run, stopped.stop) from stopped
    finally:
        recorder.close()


def _stop(parts: Parts, run: RunDir, stop: Alarm) -> WatchdogError:
    """Write a summary of the finished steps, and return an error that says how to continue."""
    summary = summarise(run, parts.config) | {"stopped": f"step {stop.step}: {stop.reason}", "stopped_step": stop.step}
    write_json_atomic(run.summary, summary)
    # The doctor examines hardware formats only.
    doctor = "" if summary["emulated"] else f"`betterhalf doctor {run.path}` and "
    return WatchdogError(
        f"the watchdog stopped the run in step {stop.step}: {stop.reason}. That step was not trained on; "
        f"{run.path} holds the {stop.step - 1} steps before it, and watchdog.jsonl the measurements. See where "
        f"trainer and engine diverge with {doctor}`betterhalf probe {run.path} --localize`; "
        "continue with --resume once the cause is fixed, or with other watchdog.levels, which a resumed run may change"
    )


def summarise(run: RunDir, config: RunConfig) -> dict[str, Any]:
    """Return the run in a few numbers, over all its steps, those before a resume included."""
    rows = read_jsonl(run.metrics)
    return {
        "verb": "train",
        "name": config.name,
        "precision": (roles := config.precision.roles().model_dump()),
        "emulated": emulated_names(roles.values()),
        "algorithm": config.algorithm.preset,
        **({} if config.cluster.described is None else {"cluster": config.cluster.described}),
        "steps": len(rows),
        "rows_left_out": len(read_jsonl(run.bad_rows)),
        **(_totals(rows) if rows else {}),
        **_evaluations(run),
        **({"task": own} if (own := _task_totals(rows)) else {}),
        "run_dir": str(run.path),
    }


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    gaps = [abs(gap) for side in ("max", "min") for gap in finite(rows, f"mismatch/prob_gap/{side}")]
    return {
        "first_reward": rows[0]["rollout/reward/mean"],
        "first_truncated_fraction": rows[0]["rollout/truncated_fraction"],
        "last_reward": statistics.fmean(row["rollout/reward/mean"] for row in rows[-10:]),
        "first_kept_reward": _kept_reward(rows[0]),
        "last_kept_reward": statistics.fmean(map(_kept_reward, rows[-10:])),
        "mismatch_k3": mean(finite(rows, "mismatch/k3/mean")),
        "mismatch_max_abs": max(gaps, default=None),
        "skipped_steps": int(sum(row["optim/skipped"] for row in rows)),
        "policy_version": int(rows[-1]["policy/version"]),
    }


def _evaluations(run: RunDir) -> dict[str, Any]:
    """Return first, last and best accuracy of the evaluations during training; empty without any."""
    rows, best = read_jsonl(run.evaluated_steps), best_evaluation(run)
    if not rows:
        return {}
    found = {"first_accuracy": rows[0]["accuracy"], "last_accuracy": rows[-1]["accuracy"]}
    if best is None:
        return found
    path = step_folder(run.checkpoints, best.step).relative_to(run.path)
    return found | {"best_accuracy": best.accuracy, "best_step": best.step, "best_checkpoint": str(path)}


def _task_totals(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the task's own metrics: means of the last 10 steps of `.../mean` and `.../std`, sums of its counters."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("task/"))
    found = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    averaged = ("/mean", "/std")
    return {
        name.removeprefix("task/"): statistics.fmean(values[-10:]) if name.endswith(averaged) else sum(values)
        for name, values in found.items()
        if values
    }


def _kept_reward(row: dict[str, Any]) -> float:
    """Return the mean reward of the step's own groups; older versions wrote it as `rollout/reward/mean`."""
    return float(row.get("rollout/kept/reward/mean", row["rollout/reward/mean"]))
