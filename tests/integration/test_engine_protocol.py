"""The loop keeps to the rollout engine's Protocol: it wakes the engine before use, and trains at the version that
sampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from betterhalf.config.schema import RunConfig, SamplingConfig
from betterhalf.errors import EngineDiedError, EngineError
from betterhalf.examine.subject import open_subject, sample_groups_of
from betterhalf.precision.contract import SideReport
from betterhalf.precision.roles import Precision
from betterhalf.rollout.build import ENGINES
from betterhalf.rollout.capabilities import EngineCapabilities
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.rollout.native.engine import NativeEngine
from betterhalf.rollout.native.kind import NATIVE
from betterhalf.run_dir import read_jsonl
from betterhalf.runs import loop
from betterhalf.runs.assembly import Parts, assemble
from betterhalf.runs.evaluate import evaluate
from betterhalf.runs.evaluation import evaluate_prompts
from betterhalf.runs.progress import Progress
from betterhalf.runs.train import train
from betterhalf.runs.weight_sync import first_sync, sync_weights
from betterhalf.types import Completion, GenerateRequest

OVERFLOWS = {"preset": "fp16", "loss_scale": {"initial": 2.0**60}}
"""A first loss scale at which the gradients of every optimizer step overflow."""


@dataclass
class Behavior:
    """State of a strict engine, and how a test wants it to misbehave."""

    native: RolloutEngine
    """The engine that does the work; the loop never sees it."""
    asleep: bool = False
    dead: bool = False
    dies_at_wake: bool = False
    naps: int = 0
    restarts: int = 0
    lag: int = 0
    """Versions by which completions are older than what was loaded."""
    generations: float = math.inf
    """Calls of `generate` until the engine dies in every further one."""

    def use(self) -> RolloutEngine:
        assert not self.asleep, "used asleep"
        if self.dead:
            raise EngineDiedError("killed")
        return self.native


Strict = Callable[..., tuple[Parts, Behavior]]


class StrictEngine:
    """An engine with the members of `RolloutEngine` and no other, which refuses what the Protocol does not promise."""

    __slots__ = ("_behavior",)

    def __init__(self, behavior: Behavior) -> None:
        self._behavior = behavior

    def generate(self, requests: Sequence[GenerateRequest], sampling: SamplingConfig) -> list[tuple[Completion, ...]]:
        if self._behavior.generations == 0:
            raise EngineDiedError("killed for good")
        self._behavior.generations -= 1
        groups, lag = self._behavior.use().generate(requests, sampling), self._behavior.lag
        return [tuple(replace(c, policy_version=c.policy_version - lag) for c in group) for group in groups]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        return self._behavior.use().score(sequences)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, policy_version: int) -> None:
        self._behavior.use().load_weights(weights, policy_version=policy_version)

    def digests(self) -> dict[str, str]:
        return self._behavior.use().digests()

    def report(self) -> SideReport:
        return self._behavior.use().report()

    def sleep(self) -> None:
        self._behavior.naps += not self._behavior.asleep
        self._behavior.asleep = True

    def wake(self) -> None:
        behavior = self._behavior
        if behavior.asleep and behavior.dies_at_wake:
            behavior.dead, behavior.dies_at_wake = True, False
            raise EngineDiedError("killed while it slept")
        behavior.asleep = False

    def restart(self) -> None:
        self._behavior.asleep = self._behavior.dead = False
        self._behavior.restarts += 1

    def close(self) -> None:
        self._behavior.native.close()


def declared(_config: RunConfig) -> EngineCapabilities:
    return EngineCapabilities(
        max_restarts=1, fp32_islands=False, emulates=False, scores=True, traces=False, shares_cores=False
    )


def built_strict(
    config: RunConfig, hf_config: Any, stop_token_ids: tuple[int, ...], precision: Precision
) -> StrictEngine:
    return StrictEngine(Behavior(NATIVE.build(config, hf_config, stop_token_ids, precision)))


STRICT = replace(NATIVE, capabilities=declared, build=built_strict)
"""An engine that is added by its entry in the table alone."""


@pytest.fixture
def strict(small_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> Iterator[Strict]:
    """Assembled and synced parts with a strict engine, closed at the end."""
    monkeypatch.setitem(ENGINES, "native", STRICT)
    made: list[Parts] = []

    def make(**changes: Any) -> tuple[Parts, Behavior]:
        made.append(assemble(small_config(**changes)))
        first_sync(made[-1])
        return made[-1], behavior_of(made[-1])

    yield make
    for parts in made:
        parts.close()


def behavior_of(parts: Parts) -> Behavior:
    assert isinstance(parts.engine, StrictEngine)
    return parts.engine._behavior


def test_the_strict_engine_has_the_members_of_the_protocol_and_no_other() -> None:
    def members(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert members(StrictEngine) == members(RolloutEngine)
    assert not issubclass(StrictEngine, NativeEngine)


def test_a_run_is_trained_resumed_and_evaluated_with_an_engine_known_by_its_declaration_alone(
    small_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sync, checkpoint and evaluation give the same numbers as with the native engine, which does the work."""
    config = small_config(training={"steps": 2, "checkpoint_every": 1}, evaluate={"max_prompts": 2, "samples": 2})
    train(config, str(tmp_path / "plain"), resume=False)
    expected = evaluate(str(tmp_path / "plain"), config, str(tmp_path / "plain-evaluated"))

    monkeypatch.setitem(ENGINES, "native", replace(STRICT, build=built_to_die))
    with pytest.raises(EngineDiedError, match="died 2 times in one step"):
        train(config, str(tmp_path / "strict"), resume=False)
    monkeypatch.setitem(ENGINES, "native", STRICT)
    train(config, str(tmp_path / "strict"), resume=True)
    found = evaluate(str(tmp_path / "strict"), config, str(tmp_path / "strict-evaluated"))
    plain, strict = (rows_without_times(tmp_path / run / "metrics.jsonl") for run in ("plain", "strict"))
    assert len(plain) == 2 and strict == plain
    for own in ("target", "run_dir", "seconds"):
        del found[own], expected[own]
    assert found == expected


def test_an_engine_that_cannot_score_is_verified_by_digests_alone_and_says_so(
    small_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mute = replace(STRICT, capabilities=lambda config: replace(declared(config), scores=False))
    monkeypatch.setitem(ENGINES, "native", mute)
    parts = assemble(small_config(logging={"console": "lines"}))
    monkeypatch.setattr(StrictEngine, "score", lambda *_: pytest.fail("asked to score"))
    try:
        first_sync(parts)
        assert "verified by the digests of the weights alone" in capsys.readouterr().err
        loop.train_step(parts, Progress())
    finally:
        parts.close()


def rows_without_times(path: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(path)
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "system/"))} for row in rows]


def built_to_die(
    config: RunConfig, hf_config: Any, stop_token_ids: tuple[int, ...], precision: Precision
) -> StrictEngine:
    """Build an engine that samples one step and then crashes in every call, restarted or not."""
    engine = built_strict(config, hf_config, stop_token_ids, precision)
    engine._behavior.generations = 1
    return engine


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
    first = loop.train_step(parts, Progress())
    undisturbed = loop.train_step(parts, first.progress)
    engine.dies_at_wake = True
    disturbed = loop.train_step(parts, first.progress)
    assert engine.restarts == 1 and disturbed.metrics["rollout/engine_restarts"] == 1
    for name in ("rollout/reward/mean", "rollout/length/mean", "mismatch/k3/mean"):
        assert disturbed.metrics[name] == undisturbed.metrics[name]


def test_completions_of_stale_weights_are_refused_and_not_measured_as_mismatch(strict: Strict) -> None:
    parts, engine = strict()
    first = loop.train_step(parts, Progress())
    engine.lag = 1
    with pytest.raises(EngineError, match=r"16 of 16 .* stale weights, of policy version 1, .* should hold version 2"):
        loop.train_step(parts, first.progress)
    with pytest.raises(EngineError, match="stale weights"):
        evaluate_prompts(parts, parts.task.prompts(0, 1, 0), 1, policy_version=2)
    assert EngineError.exit_code == 3


def test_a_restored_version_is_that_of_the_next_completions(strict: Strict) -> None:
    parts, _ = strict()
    parts.trainer.load(replace(parts.trainer.state(), policy_version=7))
    resumed = Progress(policy_version=7)
    with pytest.raises(EngineError, match="of policy version 0, where the engine should hold version 7"):
        loop.train_step(parts, resumed)
    sync_weights(parts)
    assert loop.train_step(parts, resumed).metrics["policy/version"] == 9


def test_an_examined_model_is_sampled_at_the_version_it_was_loaded_under(
    strict: Strict, small_config: Callable[..., RunConfig]
) -> None:
    parts, engine = strict()
    with open_subject("demo", small_config()) as subject:
        (group,) = sample_groups_of(subject, parts.engine, subject.prompts(1), 2)
        assert {completion.policy_version for completion in group} == {0}
        engine.lag = -3
        with pytest.raises(EngineError, match="2 of 2 completions .* of policy version 3"):
            sample_groups_of(subject, parts.engine, subject.prompts(1), 2)
