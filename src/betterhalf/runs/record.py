"""Record of a training run: rows on disk, trackers, the terminal, evaluations and checkpoints, after each step."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from betterhalf.errors import BetterhalfError
from betterhalf.metrics.console import Console
from betterhalf.metrics.names import check_known
from betterhalf.run_dir import RunDir, append_jsonl
from betterhalf.runs.assembly import Parts
from betterhalf.runs.checkpoints import Checkpoints
from betterhalf.runs.due import checkpoint_due, evaluation_due
from betterhalf.runs.kept_rollouts import rollout_row
from betterhalf.runs.loop import StepResult
from betterhalf.runs.periodic import PeriodicResult, evaluate_after, evaluated
from betterhalf.runs.progress import Progress
from betterhalf.runs.trainer_recovery import TrainerRestarts
from betterhalf.runs.watchdog import Alarm, unmeasured, write_alarms
from betterhalf.tracking.tracking import Tracking


class StepRecorder:
    """Recorder of the steps of one run."""

    def __init__(
        self, parts: Parts, run: RunDir, console: Console, restarts: TrainerRestarts, tracking: Tracking
    ) -> None:
        """Write to `run`, `console` and the trackers; `restarts` counts those of the trainer."""
        self._parts, self._run, self._console, self._restarts = parts, run, console, restarts
        self._tracking = tracking
        self.checkpoints = Checkpoints(parts, run)
        self.finished = Progress()
        """Position of the run after the last step that was finished."""

    def begin(self, progress: Progress) -> None:
        """Start after `progress`; before the first step, evaluate the model as it is."""
        self.finished = progress
        if progress.step == 0:
            found = self._evaluate(0, progress.policy_version)
            if found is not None:
                self._tracking.log(0, found.metrics)

    def record(self, result: StepResult) -> None:
        """Evaluate if that is due, write the rows of the step, show it, and save a checkpoint if that is due."""
        self.checkpoints.check()
        self.finished, step = result.progress, result.progress.step
        found = self._evaluate(step, self.finished.policy_version)
        restarted = {"optim/rank_restarts": float(self._restarts.count_in(step))}
        row = {**result.metrics, **restarted, **(found.metrics if found else {})}
        check_known(row)
        self._run.append_metrics({"step": step, **row})
        self._tracking.log(step, row)
        append_jsonl(self._run.mismatch, {"step": step, **asdict(result.profile)})
        for kept in result.kept:
            self._run.append_rollout(rollout_row(step, kept, self._parts.model.tokenizer))
        self._console.update(step, result.metrics)
        self.record_alarms(result.alarms)
        if result.metrics["optim/first_offender"]:
            self._console.note(_skip_note(step, result))
        if result.truncation:
            self._console.note(f"step {step}: {result.truncation}")
        for note in self._tracking.notes():
            self._console.note(note)
        config = self._parts.config
        if step == 1 and (missing := unmeasured(config.watchdog.levels, result.metrics)):
            self._console.note(missing)
        if checkpoint_due(config, step) or (found and found.improved and config.evaluate.keep_best):
            self.checkpoints.save(self.finished)

    def record_alarms(self, alarms: tuple[Alarm, ...], **more: Any) -> None:
        """Write a row for each alarm, with `more` for a stop, and show a note for each fresh one."""
        write_alarms(self._run.watchdog, alarms, **more)
        for alarm in alarms:
            if alarm.fresh:
                self._tracking.alarm(asdict(alarm))
                # The error that ends a stopped run says the same, in every mode.
                show = self._console.note if alarm.action == "stop" else self._console.warn
                show(alarm.note)

    def close(self) -> None:
        """Wait for a checkpoint that is being written; a failure is shown, not raised."""
        try:
            self.checkpoints.wait()
        except BetterhalfError as error:
            self._console.warn(str(error))

    def _evaluate(self, step: int, policy_version: int) -> PeriodicResult | None:
        if not evaluation_due(self._parts.config, step) or evaluated(self._run, step):
            return None
        # The best evaluation so far is looked for among the steps with a checkpoint.
        self.checkpoints.wait()
        found = evaluate_after(self._parts, self._run, step, policy_version)
        self._console.note(found.text)
        return found


def _skip_note(step: int, result: StepResult) -> str:
    metrics = result.metrics
    return (
        f"step {step}: {metrics['optim/skipped']:.0f} optimizer step(s) skipped, gradients overflowed first in "
        f"{metrics['optim/first_offender']}; loss scale is now {metrics['optim/loss_scale']:g}"
    )
