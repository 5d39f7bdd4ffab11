"""Run folder of a TRL run: the files that `betterhalf report` and `betterhalf compare` read."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from betterhalf.api.tensors import mismatch_profile
from betterhalf.config.schema import WatchdogLevel
from betterhalf.environment import environment
from betterhalf.integrations.trl.batch import ScoredBatch
from betterhalf.integrations.trl.checks import Sampler
from betterhalf.integrations.trl.settings import run_settings
from betterhalf.metrics.metric import MetricValue
from betterhalf.metrics.names import check_known
from betterhalf.precision.contract import Contract
from betterhalf.report.fields import finite, mean
from betterhalf.run_dir import RunDir, append_jsonl, read_jsonl, truncate_jsonl, write_json_atomic
from betterhalf.run_lock import run_lock
from betterhalf.runs.kept_rollouts import KeptRollout, rollout_row
from betterhalf.runs.watchdog import Alarm, Stopped, kept_after_resume, write_alarms
from betterhalf.types import Completion, Prompt, Rollout

if TYPE_CHECKING:
    from trl import GRPOTrainer

_log = logging.getLogger(__name__)


class TrlRecord:
    """Files of one run; only the main process writes them."""

    def __init__(self, run: RunDir, trainer: GRPOTrainer, sampler: Sampler, rollouts_per_step: int) -> None:
        """Write nothing yet; keep `rollouts_per_step` rollouts of each step."""
        self._run, self._trainer, self._sampler = run, trainer, sampler
        self._rollouts_per_step = rollouts_per_step
        self._open = ExitStack()
        self._started = time.perf_counter()
        self._settings: dict[str, Any] = {}

    def begin(self, step: int, max_steps: int, levels: Sequence[WatchdogLevel], *, resume: bool) -> None:
        """Create the folder, or continue it after `step` steps.

        Args:
            step: number of finished steps.
            max_steps: number of optimizer steps of the whole run.
            levels: rules of the watchdog.
            resume: TRL continues from a checkpoint.

        Raises:
            InputError: the folder holds a run and TRL starts a new one, or the other way round; or another process
                works in it.
        """
        self._open.close()
        RunDir.create(self._run.path, resume=resume)
        self._open.enter_context(run_lock(self._run.path))
        for path in (self._run.metrics, self._run.mismatch, self._run.rollouts):
            truncate_jsonl(path, step)
        truncate_jsonl(self._run.watchdog, lambda row: kept_after_resume(row, step))
        self._run.summary.unlink(missing_ok=True)
        rules = {"watchdog": {"levels": [level.model_dump(mode="json") for level in levels]}}
        self._settings = run_settings(self._trainer, self._sampler, max_steps) | rules
        write_json_atomic(self._run.config, self._settings)
        write_json_atomic(self._run.environment, environment())

    def rows(self, step: int) -> list[dict[str, Any]]:
        """Return the rows of `metrics.jsonl` up to `step`; every process may read them."""
        return [row for row in read_jsonl(self._run.metrics) if row["step"] <= step]

    def write_contract(self, contract: Contract) -> None:
        """Write the contract, and its formats into the settings."""
        write_json_atomic(self._run.contract, contract.to_json())
        compute = next(row for row in contract.rows if row.region == "compute")
        roles = {"compute_dtype": compute.trainer, "rollout_dtype": compute.engine}
        write_json_atomic(self._run.config, self._settings | {"precision": roles})

    def write_rollouts(self, step: int, version: int, batch: ScoredBatch, output: Mapping[str, Any]) -> None:
        """Write the mismatch by probability, position and completion, and a seeded sample of rollouts."""
        both = batch.trainer_logprobs_BL, batch.behavior_logprobs_BL, batch.mask_BL
        append_jsonl(self._run.mismatch, {"step": step, **asdict(mismatch_profile(*both))})
        here = len(output["completion_ids"])
        count = min(self._rollouts_per_step, here)
        for index in sorted(random.Random(f"keep-{self._trainer.args.seed}-{step}").sample(range(here), count)):
            kept = _kept(self._trainer, batch, output, index, version)
            self._run.append_rollout(rollout_row(step, kept, self._trainer._tokenizer))

    def write_step(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Write the row of a finished step."""
        check_known(metrics)
        self._run.append_metrics({"step": step, **metrics})

    def write_alarms(self, alarms: Sequence[Alarm], **more: Any) -> None:
        """Write a row for each alarm of the watchdog, with `more` for a stop, and warn of each fresh one."""
        write_alarms(self._run.watchdog, alarms, **more)
        for alarm in alarms:
            if alarm.fresh:
                _log.warning(alarm.note)

    def stop(self, stopped: Stopped) -> None:
        """Write the alarms of a step that is not trained on, and the summary of the steps before it."""
        self.write_alarms(stopped.watch.alarms, measured=stopped.measured)
        stop = stopped.stop
        self.end(stopped=f"step {stop.step}: {stop.reason}", stopped_step=stop.step)

    def end(self, **more: Any) -> None:
        """Write the summary with `more`, and release the folder."""
        rows = read_jsonl(self._run.metrics)
        write_json_atomic(self._run.summary, self._summary(rows) | more)
        self._open.close()

    def _summary(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "verb": "trl",
            "name": self._settings["name"],
            "sampler": self._sampler,
            "steps": len(rows),
            **(_totals(rows) if rows else {}),
            "seconds": time.perf_counter() - self._started,
            "run_dir": str(self._run.path),
        }


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    rewards = finite(rows, "rollout/reward/mean")
    gaps = [abs(gap) for side in ("max", "min") for gap in finite(rows, f"mismatch/prob_gap/{side}")]
    return {
        "first_reward": rewards[0] if rewards else None,
        "last_reward": mean(rewards[-10:]),
        "mismatch_k3": mean(finite(rows, "mismatch/k3/mean")),
        "mismatch_max_abs": max(gaps, default=None),
        "skipped_steps": int(sum(row.get("optim/skipped", 0) for row in rows)),
    }


def _kept(trainer: GRPOTrainer, batch: ScoredBatch, output: Mapping[str, Any], index: int, version: int) -> KeptRollout:
    """Return one of this process's rollouts; those of the main process come first in `batch`."""
    tokenizer, inside = trainer._tokenizer, output["prompt_mask"][index].bool()
    prompt_ids = output["prompt_ids"][index][inside].tolist()
    width = output["completion_ids"].size(1)
    sampled = batch.mask_BL[index, :width]
    token_ids = output["completion_ids"][index][sampled].tolist()
    completion = Completion(
        token_ids=tuple(token_ids),
        behavior_logprobs=tuple(batch.behavior_logprobs_BL[index, :width][sampled].tolist()),
        finish_reason="length" if batch.truncated_B[index] else "stop",
        policy_version=version,
    )
    text = tokenizer.decode(prompt_ids)
    return KeptRollout(
        rollout=Rollout(
            prompt=Prompt(prompt_id=text, text=text, token_ids=tuple(prompt_ids), answer=""),
            completion=completion,
            text=tokenizer.decode(token_ids, skip_special_tokens=True),
            reward=batch.rewards_B[index],
        ),
        advantage=batch.advantages_B[index],
        trainer_logprobs=batch.trainer_logprobs_BL[index, :width][sampled].tolist(),
    )
