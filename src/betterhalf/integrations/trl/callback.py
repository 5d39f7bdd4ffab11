"""The callback: measure the mismatch of each rollout batch before its first update, and record the run.

transformers shows a callback the model and the optimizer, but not the trainer, and has no event between sampling and
the first update. So the callback takes the trainer, as TRL's own callbacks do, and during training it replaces two of
the trainer's methods with ones that call them: `_generate_and_score_completions`, whose result it reads, and
`_get_grad_norm`. With `record_generate` it also replaces the model's `generate`. No result is changed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from betterhalf.config.schema import WatchdogLevel
from betterhalf.errors import ContractError, WatchdogError
from betterhalf.integrations.trl.alarms import Alarms, checked_levels
from betterhalf.integrations.trl.batch import scored_batch, trainer_logprobs
from betterhalf.integrations.trl.checks import check_installed, check_trainer
from betterhalf.integrations.trl.generate import GenerateRecorder
from betterhalf.integrations.trl.record import TrlRecord
from betterhalf.integrations.trl.settings import generate_every
from betterhalf.integrations.trl.sides import read_contract
from betterhalf.integrations.trl.updates import Update, loss_scale, read_update, update_metrics
from betterhalf.integrations.trl.watch import ComputeWatch
from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.precision.contract import Contract
from betterhalf.run_dir import RunDir
from betterhalf.runs.system import peak_memory_gib
from betterhalf.runs.watchdog import Stopped, unmeasured
from betterhalf.words import counted

if TYPE_CHECKING:
    from trl import GRPOTrainer

_log = logging.getLogger(__name__)

_VERSION = "policy/version"


@dataclass(slots=True, kw_only=True)
class _Step:
    """A step in progress: a rollout batch, and its optimizer steps so far."""

    number: int
    began: float
    metrics: dict[str, float] = field(default_factory=dict)
    tokens: float = 0.0
    updates: list[Update] = field(default_factory=list)


class BetterhalfCallback(TrainerCallback):
    """Callback of a `GRPOTrainer` that writes a run folder with the mismatch, the loss scale and the contract.

        trainer.add_callback(BetterhalfCallback(trainer, "runs/trl"))

    A step is a rollout batch and its optimizer steps. Metrics of the mismatch that have a healthy band also join those
    that TRL logs.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        run_dir: str | Path,
        *,
        record_generate: bool = False,
        strict: bool = False,
        rollouts_per_step: int = 4,
        watchdog: Iterable[WatchdogLevel | Mapping[str, Any]] | None = None,
    ) -> None:
        """Check the trainer; nothing is written or replaced before training begins.

        Args:
            trainer: the trainer that the callback is added to.
            run_dir: folder to write to; a resumed training continues it.
            record_generate: without vLLM, note the logprobs of the tokens that transformers' `generate` draws.
            strict: stop before the first update if trainer and sampler differ in precision; else a warning shows it.
            rollouts_per_step: number of rollouts of each step to keep with their logprobs.
            watchdog: rules such as `{"metric": "mismatch/k3/mean", "above": 0.1, "action": "stop"}`; `stop` ends the
                training before the step's update. None for those of betterhalf on the mismatch, which warn.

        Raises:
            InputError: the trainer has no logprobs of its sampler, its mismatch cannot be measured, or a rule of the
                watchdog can take no effect.
            MissingExtraError: TRL is not installed.
        """
        check_installed()
        self._sampler = check_trainer(trainer, record_generate)
        self._trainer: Any = trainer
        self._strict = strict
        self._alarms = Alarms(checked_levels(watchdog))
        self._recorder = GenerateRecorder(trainer.model, trainer.temperature) if record_generate else None
        self._record = TrlRecord(RunDir(Path(run_dir)), trainer, self._sampler, rollouts_per_step)
        self._watch: ComputeWatch | None = None
        self._inner: tuple[Any, Any] | None = None
        self._step: _Step | None = None
        self._policy_version = 0
        self._grad_norm = float("nan")
        self._scale = 1.0
        self.contract: Contract | None = None
        """Precision contract of the run; None before the first batch, and for a sampler that cannot be read."""

    # -- events of transformers

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_more: Any
    ) -> None:
        """Create the run folder, or continue it, and replace the trainer's methods."""
        self._restore()
        done, resumed = self._steps_before(state.global_step), state.global_step > 0
        if state.is_world_process_zero:
            self._record.begin(done, state.max_steps, self._alarms.levels, resume=resumed)
        rows = self._record.rows(done) if resumed else []
        self._alarms.replay(rows)
        self._policy_version = int(next((row[_VERSION] for row in reversed(rows) if _VERSION in row), 0))
        self._watch = ComputeWatch(self._trainer.model)
        self._inner = self._trainer._generate_and_score_completions, self._trainer._get_grad_norm
        self._trainer._generate_and_score_completions = self._generate_and_score
        self._trainer._get_grad_norm = self._read_grad_norm
        if self._recorder is not None:
            self._recorder.install()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_more: Any
    ) -> None:
        """Keep the loss scale before the step."""
        self._scale = loss_scale(self._trainer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Read the loss scale, and whether the step was skipped."""
        assert self._step is not None
        update = read_update(self._trainer, self._scale, self._grad_norm, more["lr_scheduler"].get_last_lr()[0])
        self._policy_version += not update.skipped
        self._step.updates.append(update)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_more: Any) -> None:
        """Write the row after the last optimizer step of a rollout batch."""
        if self._trainer._step % generate_every(self._trainer.args) == 0:
            self._finish_step()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_more: Any) -> None:
        """Write what is left, and restore the trainer's methods."""
        self._finish_step()
        self._restore()
        if state.is_world_process_zero:
            self._record.end()

    # -- methods that replace the trainer's

    def _generate_and_score(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Call TRL's method and measure its result, but not that of an evaluation."""
        assert self._inner is not None
        score, _ = self._inner
        if not self._trainer.model.training:
            evaluated: dict[str, Any] = score(inputs)
            return evaluated
        self._finish_step()
        self._step = _Step(number=self._steps_before(self._trainer.state.global_step) + 1, began=time.perf_counter())
        output: dict[str, Any] = score(inputs)
        with self._timed(self._step):
            self._measure(self._step, output)
        return output

    def _read_grad_norm(self, *args: Any, **keywords: Any) -> Any:
        assert self._inner is not None
        _, read = self._inner
        norm = read(*args, **keywords)
        self._grad_norm = float("nan") if norm is None else float(norm)
        return norm

    def _restore(self) -> None:
        """Restore the trainer's methods, if they are replaced; an interrupted training leaves them replaced."""
        if self._inner is not None:
            del self._trainer._generate_and_score_completions, self._trainer._get_grad_norm
            self._inner = None
            if self._recorder is not None:
                self._recorder.remove()
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    # -- a step

    def _steps_before(self, updates: int) -> int:
        """Return the number of whole rollout batches before the pass that follows `updates` optimizer steps."""
        accumulated = self._trainer.args.gradient_accumulation_steps
        passes = updates * accumulated + self._trainer._step % accumulated
        return int(passes // generate_every(self._trainer.args))

    @contextmanager
    def _timed(self, step: _Step) -> Iterator[None]:
        """Record the seconds of the block as the time of measuring."""
        started = time.perf_counter()
        yield
        step.metrics["time/measure_seconds"] = time.perf_counter() - started

    def _measure(self, step: _Step, output: Mapping[str, Any]) -> None:
        logprobs = trainer_logprobs(self._trainer, output)
        drawn = None if self._recorder is None else self._recorder.logprobs_BL
        batch = scored_batch(self._trainer, output, logprobs, drawn)
        if batch.unscored:
            unscored = counted(batch.unscored, "token")
            _log.warning("step %d: the sampler gave %s no finite logprob", step.number, unscored)
        step.metrics |= batch.metrics()
        step.tokens = float(batch.lengths_B.sum())
        self._read_sides()
        for name, value in step.metrics.items():
            if name.startswith(("mismatch/", "budget/")) and CATALOGUE[name].band is not None:
                self._trainer._metrics["train"][name].append(value)
        if self._trainer.is_world_process_zero():
            self._record.write_rollouts(step.number, self._policy_version, batch, output)
        self._check_before(step)

    def _check_before(self, step: _Step) -> None:
        """Check the rules of the watchdog on what is measured before the update; every process does.

        Raises:
            WatchdogError: a rule with the action `stop` fired.
        """
        try:
            alarms = self._alarms.before(step.number, step.metrics)
        except Stopped as stopped:
            self._step = None
            self._restore()
            if self._trainer.is_world_process_zero():
                self._record.stop(stopped)
            raise WatchdogError(
                f"the watchdog stopped the training in step {step.number}: {stopped.stop.reason}. That step was not "
                "trained on; watchdog.jsonl has its measurements. Set the same format on both sides (docs/trl.md shows "
                "how), then train again, with resume_from_checkpoint if TRL has saved a checkpoint."
            ) from stopped
        if self._trainer.is_world_process_zero():
            self._record.write_alarms(alarms)

    def _read_sides(self) -> None:
        """Read the contract after the first batch; every process takes part.

        Raises:
            ContractError: trainer and sampler differ in precision, and the callback is strict.
        """
        if self._watch is None:
            return
        compute = self._watch.close()
        self._watch = None
        drawn = None if self._recorder is None else self._recorder.drawn
        self.contract = read_contract(self._trainer, self._sampler, compute, drawn)
        if self.contract is None:
            return
        if self._trainer.is_world_process_zero():
            self._record.write_contract(self.contract)
        if not self.contract.ok:
            self._report_difference(self.contract)

    def _report_difference(self, contract: Contract) -> None:
        found = f"trainer and sampler differ in precision:\n{contract.table()}"
        if self._strict:
            raise ContractError(f"{found}\nSet the same format on both sides: docs/trl.md shows how.")
        if self._trainer.is_world_process_zero():
            _log.warning(found)

    def _finish_step(self) -> None:
        step, self._step = self._step, None
        if step is None or not self._trainer.is_world_process_zero():
            return
        seconds = time.perf_counter() - step.began
        metrics = {
            **step.metrics,
            **update_metrics(step.updates, self._policy_version),
            "time/step_seconds": seconds,
            "system/tokens_per_second": step.tokens / seconds,
            "system/peak_memory_gib": peak_memory_gib(self._trainer.accelerator.device),
        }
        self._record.write_step(step.number, metrics)
        self._record.write_alarms(self._alarms.after(step.number, metrics))
        if step.number == 1 and (missing := unmeasured(self._alarms.levels, metrics)):
            _log.warning(missing)
