"""The loop keeps the rollout engine's Protocol: awake before it is used, and trained at the version that sampled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from betterhalf.config.schema import RunConfig, SamplingConfig
from betterhalf.errors import EngineDiedError, EngineError
from betterhalf.examine.subject import open_subject, sample_groups_of
from betterhalf.precision.contract import SideReport
from betterhalf.runs import loop
from betterhalf.runs.assembly import Parts, assemble
from betterhalf.runs.evaluate import evaluate_prompts
from betterhalf.runs.progress import Progress
from betterhalf.runs.weight_sync import first_sync, sync_weights
from betterhalf.types import Completion, GenerateRequest

OVERFLOWS = {"preset": "fp16", "loss_scale": {"initial": 2.0**60}}
"""So large a first loss scale that the gradients of every optimizer step overflow."""

Strict = Callable[..., tuple[Parts, "StrictEngine"]]


class StrictEngine:
    """The native engine, with an engine's right to be asked for nothing while it sleeps, and to die."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.asleep = self.dead = False
        self.dies_at_wake = False
        self.naps = self.restarts = 0
        self.lag = 0
        """Versions by which completions are older than what was loaded."""

    def _use(self) -> Any:
        assert not self.asleep, "used asleep"
        if self.dead:
            raise EngineDiedError("killed")
        return self.engine

    def generate(self, requests: Sequence[GenerateRequest], sampling: SamplingConfig) -> list[tuple[Completion, ...]]:
        groups = self._use().generate(requests, sampling)
        return [tuple(replace(c, policy_version=c.policy_version - self.lag) for c in group) for group in groups]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        return self._use().score(sequences)  # type: ignore[no-any-return]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, policy_version: int) -> None:
        self._use().load_weights(weights, policy_version=policy_version)

    def digests(self) -> dict[str, str]:
        return self._use().digests()  # type: ignore[no-any-return]

    def report(self) -> SideReport:
        return self._use().report()  # type: ignore[no-any-return]

    def sleep(self) -> None:
        self.naps += not self.asleep
        self.asleep = True

    def wake(self) -> None:
        if self.asleep and self.dies_at_wake:
            self.dead, self.dies_at_wake = True, False
            raise EngineDiedError("killed while it slept")
        self.asleep = False

    def restart(self) -> None:
        self.asleep = self.dead = False
        self.restarts += 1

    def close(self) -> None:
        self.engine.close()


@pytest.fixture
def strict(small_config: Callable[..., RunConfig]) -> Iterator[Strict]:
    """Assembled and synced parts around a strict engine, closed at the end."""
    made: list[Parts] = []

    def make(**changes: Any) -> tuple[Parts, StrictEngine]:
        parts = assemble(small_config(**changes))
        engine = StrictEngine(parts.engine)
        made.append(replace(parts, engine=engine))
        first_sync(made[-1])
        return made[-1], engine

    yield make
    for parts in made:
        parts.close()


def test_a_step_that_skips_every_optimizer_step_leaves_an_engine_that_the_next_one_wakes(strict: Strict) -> None:
    parts, engine = strict(precision=OVERFLOWS)
    first = loop.train_step(parts, Progress())
    assert first.metrics["optim/skipped"] == 2 and first.metrics["policy/version"] == 0
    assert engine.asleep
    second = loop.train_step(parts, first.progress)
    assert second.metrics["optim/skipped"] == 2 and engine.naps == 2
    sync_weights(parts)
    assert not engine.asleep


def test_evaluation_after_a_last_step_without_an_update_wakes_the_engine(strict: Strict) -> None:
    parts, engine = strict(precision=OVERFLOWS)
    loop.train_step(parts, Progress())
    assert engine.asleep
    results = evaluate_prompts(parts, parts.task.prompts(0, 2, 0), 2, policy_version=0)
    assert [result.samples for result in results] == [2, 2]


def test_a_step_with_updates_leaves_an_engine_awake(strict: Strict) -> None:
    parts, engine = strict()
    result = loop.train_step(parts, Progress())
    assert result.metrics["policy/version"] == 2 and engine.naps == 1 and not engine.asleep
    loop.train_step(parts, result.progress)


def test_an_engine_that_dies_while_it_sleeps_is_restarted_with_the_weights_and_samples_the_same(strict: Strict) -> None:
    parts, engine = strict(precision=OVERFLOWS)
    parts = replace(parts, config=with_restarts(parts.config))
    first = loop.train_step(parts, Progress())
    undisturbed = loop.train_step(parts, first.progress)
    engine.dies_at_wake = True
    disturbed = loop.train_step(parts, first.progress)
    assert engine.restarts == 1 and disturbed.metrics["rollout/engine_restarts"] == 1
    for name in ("rollout/reward/mean", "rollout/length/mean", "mismatch/k3/mean"):
        assert disturbed.metrics[name] == undisturbed.metrics[name]


def with_restarts(config: RunConfig) -> RunConfig:
    """Restarts are for engines with a process of their own."""
    return RunConfig.model_validate(config.model_dump() | {"engine": {"type": "vllm", "max_restarts": 1}})


def test_completions_of_stale_weights_are_refused_and_not_measured_as_mismatch(strict: Strict) -> None:
    parts, engine = strict()
    first = loop.train_step(parts, Progress())
    engine.lag = 1
    with pytest.raises(EngineError, match=r"16 of 16 .* stale weights, of policy version 1, .* holds version 2"):
        loop.train_step(parts, first.progress)
    with pytest.raises(EngineError, match="stale weights"):
        evaluate_prompts(parts, parts.task.prompts(0, 1, 0), 1, policy_version=2)
    assert EngineError.exit_code == 3


def test_a_restored_version_is_that_of_the_next_completions(strict: Strict) -> None:
    parts, _ = strict()
    parts.trainer.load(replace(parts.trainer.state(), policy_version=7))
    resumed = Progress(policy_version=7)
    with pytest.raises(EngineError, match="of policy version 0, where the trainer holds version 7"):
        loop.train_step(parts, resumed)
    sync_weights(parts)
    assert loop.train_step(parts, resumed).metrics["policy/version"] == 9


def test_an_examined_model_is_sampled_at_the_version_it_was_loaded_under(
    strict: Strict, small_config: Callable[..., RunConfig]
) -> None:
    _, engine = strict()
    with open_subject("demo", small_config()) as subject:
        (group,) = sample_groups_of(subject, engine, subject.prompts(1), 2)
        assert {completion.policy_version for completion in group} == {0}
        engine.lag = -3
        with pytest.raises(EngineError, match="2 of 2 completions .* of policy version 3"):
            sample_groups_of(subject, engine, subject.prompts(1), 2)
