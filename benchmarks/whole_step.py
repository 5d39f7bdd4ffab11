"""What the benchmarks of whole steps share: a run's parts with completions of one length, and rewards made to order.

Completions ignore stop tokens, so that every side samples as many tokens. Rewards decide which groups are trained: a
group of equal rewards is skipped, exactly, and would make a step look fast. `spread` lets no group be equal, `task` is
the task's own reward, and a share of groups can be made equal on purpose.
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
    """A task whose rewards are made to order; all else is the task's."""

    def __init__(self, task: Task, group_size: int, equal_share: float = 0.0) -> None:
        """`equal_share` of the groups of a call, the first ones, have siblings of equal reward."""
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
    """Every second completion is right; how many characters it uses tells the others apart."""
    return index % 2 + len(set(text)) / 1000


def step_config(
    model: str, dtype: DtypeName, *, prompts: int, siblings: int, tokens: int, preset: str = "grpo", updates: int = 4
) -> RunConfig:
    """A run of the arithmetic task; `updates` optimizer steps for each rollout batch."""
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
            # Made-up rewards and many repetitions must not end a measurement.
            "watchdog": {"levels": [{"metric": "mismatch/k3/mean", "above": 1e9}]},
            "logging": {"console": "quiet"},
        }
    )


def open_parts(config: RunConfig, reward: Reward = "spread", equal_share: float = 0.0) -> Parts:
    """The parts of a run with an engine that ignores stop tokens and holds the weights."""
    parts = assemble(config)
    parts.engine.close()
    engine = build_engine(config, parts.model.hf_config, (), parts.precision)
    parts = replace(parts, engine=engine)
    if reward == "spread":
        parts = with_rewards(parts, equal_share)
    sync_weights(parts)
    return parts


def with_rewards(parts: Parts, equal_share: float) -> Parts:
    """`parts` with made-up rewards, those of a share of the groups equal."""
    return replace(parts, task=Scripted(parts.task, parts.config.training.group_size, equal_share))


class Steps:
    """Runs one step after another."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.progress = parts, Progress()
        self.skipped = 0
        """Optimizer steps refused so far because gradients were not finite: they make a step shorter."""

    def __call__(self) -> loop.StepResult:
        """The next step."""
        result = loop.train_step(self.parts, self.progress)
        self.progress = result.progress
        self.skipped += int(result.metrics["optim/skipped"] or 0)
        return result


def add_sizes(made: argparse.ArgumentParser) -> None:
    """Options for the model and the size of a step."""
    made.add_argument("--model", default="smollm2")
    made.add_argument("--prompts", type=int, default=4, help="prompts of a step")
    made.add_argument("--siblings", type=int, default=8, help="completions of each prompt")
    made.add_argument("--tokens", type=int, default=64, help="tokens of each completion")
