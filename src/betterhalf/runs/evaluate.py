"""Accuracy of a policy as its engine samples it: avg@k and pass@k."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from betterhalf.config.load import resolved_json
from betterhalf.config.schema import RunConfig
from betterhalf.environment import environment
from betterhalf.errors import CheckpointError
from betterhalf.metrics.console import progress as show_progress
from betterhalf.run_dir import RunDir, append_jsonl, write_json_atomic
from betterhalf.runs.assembly import Parts, assemble
from betterhalf.runs.collect import sample_groups
from betterhalf.runs.folder import run_folder
from betterhalf.runs.stopwatch import Stopwatch
from betterhalf.runs.weight_sync import first_sync
from betterhalf.training import checkpoint
from betterhalf.types import Prompt

EVALUATION_STEP = 2**31 - 1
"""Stands in for the step in the random key, so that evaluation never draws what training drew."""

_PROMPTS_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScore:
    """How often one prompt was solved."""

    prompt_id: str
    solved: int
    """Completions with the full reward of 1."""
    samples: int
    reward: float
    """Mean reward."""
    truncated: int
    """Completions that hit the length limit."""
    tokens: int
    """Completion tokens, all samples together."""


def score_prompts(
    parts: Parts,
    prompts: Sequence[Prompt],
    samples: int,
    *,
    step: int = EVALUATION_STEP,
    first_index: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> list[PromptScore]:
    """Sample `samples` completions of each prompt from the engine and count what is solved."""
    scores: list[PromptScore] = []
    clock = Stopwatch()
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        part = prompts[start : start + _PROMPTS_AT_ONCE]
        for group in sample_groups(parts, part, samples, step, first_index + start, clock):
            completions = [rollout.completion for rollout in group.rollouts]
            scores.append(
                PromptScore(
                    prompt_id=group.prompt.prompt_id,
                    solved=sum(reward >= 1.0 for reward in group.rewards),
                    samples=samples,
                    reward=statistics.fmean(group.rewards),
                    truncated=sum(completion.finish_reason == "length" for completion in completions),
                    tokens=sum(len(completion.token_ids) for completion in completions),
                )
            )
        advance(len(part))
    return scores


def average_reward(scores: Sequence[PromptScore]) -> float:
    """avg@k: mean reward over all completions of all prompts."""
    return statistics.fmean(score.reward for score in scores)


def pass_at(scores: Sequence[PromptScore], k: int) -> float:
    """pass@k: chance that at least one of k completions solves a prompt; the unbiased estimator of arXiv 2107.03374."""
    return statistics.fmean(1 - math.comb(s.samples - s.solved, k) / math.comb(s.samples, k) for s in scores)


def evaluation_summary(scores: Sequence[PromptScore]) -> dict[str, Any]:
    """avg@k, and pass@k for powers of two up to the number of samples."""
    samples = scores[0].samples
    powers = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    return {
        "prompts": len(scores),
        "samples": samples,
        f"avg@{samples}": average_reward(scores),
        **{f"pass@{k}": pass_at(scores, k) for k in powers},
        "truncated_fraction": sum(s.truncated for s in scores) / (samples * len(scores)),
        "mean_length": sum(s.tokens for s in scores) / (samples * len(scores)),
    }


def evaluate(target: str, config: RunConfig, run_dir: str | None) -> dict[str, Any]:
    """Evaluate a model, or the newest checkpoint of a run, on a task.

    Args:
        target: MODEL, or the folder of a run (then `config` should be the run's own).
        config: task, sampling, precision and `evaluate` settings.
        run_dir: where `evaluation.jsonl` and `summary.json` go; `runs/evaluate-<name>-<time>` if absent.
    """
    started = time.perf_counter()
    with run_folder(run_dir, "evaluate", Path(target).name) as run:
        summary = {"verb": "evaluate", "target": target, **_evaluate_in(run, _with_target(config, target), target)}
        summary |= {"seconds": time.perf_counter() - started, "run_dir": str(run.path)}
        write_json_atomic(run.summary, summary)
        return summary


def _evaluate_in(run: RunDir, config: RunConfig, target: str) -> dict[str, Any]:
    parts = assemble(config, rows=config.evaluate.max_prompts)
    try:
        if RunDir(Path(target)).configured:
            load_trained(parts, target)
        contract = first_sync(parts)
        write_json_atomic(run.config, resolved_json(config))
        write_json_atomic(run.environment, environment())
        write_json_atomic(run.contract, contract.to_json())
        scores = _score_with_progress(parts, config)
    finally:
        parts.close()
    for score in scores:
        append_jsonl(run.path / "evaluation.jsonl", asdict(score))
    return evaluation_summary(scores)


def _score_with_progress(parts: Parts, config: RunConfig) -> list[PromptScore]:
    count = min(len(parts.task), config.evaluate.max_prompts or len(parts.task))
    prompts = [parts.task.prompt(index) for index in range(count)]
    with show_progress("evaluate", count, mode=config.logging.console) as bar:
        return score_prompts(parts, prompts, config.evaluate.samples, advance=bar.advance)


def _with_target(config: RunConfig, target: str) -> RunConfig:
    data = config.model_dump()
    if not RunDir(Path(target)).configured:
        data["model"] = {"name": target}
    data["sampling"]["temperature"] = config.evaluate.temperature
    return RunConfig.model_validate(data)


def load_trained(parts: Parts, run_path: str) -> int:
    """Put the newest checkpoint's weights into the trainer; returns its step.

    Raises:
        CheckpointError: there is none, it is corrupted, or it belongs to another model.
    """
    path, saved = newest_checkpoint(run_path)
    checkpoint.require_parameters(path, parts.trainer.weights.masters, saved.tensors["model"])
    parts.trainer.weights.load(saved.tensors["model"])
    parts.trainer.policy_version = int(saved.values["trainer"]["policy_version"])
    return saved.step


def newest_checkpoint(run_path: str) -> tuple[Path, checkpoint.Checkpoint]:
    """Path and content of a run's newest checkpoint.

    Raises:
        CheckpointError: there is none, or it is corrupted.
    """
    path = checkpoint.latest(RunDir.open(run_path).checkpoints)
    if path is None:
        raise CheckpointError(
            f"run {run_path} has no checkpoint yet; let it reach one (training.checkpoint_every), or name a model"
        )
    return path, checkpoint.load(path)
