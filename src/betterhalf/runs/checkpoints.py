"""Checkpoints of a run: written in the background after a step, and restored by `--resume`."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from betterhalf.config.schema import RunConfig
from betterhalf.errors import CheckpointError, ConfigError, InputError, TrainerDiedError
from betterhalf.metrics.console import show_note
from betterhalf.metrics.names import is_known, nearest
from betterhalf.models.description import describe_model
from betterhalf.models.skeleton import skeleton
from betterhalf.run_dir import RunDir, read_jsonl, truncate_jsonl
from betterhalf.runs.assembly import Parts
from betterhalf.runs.data_check import require_same_data
from betterhalf.runs.progress import Progress
from betterhalf.runs.watchdog import WatchState, kept_after_resume
from betterhalf.setup.trained_policy import best_steps
from betterhalf.training import checkpoint
from betterhalf.training.shards import read_shapes
from betterhalf.words import counted


class Checkpoints:
    """Writer of a run's checkpoints, in the background; one at a time.

    A checkpoint costs the step that it follows a copy of the state to host memory. Its files are written, completed and
    renamed while the next steps run. A failed write is raised by the next call.
    """

    def __init__(self, parts: Parts, run: RunDir) -> None:
        """Write the state of `parts.trainer` below `run`."""
        self._parts = parts
        self._run = run
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None

    def save(self, progress: Progress) -> None:
        """Copy everything that the next step depends on, and start to write it.

        The row of the step has to be in `metrics.jsonl` already. Sampling, shuffling and data order are functions of
        (seed, step, position), so no generator has state to save.

        Raises:
            RunError: this checkpoint cannot be begun, or the one before could not be written; earlier ones are
                untouched.
        """
        self.wait()
        partial = checkpoint.begin(self._run.checkpoints, progress.step)
        try:
            written = self._parts.trainer.write_state(partial)
        except BaseException:
            checkpoint.discard(partial)
            raise
        saved = checkpoint.Checkpoint(
            path=checkpoint.step_folder(self._run.checkpoints, progress.step),
            step=progress.step,
            written=written,
            values=self._values(progress),
        )
        best = best_steps(self._run, self._parts.config, progress.step)
        self._writing = self._thread.submit(self._finish, partial, saved, best)

    def check(self) -> None:
        """Raise the error of a failed write, without waiting for a write in progress.

        Raises:
            RunError: it could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is whole.

        Raises:
            RunError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def drop(self) -> None:
        """Wait for the last checkpoint, and ignore its failure if a rank that wrote it has died."""
        with contextlib.suppress(TrainerDiedError):
            self.wait()

    def _values(self, progress: Progress) -> dict[str, Any]:
        """Return the JSON values of the run, apart from the trainer's."""
        return {
            "position": progress.position,
            "watch": progress.watch.to_json(),
            "data": self._parts.data.to_json(),
            "evaluation_data": {data.name: data.data.to_json() for data in self._parts.evaluation},
        }

    def _finish(self, partial: Path, saved: checkpoint.Checkpoint, best: set[int]) -> None:
        """Complete a checkpoint once all ranks have written their files."""
        try:
            files = self._parts.trainer.wait_written()
            checkpoint.finish(partial, files, saved, keep=self._parts.config.training.keep_checkpoints, best=best)
        except BaseException:
            checkpoint.discard(partial)
            raise


def require_known_metric(config: RunConfig) -> None:
    """Refuse a `training.keep_best_metric` that no step has, before anything is loaded.

    Raises:
        ConfigError: the message names the nearest metric.
    """
    metric = config.training.keep_best_metric
    if metric is not None and not is_known(metric):
        raise ConfigError(
            f"training.keep_best_metric = {metric!r} is not a metric. Did you mean {nearest(metric)!r}? "
            "docs/metrics.md lists all."
        )


def newest(run: RunDir) -> checkpoint.Checkpoint | None:
    """Check the files of the newest checkpoint and return it without its tensors; None if the run has none yet.

    Files of a write that was interrupted are removed first.

    Raises:
        CheckpointError: a file is missing, truncated or altered.
    """
    checkpoint.tidy(run.checkpoints)
    path = checkpoint.latest(run.checkpoints)
    return None if path is None else checkpoint.load(path)


def require_same_model(saved: checkpoint.Checkpoint, config: RunConfig) -> None:
    """Compare the shapes in a checkpoint with those of the model, before any weights are read.

    Raises:
        CheckpointError: a parameter has another shape; the message shows both.
        InputError: see `describe_model`.
    """
    module = skeleton(describe_model(config.model).hf_config)
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    found = read_shapes(saved.path, "model")
    different = [name for name in found if found[name] != expected.get(name, found[name])]
    if different:
        name = different[0]
        more = f" ({counted(len(different) - 1, 'other parameter')} as well)" if len(different) > 1 else ""
        raise CheckpointError(
            f"{saved.source} holds another shape of parameter {name!r} than model {config.model.name!r}: "
            f"{list(found[name])} and {list(expected[name])}{more}. It was made by another model; name that model, or "
            "start again in another run_dir"
        )


def restore(parts: Parts, run: RunDir, saved: checkpoint.Checkpoint | None) -> Progress:
    """Load a checkpoint into the trainer, and drop the rows that were logged after it.

    Without a checkpoint the run starts again at step 1.

    Raises:
        CheckpointError: the checkpoint is of another model, or rows or reward have changed since it was written.
        InputError: logged steps before the checkpoint are missing.
    """
    progress = Progress()
    if saved is not None:
        parts.trainer.read_state(saved.path, saved.written, saved.source)
        _require_same_data(parts, saved)
        progress = Progress(
            step=saved.step,
            position=int(saved.values["position"]),
            policy_version=saved.written.policy_version,
            watch=WatchState.from_json(saved.values.get("watch", {})),
        )
    _drop_rows_after(run, progress.step)
    return progress


def _require_same_data(parts: Parts, saved: checkpoint.Checkpoint) -> None:
    """Compare the rows of the task, and of the data sets to evaluate, with those of the checkpoint."""
    source, config = saved.source, parts.config
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
    truncate_jsonl(run.watchdog, lambda row: kept_after_resume(row, step))
