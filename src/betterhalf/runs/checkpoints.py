"""Checkpoints of a run: written after a step, and restored by `--resume`."""

from __future__ import annotations

from betterhalf.errors import InputError
from betterhalf.metrics.console import show_note
from betterhalf.run_dir import RunDir, read_jsonl, truncate_jsonl
from betterhalf.runs.assembly import Parts
from betterhalf.runs.data_check import require_same_data
from betterhalf.runs.progress import Progress
from betterhalf.runs.watchdog import WatchState
from betterhalf.setup.trained_policy import best_evaluation
from betterhalf.training import checkpoint


def save_checkpoint(parts: Parts, run: RunDir, progress: Progress) -> None:
    """Write everything that the next step depends on.

    Sampling, shuffling and data order are functions of (seed, step, position), so no generator has state to save.

    Raises:
        RunError: the checkpoint cannot be written; earlier checkpoints are untouched.
    """
    values = {
        "position": progress.position,
        "watch": progress.watch.to_json(),
        "data": parts.data.to_json(),
        "evaluation_data": {data.name: data.data.to_json() for data in parts.evaluation},
    }
    saved = checkpoint.Checkpoint(step=progress.step, trainer=parts.trainer.state(), values=values)
    best = best_evaluation(run, progress.step) if parts.config.evaluate.keep_best else None
    keep = parts.config.training.keep_checkpoints
    checkpoint.save(run.checkpoints, saved, keep=keep, best=best.step if best else None)


def restore(parts: Parts, run: RunDir) -> Progress:
    """Load the newest checkpoint into the trainer, and drop the rows that were logged after it.

    Without a checkpoint the run starts again at step 1.

    Raises:
        CheckpointError: the checkpoint is corrupted, or of another model.
        InputError: the data has changed, or logged steps before the checkpoint are missing.
    """
    path = checkpoint.latest(run.checkpoints)
    progress = Progress()
    if path is not None:
        saved = checkpoint.load(path)
        parts.trainer.load(saved.trainer)
        _require_same_data(parts, saved)
        progress = Progress(
            step=saved.step,
            position=int(saved.values["position"]),
            policy_version=saved.trainer.policy_version,
            watch=WatchState.from_json(saved.values.get("watch", {})),
        )
    _drop_rows_after(run, progress.step)
    return progress


def _require_same_data(parts: Parts, saved: checkpoint.Checkpoint) -> None:
    """Compare the rows of the task, and of the data sets to evaluate, with those of the checkpoint."""
    source, config = saved.trainer.source, parts.config
    notes = [require_same_data(source, saved.values.get("data"), parts.data, parts.task.place, config)]
    records = saved.values.get("evaluation_data", {})
    for data in parts.evaluation:
        if data.task is not parts.task:
            record = records.get(data.name)
            notes.append(require_same_data(source, record, data.data, data.task.place, data.config, data.key))
    for note in notes:
        if note:
            show_note(note, mode=config.logging.console)


def _drop_rows_after(run: RunDir, step: int) -> None:
    truncate_jsonl(run.metrics, step)
    if (found := len(read_jsonl(run.metrics))) < step:
        raise InputError(
            f"{run.metrics} holds {found} of the {step} steps before the checkpoint; restore it, or delete "
            f"{run.checkpoints} to start the run again from step 1"
        )
    for path in (run.rollouts, run.mismatch, run.evaluated_steps):
        truncate_jsonl(path, step)
    # Stops stay on record; other alarms are raised again when their steps are repeated.
    truncate_jsonl(run.watchdog, lambda row: row["action"] == "stop" or row["step"] <= step)
