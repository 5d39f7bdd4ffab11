"""The verb `evaluate`: avg@k, pass@k and maj@k of a model or of a run, sampled by the rollout engine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from betterhalf.config.load import resolved_json
from betterhalf.config.schema import RunConfig
from betterhalf.environment import environment
from betterhalf.errors import BetterhalfError, InputError
from betterhalf.metrics.console import progress as show_progress
from betterhalf.metrics.console import show_note
from betterhalf.precision.contract import Contract, folded_digest
from betterhalf.report.emulated import emulated_names, emulated_sentence
from betterhalf.report.page import write_report
from betterhalf.run_dir import RunDir, append_jsonl, read_json, read_jsonl, write_json_atomic, write_text_atomic
from betterhalf.runs.assembly import Parts, assemble, unique_tasks
from betterhalf.runs.data_check import require_same_data, without_permission
from betterhalf.runs.evaluation import PROMPTS_AT_ONCE, PromptResult, evaluate_set, summary_of
from betterhalf.runs.train import require_same_config
from betterhalf.runs.truncation import ADVICE
from betterhalf.runs.weight_sync import first_sync
from betterhalf.setup.data import write_left_out
from betterhalf.setup.evaluation import evaluation_config, require_gap_can_be_measured
from betterhalf.setup.folder import run_folder
from betterhalf.setup.trained_policy import LATEST, load_policy, require_checkpoint


def evaluate(
    target: str, config: RunConfig, run_dir: str | None, resume: bool = False, checkpoint: str = LATEST
) -> dict[str, Any]:
    """Evaluate a model, or a checkpoint of a run, on one or several data sets.

    Args:
        target: name or folder of a model, or the folder of a run (then `config` should be the run's own).
        config: task, sampling, precision and `evaluate` settings.
        run_dir: folder for `evaluation.jsonl` and `summary.json`; `runs/evaluate-<name>-<time>` by default.
        resume: keep the results that the folder already holds.
        checkpoint: `latest`, `best` or the step of a checkpoint of a run.

    Returns:
        The summary, as written to `summary.json`.

    Raises:
        InputError: bad input, or `resume` with other weights, data or settings.
        RunError: a failure while sampling or grading; the results so far are kept.
    """
    if resume and run_dir is None:
        raise InputError("--resume needs the folder of the evaluation to continue; add run_dir=PATH")
    require_gap_can_be_measured(config)
    started = time.perf_counter()
    with run_folder(run_dir, "evaluate", Path(target).name, resume=resume) as run:
        found = _evaluate_in(run, _with_target(config, target), target, checkpoint)
        summary = {"verb": "evaluate", "target": target, **found}
        summary |= {"seconds": time.perf_counter() - started, "run_dir": str(run.path)}
        write_json_atomic(run.summary, summary)
        write_report([run.path], run.report)
        return summary


def _evaluate_in(run: RunDir, config: RunConfig, target: str, checkpoint: str) -> dict[str, Any]:
    if run.config.exists():
        _require_evaluation(run, config)
    is_run = RunDir(Path(target)).configured
    if is_run:
        require_checkpoint(target, checkpoint)
    elif checkpoint != LATEST:
        raise InputError(
            f"{target} is a model, not the folder of a run, and has no checkpoints; leave out --checkpoint"
        )
    roles = config.precision.roles()
    emulated = emulated_names((roles.rollout_dtype, roles.kv_dtype))
    if emulated:
        show_note(emulated_sentence(emulated), mode=config.logging.console)
    trained = partial(load_policy, target, checkpoint) if is_run else None
    parts = assemble(config, evaluating=True, sets=True, trained=trained)
    try:
        synced = first_sync(parts)
        if run.evaluated.exists():
            _require_same_subject(run, parts)
        _write_head(run, parts, synced.contract)
        results = _evaluate_rest(run, parts, synced.policy_version)
    finally:
        parts.close()
    return _summary(parts, results) | {"precision": roles.rollout_dtype, "emulated": emulated}


def _summary(parts: Parts, results: dict[str, list[PromptResult]]) -> dict[str, Any]:
    """Return the results of each data set, and those of the only one also at the top level."""
    config = parts.config
    found = {name: summary_of(rows, config.evaluate, config.seed) for name, rows in results.items()}
    for name, summary in found.items():
        for note in _notes(name, summary, config):
            show_note(note, mode=config.logging.console)
    only = next(iter(found.values())) if len(found) == 1 else {}
    left_out = sum(len(data.task.left_out) for data in parts.evaluation)
    return only | {"data": found, "rows_left_out": left_out}


def _notes(name: str, summary: dict[str, Any], config: RunConfig) -> Iterator[str]:
    """Yield what a reader of the numbers must know."""
    if summary["truncated_fraction"] == 1:
        yield f"{name}: all completions were cut off at sampling.max_tokens={config.sampling.max_tokens}; {ADVICE}"
    if not any(key.startswith("maj@") for key in summary):
        yield f"{name}: no maj@k, because its task extracts no answers that could be compared"
    gap = summary.get("deployment_gap")
    if gap and not gap["reliable"]:
        yield (
            f"{name}: the deployment gap is not reliable, because the weights pi/mu leave an effective sample size of "
            f"{100 * gap['ess_fraction']:.1f}% of the completions; sample with engine.rounding=aligned or in FP16"
        )


def _require_evaluation(run: RunDir, config: RunConfig) -> None:
    """Refuse to continue a run that is not an evaluation, or was started with other settings."""
    if not run.evaluated.exists():
        raise InputError(f"{run.path} holds no evaluation to continue; leave out --resume, or name another run_dir")
    require_same_config(run, config, how="Resume with the target and the settings that it was started with")


def _require_same_subject(run: RunDir, parts: Parts) -> None:
    """Refuse to continue with other weights or other data: the results would mix both."""
    saved = read_json(run.evaluated)
    if saved["weights_digest"] != folded_digest(parts.engine.digests()):
        raise InputError(
            f"{run.path} was evaluated with other weights (a run's newest checkpoint may have changed); restore them, "
            "or start again in another run_dir"
        )
    for data in parts.evaluation:
        record = saved["data"].get(data.name)
        note = require_same_data(str(run.path), record, data.data, data.task.place, data.config, data.key)
        if note:
            show_note(note, mode=parts.config.logging.console)


def _write_head(run: RunDir, parts: Parts, contract: Contract) -> None:
    """Record what is evaluated; the configuration is written last, so a folder that has it is complete."""
    write_json_atomic(run.environment, environment() | {"cluster": parts.sides.cluster()})
    write_json_atomic(run.contract, contract.to_json())
    write_left_out(run, *unique_tasks(parts))
    digests = {data.name: data.data.to_json() for data in parts.evaluation}
    subject = {"weights_digest": folded_digest(parts.engine.digests()), "data": digests}
    write_json_atomic(run.evaluated, subject)
    write_json_atomic(run.config, resolved_json(without_permission(parts.config)))


def _evaluate_rest(run: RunDir, parts: Parts, policy_version: int) -> dict[str, list[PromptResult]]:
    """Evaluate the prompts that the folder does not hold yet; each block is written as soon as it is complete."""
    done = _finished(run, parts)
    rows = [json.dumps(asdict(result)) for results in done.values() for result in results]
    write_text_atomic(run.evaluation, "".join(f"{row}\n" for row in rows))
    count = sum(data.prompts for data in parts.evaluation)
    with show_progress("evaluate", count, mode=parts.config.logging.console) as bar, _kept(run, count):
        bar.advance(len(rows))

        def keep(results: Sequence[PromptResult]) -> None:
            for result in results:
                append_jsonl(run.evaluation, asdict(result))
            bar.advance(len(results))

        for data in parts.evaluation:
            done[data.name] += evaluate_set(
                parts,
                data,
                range(len(done[data.name]), data.prompts),
                policy_version=policy_version,
                score=parts.config.evaluate.deployment_gap,
                keep=keep,
            )
    return done


def _finished(run: RunDir, parts: Parts) -> dict[str, list[PromptResult]]:
    """Return the results of each data set that the folder holds, in order.

    Logits depend slightly on the other rows of a batch, so an interrupted block is repeated as a whole.
    """
    rows = [PromptResult.from_json(row) for row in read_jsonl(run.evaluation)]
    found = {}
    for data in parts.evaluation:
        done = [row for row in rows if row.data == data.name]
        found[data.name] = done[: len(done) - len(done) % PROMPTS_AT_ONCE] if len(done) < data.prompts else done
    return found


@contextmanager
def _kept(run: RunDir, count: int) -> Iterator[None]:
    """Add the number of prompts that are kept to the message of an error that ends an evaluation."""
    try:
        yield
    except BetterhalfError as error:
        done = len(read_jsonl(run.evaluation))
        raise type(error)(
            f"{str(error).rstrip('.')}. {done} of {count} prompts are evaluated, and kept in "
            f"{run.evaluation}; continue with --resume"
        ) from error


def _with_target(config: RunConfig, target: str) -> RunConfig:
    settings = evaluation_config(config)
    if RunDir(Path(target)).configured:
        return settings
    return settings.model_copy(update={"model": settings.model.model_copy(update={"name": target})})
