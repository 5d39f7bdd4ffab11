"""Whole runs that sample one step ahead: both sides in this process, where `ray` has them in others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from tests.engine_handles import Stream, ThreadHandle, dies
from torch import Tensor

from betterhalf.cluster.build import BACKENDS, Sides
from betterhalf.config.schema import RunConfig
from betterhalf.errors import RunError, TrainerDiedError
from betterhalf.metrics.names import check_known
from betterhalf.precision import products
from betterhalf.precision.roles import Precision
from betterhalf.report.page import write_report
from betterhalf.rollout.build import ENGINES
from betterhalf.rollout.native.kind import NATIVE
from betterhalf.rollout.pool import EnginePool
from betterhalf.run_dir import RunDir, read_jsonl
from betterhalf.runs import loop
from betterhalf.runs.train import train
from betterhalf.training.trainer import Trainer
from betterhalf.types import Completion, GenerateRequest

Configured = Callable[..., RunConfig]
Rows = list[dict[str, Any]]

AHEAD: dict[str, Any] = {
    "cluster": {"backend": "ray"},
    "pipeline": {"max_staleness": 1},
    "training": {"steps": 5, "checkpoint_every": 3, "optimizer_steps": 2},
    "logging": {"rollouts_per_step": 2},
}


@dataclass
class Watched:
    """Record of the calls of a run's engine."""

    busy: threading.Lock = field(default_factory=threading.Lock)
    ahead: int = 0
    """Calls of `generate` outside the main thread."""


class WatchedEngine:
    """The native engine, which refuses everything else while it samples."""

    def __init__(self, real: Any, watched: Watched) -> None:
        self._real, self._watched = real, watched

    def generate(self, requests: Sequence[GenerateRequest], sampling: Any) -> list[tuple[Completion, ...]]:
        with self._watched.busy:
            self._watched.ahead += threading.current_thread() is not threading.main_thread()
            return self._real.generate(requests, sampling)  # type: ignore[no-any-return]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, policy_version: int) -> None:
        assert not self._watched.busy.locked(), "new weights while the engine samples"
        self._real.load_weights(weights, policy_version=policy_version)

    def sleep(self) -> None:
        assert self._watched.ahead == 0, "an engine with devices of its own need not sleep"
        self._real.sleep()

    def __getattr__(self, name: str) -> Any:
        assert name == "close" or not self._watched.busy.locked(), f"{name} while the engine samples"
        return getattr(self._real, name)


@pytest.fixture(autouse=True)
def unshared_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep products from changing a setting of the whole process.

    Batches of FP32 products do so while they last, where AMX is missing. Under Ray trainer and engine have processes of
    their own; here it would change the other thread's products now and then.
    """
    monkeypatch.setattr(products, "_batched_by_onednn", lambda: False)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """Runs of `cluster.backend=ray` have trainer and engine in this process, and this record of the engine's calls."""
    watched, local = Watched(), BACKENDS["local"]

    def build(*args: Any, **keywords: Any) -> Sides:
        sides = local.build(*args, **keywords)
        return replace(sides, engine=WatchedEngine(sides.engine, watched))

    monkeypatch.setitem(BACKENDS, "ray", replace(local, build=build))
    yield watched
    assert not [each for each in threading.enumerate() if each.name.startswith("sampling of step")]


def rows(run: Path) -> Rows:
    """Return the metrics that must repeat bit for bit."""
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "system/"))}
        for row in read_jsonl(RunDir(run).metrics)
    ]


def test_a_run_one_step_ahead_measures_staleness_apart_from_mismatch(
    watched: Watched, small_config: Configured, tmp_path: Path
) -> None:
    train(small_config(**AHEAD, precision={"preset": "fp16"}), str(tmp_path / "run"), resume=False)
    found = rows(tmp_path / "run")

    # Step 1 has nothing before it, and step 4 follows a checkpoint.
    assert [row["staleness/versions"] for row in found] == [0, 2, 2, 0, 2]
    assert watched.ahead == 3
    for row in found:
        check_known(name for name in row if name != "step")
        stale = {name: value for name, value in row.items() if name.startswith("staleness/")}
        assert stale.pop("staleness/ess_fraction") == pytest.approx(1.0, abs=0.1)
        assert any(stale.values()) == (row["staleness/versions"] > 0)
        # The mismatch is that of equal weights, however old the completions are.
        assert 0 < row["mismatch/k3/mean"] < 1e-5
        if row["staleness/versions"]:
            assert row["staleness/k3/mean"] > 5 * row["mismatch/k3/mean"]
    versions = [row["policy_version"] for row in read_jsonl(RunDir(tmp_path / "run").rollouts)]
    assert versions == [0, 0, 0, 0, 2, 2, 6, 6, 6, 6]
    timed = read_jsonl(RunDir(tmp_path / "run").metrics)
    assert [row["time/ahead_seconds"] > 0 for row in timed] == [False, True, True, False, True]
    assert all(row["time/generate_seconds"] <= row["time/step_seconds"] for row in timed)

    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert "<h2>Staleness</h2>" in page


@pytest.mark.parametrize("stops_after", [1, 2, 3, 4])
def test_a_run_stopped_anywhere_and_resumed_repeats_the_same_steps_bit_for_bit(
    stops_after: int, watched: Watched, small_config: Configured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = small_config(**AHEAD, precision={"preset": "fp16"})
    train(config, str(tmp_path / "whole"), resume=False)

    step = loop.train_step

    def stopping(parts: Any, progress: Any, *more: Any) -> Any:
        if progress.step == stops_after:
            raise RunError("stopped")
        return step(parts, progress, *more)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", stopping)
        with pytest.raises(RunError, match="stopped"):
            train(config, str(tmp_path / "cut"), resume=False)
    train(config, str(tmp_path / "cut"), resume=True)

    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    whole = tmp_path / "whole" / "checkpoints" / "step-000005"
    names = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(names) >= 2
    for name in names:
        first, second = load_file(whole / name), load_file(tmp_path / "cut" / "checkpoints" / whole.name / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_anchor_is_the_policy_that_sampled_and_never_newer_weights(
    watched: Watched, small_config: Configured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The proximal logprobs lie within rounding of the engine's, though the trainer has moved further since."""
    gaps: list[tuple[float, float]] = []
    learn = loop.learn_all

    def checked(trainer: Any, algorithm: Any, passes: Iterable[Any], rate: float) -> Any:
        batches = list(passes)
        for pack in batches[0].packs:
            if pack.proximal_logprobs_C is not None:
                newest = trainer.measure([pack])[0].logprobs_C
                gap = (pack.proximal_logprobs_C - pack.behavior_logprobs_C).abs().max()
                gaps.append((float(gap), float((newest - pack.behavior_logprobs_C).abs().max())))
        return learn(trainer, algorithm, batches, rate)

    monkeypatch.setattr(loop, "learn_all", checked)
    config = small_config(**AHEAD, precision={"preset": "fp32"})
    train(config, str(tmp_path / "run"), resume=False)

    assert max(anchored for anchored, _ in gaps) < 1e-4
    assert max(newest for _, newest in gaps) > 1e-2


def test_a_kl_penalty_on_the_reward_and_masks_read_the_weights_that_sampled(
    watched: Watched, small_config: Configured, tmp_path: Path
) -> None:
    """All that an algorithm reads before the update is at the kept weights: other seams than the mismatch's."""
    algorithm = {"preset": "icepop", "denominator": "kept", "kl": {"coefficient": 0.1, "place": "reward"}}
    config = small_config(**AHEAD, algorithm=algorithm, mismatch={"sample_fraction": 0.5})
    train(config, str(tmp_path / "run"), resume=False)
    found = rows(tmp_path / "run")
    assert [row["staleness/versions"] for row in found] == [0, 2, 2, 0, 2]
    # The reference is the first policy, which also sampled the second step.
    assert [row["policy/reference_kl/max"] == 0 for row in found] == [True, True, False, False, False]


class MortalTrainer:
    """The trainer of this process, which dies in the middle of one step and is started again."""

    def __init__(self, real: Any, dies_in: int) -> None:
        self._real, self._passes, self._dies_in = real, 0, dies_in
        self.restarts = 0

    def forward_backward(self, *args: Any) -> Any:
        self._passes += 1
        if self._passes == self._dies_in:
            raise TrainerDiedError("rank 1 ended")
        return self._real.forward_backward(*args)

    def restart(self) -> None:
        self.restarts += 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_a_trainer_that_dies_while_the_next_step_is_sampled_repeats_the_same_steps(
    small_config: Configured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Step 5 is lost with its second optimizer step, and step 6 with it, which is being sampled."""
    local, made = BACKENDS["local"], list[MortalTrainer]()

    def trained(name: str, dies_in: int) -> Rows:
        watched = Watched()

        def build(*args: Any, **keywords: Any) -> Sides:
            sides = local.build(*args, **keywords)
            made.append(MortalTrainer(sides.trainer, dies_in))
            return replace(sides, trainer=cast(Trainer, made[-1]), engine=WatchedEngine(sides.engine, watched))

        monkeypatch.setitem(BACKENDS, "ray", replace(local, build=build))
        changes = {**AHEAD, "training": {**AHEAD["training"], "steps": 6, "checkpoint_every": 3}}
        train(small_config(**changes), str(tmp_path / name), resume=False)
        return rows(tmp_path / name)

    plain, disturbed = trained("plain", 0), trained("disturbed", 10)
    assert [trainer.restarts for trainer in made] == [0, 1]
    counts = [[row.pop("optim/rank_restarts") for row in run] for run in (plain, disturbed)]
    assert not any(counts[0]) and counts[1][4] == 1
    assert disturbed == plain
    assert [row["staleness/versions"] for row in plain] == [0, 2, 2, 0, 2, 2]


class StoringTrainer:
    """The trainer of this process, whose weights for the engines stay readable after later updates, as stored ones."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def weight_stream(self) -> Stream:
        stream = self._real.weight_stream()
        return Stream(stream.policy_version, [(name, tensor.clone()) for name, tensor in stream])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_an_engine_that_ends_while_it_samples_ahead_changes_no_metric(
    small_config: Configured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is replaced, and loads the weights that sample: those that the trainer updates at the same time are newer."""
    local, starts = BACKENDS["local"], {}

    def trained(name: str, faults: dict[str, list[Callable[[], None] | None]]) -> Rows:
        def pool(config: RunConfig, hf_config: Any, stops: tuple[int, ...], precision: Precision) -> EnginePool:
            def native() -> Any:
                return NATIVE.build(config, hf_config, stops, precision)

            handles = [ThreadHandle(number, build=native) for number in range(2)]
            handles[-1].faults = faults
            starts[name] = handles
            return EnginePool(handles, max_restarts=2, rollout_dtype=precision.roles.rollout_dtype)

        def build(*args: Any, **keywords: Any) -> Sides:
            sides = local.build(*args, **keywords)
            return replace(sides, trainer=cast(Trainer, StoringTrainer(sides.trainer)))

        monkeypatch.setitem(ENGINES, "native", replace(NATIVE, build=pool))
        monkeypatch.setitem(BACKENDS, "ray", replace(local, build=build))
        train(small_config(**AHEAD), str(tmp_path / name), resume=False)
        return rows(tmp_path / name)

    plain = trained("plain", {})
    disturbed = trained("disturbed", {"generate": [None, None, dies()]})
    assert [handle.starts for handle in starts["disturbed"]] == [1, 2]
    assert [row.pop("rollout/engine_restarts") for row in disturbed] == [0, 0, 1, 0, 0]
    assert [row.pop("rollout/engine_restarts") for row in plain] == [0] * 5
    assert disturbed == plain
