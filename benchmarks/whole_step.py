"""Common parts of the benchmarks of whole steps: completions of one length, and rewards set by the benchmark.

Completions ignore stop tokens, so that every side samples the same number of tokens. Rewards decide which groups are
trained: a group of equal rewards is skipped, which changes no result but would make a step look fast. `spread` gives no
group equal rewards, `task` is the task's own reward, and a share of groups can be given equal rewards on purpose.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from betterhalf.config.schema import RunConfig
from betterhalf.rollout.build import build_engine
from betterhalf.runs import loop
from betterhalf.runs.assembly import Parts, assemble
from betterhalf.runs.progress import Progress
from betterhalf.runs.weight_sync import sync_weights
from betterhalf.tasks.task import Task
from betterhalf.types import DtypeName, FinishReason, Prompt

Reward = Literal["spread", "task"]


class Scripted:
    """A task with rewards set by the benchmark; everything else is the task's."""

    def __init__(self, task: Task, group_size: int, equal_share: float = 0.0) -> None:
        """Give the siblings of the first `equal_share` of the groups of a call equal rewards."""
        self._task, self._group_size, self._equal_share = task, group_size, equal_share

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        equal = round(self._equal_share * len(texts) / self._group_size) * self._group_size
        return [0.0 if index < equal else spread_reward(index, text) for index, text in enumerate(texts)]

    def __len__(self) -> int:
        return len(self._task)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


def spread_reward(index: int, text: str) -> float:
    """Reward every second completion; the number of distinct characters separates the others."""
    return index % 2 + len(set(text)) / 1000


def step_config(
    model: str, dtype: DtypeName, *, prompts: int, siblings: int, tokens: int, preset: str = "grpo", updates: int = 4
) -> RunConfig:
    """Return the configuration of a run of the arithmetic task, with `updates` optimizer steps per rollout batch."""
    return RunConfig.model_validate(
        {
            "model": {"name": model},
            "precision": {"preset": dtype},
            "task": {"type": "arithmetic", "style": "auto"},
            "algorithm": {"preset": preset},
            "sampling": {"max_tokens": tokens},
            "training": {
                "steps": 10**6,
                "prompts_per_step": prompts,
                "group_size": siblings,
                "optimizer_steps": updates,
            },
            # Artificial rewards and many repetitions must not end a measurement.
            "watchdog": {"levels": [{"metric": "mismatch/k3/mean", "above": 1e9}]},
            "logging": {"console": "quiet"},
        }
    )


def open_parts(config: RunConfig, reward: Reward = "spread", equal_share: float = 0.0) -> Parts:
    """Build the parts of a run, with an engine that ignores stop tokens and holds the weights."""
    parts = assemble(config)
    parts.engine.close()
    engine = build_engine(config, parts.model.hf_config, (), parts.precision)
    parts = replace(parts, sides=replace(parts.sides, engine=engine))
    if reward == "spread":
        parts = with_rewards(parts, equal_share)
    sync_weights(parts)
    return parts


def with_rewards(parts: Parts, equal_share: float) -> Parts:
    """Return `parts` with artificial rewards, equal for a share of the groups."""
    return replace(parts, task=Scripted(parts.task, parts.config.training.group_size, equal_share))


class Steps:
    """Runner of consecutive steps."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        # Parts that have run steps already hold later weights.
        self.progress = Progress(policy_version=parts.trainer.state().policy_version)
        self.skipped = 0
        """Number of optimizer steps skipped so far because gradients were not finite: they make a step shorter."""

    def __call__(self) -> loop.StepResult:
        """Run the next step."""
        result = loop.train_step(self.parts, self.progress)
        self.progress = result.progress
        self.skipped += int(result.metrics["optim/skipped"] or 0)
        return result


def add_sizes(made: argparse.ArgumentParser) -> None:
    """Add options for the model and the size of a step."""
    made.add_argument("--model", default="smollm2")
    made.add_argument("--prompts", type=int, default=4, help="prompts of a step")
    made.add_argument("--siblings", type=int, default=8, help="completions of each prompt")
    made.add_argument("--tokens", type=int, default=64, help="tokens of each completion")
