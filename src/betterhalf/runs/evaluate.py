"""Accuracy of a policy in the completions that its engine samples: avg@k and pass@k."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from betterhalf.run_dir import RunDir, append_jsonl, read_json, read_jsonl, write_json_atomic, write_text_atomic
from betterhalf.runs.assembly import Parts, assemble
from betterhalf.runs.collect import sample_groups
from betterhalf.runs.data_check import require_same_data, without_permission
from betterhalf.runs.stopwatch import Stopwatch
from betterhalf.runs.train import require_same_config
from betterhalf.runs.truncation import ADVICE
from betterhalf.runs.weight_sync import first_sync
from betterhalf.setup.data import write_left_out
from betterhalf.setup.folder import run_folder
from betterhalf.setup.trained_policy import load_policy, require_checkpoint
from betterhalf.types import Prompt, RolloutGroup

EVALUATION_STEP = 2**31 - 1
"""Step in the random key: no training step reaches it, so evaluation never repeats a draw of training."""

_PROMPTS_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResult:
    """Results of the completions of one prompt."""

    prompt_id: str
    solved: int
    """Number of completions with the full reward of 1."""
    samples: int
    """Number of completions."""
    reward: float
    """Mean reward."""
    truncated: int
    """Number of completions that reached the length limit."""
    tokens: int
    """Number of completion tokens, over all samples."""


def evaluate_prompts(
    parts: Parts,
    prompts: Sequence[Prompt],
    samples: int,
    *,
    policy_version: int,
    step: int = EVALUATION_STEP,
    first_index: int = 0,
    keep: Callable[[Sequence[PromptResult]], None] = lambda results: None,
) -> list[PromptResult]:
    """Sample `samples` completions of each prompt from the engine and count what is solved.

    Args:
        parts: engine, task and settings.
        prompts: prompts to evaluate.
        samples: number of completions of each.
        policy_version: version of the engine's weights.
        step: step in the random key.
        first_index: index of the first prompt in the random key.
        keep: called with the results of each block of prompts as soon as they are known.
    """
    results: list[PromptResult] = []
    clock = Stopwatch(parts.precision.device)
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        block = prompts[start : start + _PROMPTS_AT_ONCE]
        groups = sample_groups(
            parts,
            block,
            samples,
            step=step,
            policy_version=policy_version,
            first_index=first_index + start,
            clock=clock,
        )
        found = [_result(group) for group in groups]
        keep(found)
        results += found
    return results


def _result(group: RolloutGroup) -> PromptResult:
    completions = [rollout.completion for rollout in group.rollouts]
    return PromptResult(
        prompt_id=group.prompt.prompt_id,
        solved=sum(reward >= 1.0 for reward in group.rewards),
        samples=len(completions),
        reward=statistics.fmean(group.rewards),
        truncated=sum(completion.finish_reason == "length" for completion in completions),
        tokens=sum(len(completion.token_ids) for completion in completions),
    )


def average_reward(results: Sequence[PromptResult]) -> float:
    """Return avg@k: the mean reward over all completions of all prompts."""
    return statistics.fmean(result.reward for result in results)


def pass_at(results: Sequence[PromptResult], k: int) -> float:
    """Return pass@k, the chance that at least one of k completions solves a prompt; unbiased (arXiv 2107.03374)."""
    return statistics.fmean(1 - math.comb(s.samples - s.solved, k) / math.comb(s.samples, k) for s in results)


def evaluation_summary(results: Sequence[PromptResult]) -> dict[str, Any]:
    """Return avg@k, and pass@k for powers of two up to the number of samples."""
    samples = results[0].samples
    powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    return {
        "prompts": len(results),
        "samples": samples,
        f"avg@{samples}": average_reward(results),
        **{f"pass@{k}": pass_at(results, k) for k in powers},
        "truncated_fraction": sum(s.truncated for s in results) / (samples * len(results)),
        "mean_length": sum(s.tokens for s in results) / (samples * len(results)),
    }


def evaluate(target: str, config: RunConfig, run_dir: str | None, resume: bool = False) -> dict[str, Any]:
    """Evaluate a model, or the newest checkpoint of a run, on a task.

    Args:
        target: MODEL, or the folder of a run (then `config` should be the run's own).
        config: task, sampling, precision and `evaluate` settings.
        run_dir: folder for `evaluation.jsonl` and `summary.json`; `runs/evaluate-<name>-<time>` by default.
        resume: keep the results that the folder already holds.

    Raises:
        InputError: bad input, or `resume` with other weights, data or settings.
        RunError: a failure while sampling or grading; the results so far are kept.
    """
    if resume and run_dir is None:
        raise InputError("--resume needs the folder of the evaluation to continue; add run_dir=PATH")
    started = time.perf_counter()
    with run_folder(run_dir, "evaluate", Path(target).name, resume=resume) as run:
        summary = {"verb": "evaluate", "target": target, **_evaluate_in(run, _with_target(config, target), target)}
        summary |= {"seconds": time.perf_counter() - started, "run_dir": str(run.path)}
        write_json_atomic(run.summary, summary)
        return summary


def _evaluate_in(run: RunDir, config: RunConfig, target: str) -> dict[str, Any]:
    if run.config.exists():
        _require_evaluation(run, config)
    if RunDir(Path(target)).configured:
        require_checkpoint(target)
    roles = config.precision.roles()
    emulated = emulated_names((roles.rollout_dtype, roles.kv_dtype))
    if emulated:
        show_note(emulated_sentence(emulated), mode=config.logging.console)
    trained = (lambda: load_policy(target)) if RunDir(Path(target)).configured else None
    parts = assemble(config, rows=config.evaluate.max_prompts, evaluating=True, trained=trained)
    try:
        synced = first_sync(parts)
        if run.evaluated.exists():
            _require_same_subject(run, parts)
        _write_head(run, parts, synced.contract)
        results = _evaluate_rest(run, parts, synced.policy_version)
    finally:
        parts.close()
    precision = {"precision": config.precision.roles().rollout_dtype, "emulated": emulated}
    summary = evaluation_summary(results) | precision | {"rows_left_out": len(parts.task.left_out)}
    if summary["truncated_fraction"] == 1:
        limit = config.sampling.max_tokens
        show_note(f"all completions were cut off at sampling.max_tokens={limit}; {ADVICE}", mode=config.logging.console)
    return summary


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
    note = require_same_data(str(run.path), saved["data"], parts.data, parts.task.place, parts.config)
    if note:
        show_note(note, mode=parts.config.logging.console)


def _write_head(run: RunDir, parts: Parts, contract: Contract) -> None:
    """Record what is evaluated; the configuration is written last, so a folder that has it is complete."""
    write_json_atomic(run.environment, environment())
    write_json_atomic(run.contract, contract.to_json())
    write_left_out(run, parts.task)
    subject = {"weights_digest": folded_digest(parts.engine.digests()), "data": parts.data.to_json()}
    write_json_atomic(run.evaluated, subject)
    write_json_atomic(run.config, resolved_json(without_permission(parts.config)))


def _evaluate_rest(run: RunDir, parts: Parts, policy_version: int) -> list[PromptResult]:
    """Evaluate the prompts that the folder does not hold yet; each block is written as soon as it is complete."""
    config, count = parts.config, min(len(parts.task), parts.config.evaluate.max_prompts or len(parts.task))
    done = [PromptResult(**row) for row in read_jsonl(run.evaluation)]
    # Logits depend slightly on the other rows of a batch, so an interrupted block is repeated as a whole.
    done = done[: len(done) - len(done) % _PROMPTS_AT_ONCE] if len(done) < count else done
    write_text_atomic(run.evaluation, "".join(json.dumps(asdict(result)) + "\n" for result in done))
    prompts = [parts.task.prompt(index) for index in range(len(done), count)]
    with show_progress("evaluate", count, mode=config.logging.console) as bar, _kept(run, count):
        bar.advance(len(done))

        def keep(results: Sequence[PromptResult]) -> None:
            for result in results:
                append_jsonl(run.evaluation, asdict(result))
            bar.advance(len(results))

        return done + evaluate_prompts(
            parts,
            prompts,
            config.evaluate.samples,
            policy_version=policy_version,
            first_index=len(done),
            keep=keep,
        )


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
    data = config.model_dump()
    if not RunDir(Path(target)).configured:
        data["model"]["name"] = target
    data["sampling"]["temperature"] = config.evaluate.temperature
    return RunConfig.model_validate(data)
