"""One training run, from configuration to run folder, and its continuation with `--resume`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from betterhalf.algorithms.presets import resolve_algorithm
from betterhalf.config.load import config_difference, load_config, resolved_json
from betterhalf.config.schema import RunConfig
from betterhalf.environment import environment
from betterhalf.errors import InputError, WatchdogError
from betterhalf.metrics.console import Console
from betterhalf.metrics.sinks import JsonlSink, MetricSink, Sinks, TensorBoardSink
from betterhalf.precision.contract import Contract
from betterhalf.process import chosen_threads
from betterhalf.report.emulated import emulated_names, emulated_sentence, precision_words
from betterhalf.report.page import write_report
from betterhalf.run_dir import RunDir, append_jsonl, read_json, read_jsonl, write_json_atomic
from betterhalf.runs.assembly import Parts, algorithm_record, assemble, unique_tasks
from betterhalf.runs.checkpoints import restore, save_checkpoint
from betterhalf.runs.data_check import RESUMABLE_KEYS, without_permission
from betterhalf.runs.kept_rollouts import rollout_row
from betterhalf.runs.loop import StepResult, train_steps
from betterhalf.runs.periodic import PeriodicResult, evaluate_after, evaluated, evaluation_due
from betterhalf.runs.progress import Progress
from betterhalf.runs.watchdog import Alarm, Stopped, require_sound_levels
from betterhalf.runs.weight_sync import first_sync
from betterhalf.setup.data import write_left_out
from betterhalf.setup.folder import run_folder
from betterhalf.setup.trained_policy import best_evaluation
from betterhalf.training.checkpoint import step_folder


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
    after: Callable[[Parts, Progress], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train in `run`; `after` may evaluate the trained policy and add to the summary (an arm's final accuracy)."""
    started = time.perf_counter()
    require_sound_levels(config)
    if run.config.exists():
        require_same_config(run, config)
        require_same_loss(run, config)
    threads = _threads_note(run)
    parts = assemble(config)
    try:
        progress = restore(parts, run) if resume else Progress()
        contract = first_sync(parts).contract
        if not run.config.exists():
            _write_head(run, parts, contract)
        write_left_out(run, *unique_tasks(parts))
        # A resumed run may have other watchdog levels; its own configuration must name those in force.
        write_json_atomic(run.config, resolved_json(without_permission(config)))
        # A run in progress has no summary; an earlier stop stays on record in watchdog.jsonl.
        run.summary.unlink(missing_ok=True)
        emulated = emulated_sentence(parts.precision.roles.model_dump().values())
        shown = f"{label}: {_formats(config)}" if emulated else label
        with Console(config.logging.console, total_steps=config.training.steps, label=shown) as console:
            if threads:
                console.note(threads)
            if emulated:
                console.note(emulated)
            console.note(contract.table())
            progress = _train_and_record(parts, run, progress, console)
        extra = after(parts, progress) if after else {}
    finally:
        parts.close()
    summary = summarise(run, config) | extra | {"seconds": time.perf_counter() - started}
    write_json_atomic(run.summary, summary)
    return summary


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
    `logging` may, because it changes no number.

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
    return section in ("watchdog", "logging") or key in ("sanity.arms_at_once", "sweep.keep_checkpoints")


def _write_head(run: RunDir, parts: Parts, contract: Contract) -> None:
    """Write contract and environment; the caller writes the configuration last, so a folder that has it is complete."""
    write_json_atomic(run.contract, contract.to_json())
    write_json_atomic(run.environment, environment() | {"algorithm": algorithm_record(parts.algorithm)})


def _train_and_record(parts: Parts, run: RunDir, progress: Progress, console: Console) -> Progress:
    """Run the loop, and record each step on disk and on the terminal."""
    extras: list[MetricSink] = [TensorBoardSink(run.tensorboard)] if parts.config.logging.tensorboard else []
    sinks = Sinks(JsonlSink(run.append_metrics), extras, warn=console.note)
    finished = progress

    def evaluate(step: int, policy_version: int) -> PeriodicResult | None:
        if not evaluation_due(parts.config, step) or evaluated(run, step):
            return None
        found = evaluate_after(parts, run, step, policy_version)
        console.note(found.text)
        return found

    def record(result: StepResult) -> None:
        nonlocal finished
        finished, step = result.progress, result.progress.step
        found = evaluate(step, finished.policy_version)
        sinks.write(step, {**result.metrics, **(found.metrics if found else {})})
        append_jsonl(run.mismatch, {"step": step, **asdict(result.profile)})
        for kept in result.kept:
            run.append_rollout(rollout_row(step, kept, parts.model.tokenizer))
        console.update(step, result.metrics)
        _record_alarms(run, console, result.alarms)
        if result.metrics["optim/first_offender"]:
            console.note(_skip_note(step, result))
        if result.truncation:
            console.note(f"step {step}: {result.truncation}")
        if _checkpoint_due(parts.config, step) or (found and found.improved and parts.config.evaluate.keep_best):
            save_checkpoint(parts, run, result.progress)

    try:
        if progress.step == 0:
            evaluate(0, progress.policy_version)
        return train_steps(parts, progress, record)
    except Stopped as stopped:
        _record_alarms(run, console, stopped.watch.alarms, measured=stopped.measured)
        save_checkpoint(parts, run, finished)
        raise _stop(parts, run, stopped.stop) from stopped
    finally:
        sinks.close()


def _record_alarms(run: RunDir, console: Console, alarms: tuple[Alarm, ...], **more: Any) -> None:
    """Write a row for each alarm, with `more` for a stop, and show a note for each fresh one."""
    for alarm in alarms:
        append_jsonl(run.watchdog, asdict(alarm) | (more if alarm.action == "stop" else {}))
        if alarm.fresh:
            console.note(f"step {alarm.step}: watchdog ({alarm.action}): {alarm.reason}")


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


def _skip_note(step: int, result: StepResult) -> str:
    metrics = result.metrics
    return (
        f"step {step}: {metrics['optim/skipped']:.0f} optimizer step(s) skipped, gradients overflowed first in "
        f"{metrics['optim/first_offender']}; loss scale is now {metrics['optim/loss_scale']:g}"
    )


def _checkpoint_due(config: RunConfig, step: int) -> bool:
    every = config.training.checkpoint_every
    return step == config.training.steps or (every > 0 and step % every == 0)


def summarise(run: RunDir, config: RunConfig) -> dict[str, Any]:
    """Return the run in a few numbers, over all its steps, those before a resume included."""
    rows = read_jsonl(run.metrics)
    return {
        "verb": "train",
        "name": config.name,
        "precision": (roles := config.precision.roles().model_dump()),
        "emulated": emulated_names(roles.values()),
        "algorithm": config.algorithm.preset,
        "steps": len(rows),
        "rows_left_out": len(read_jsonl(run.bad_rows)),
        **(_totals(rows) if rows else {}),
        **_evaluations(run),
        **({"task": own} if (own := _task_totals(rows)) else {}),
        "run_dir": str(run.path),
    }


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    gaps = [abs(row[f"mismatch/prob_gap/{side}"]) for row in rows for side in ("max", "min")]
    return {
        "first_reward": rows[0]["rollout/reward/mean"],
        "first_truncated_fraction": rows[0]["rollout/truncated_fraction"],
        "last_reward": statistics.fmean(row["rollout/reward/mean"] for row in rows[-10:]),
        "first_kept_reward": _kept_reward(rows[0]),
        "last_kept_reward": statistics.fmean(map(_kept_reward, rows[-10:])),
        "mismatch_k3": statistics.fmean(row["mismatch/k3/mean"] for row in rows),
        "mismatch_max_abs": max(gaps),
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
    """Return the mean reward of the rollouts that the step trained on; older versions wrote it as `rollout/reward`."""
    return float(row.get("rollout/kept/reward/mean", row["rollout/reward/mean"]))
