"""Engines under a local Ray sample what one engine in this process samples, also when one of them is killed.

One session serves all tests, because its start and that of the engines take some twenty seconds.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from betterhalf.config.schema import ModelConfig, RunConfig, SamplingConfig
from betterhalf.models.loading import LoadedModel, load_model
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.rollout.pool import EnginePool
from betterhalf.types import GenerateRequest

pytestmark = [
    pytest.mark.extra,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed; run scripts/install --ray"
    ),
]

ENGINES = 2
CONFIG = RunConfig.model_validate(
    {"precision": {"preset": "fp16"}, "cluster": {"backend": "ray", "engines": ENGINES}, "device": "cpu"}
)
SAMPLING = SamplingConfig(max_tokens=24)
PROMPT = (1, 10, 2, 10, 3, 10, 4, 12)
REQUESTS = [
    GenerateRequest(token_ids=PROMPT[: 8 - index % 3], group_size=3, key=(0, 1, index), prompt_id=f"p{index}")
    for index in range(6)
]
SCORED = [(1, 10, 2, 10, 3)]
PATIENCE = 120.0


@dataclass
class Cluster:
    """Two engines in processes, and what is needed to disturb them."""

    pool: EnginePool
    engines: tuple[Any, ...]
    weights: Callable[[int], Any]
    """Maker of the weights of a policy version in the object store: always those of the demo model."""
    notes: list[str]
    pids: set[int] = field(default_factory=set)
    """Process ids of all engines there have been."""

    def pid(self, index: int) -> int:
        """Return the process id of an engine."""
        pid = int(re.search(r"process (\d+)", self.engines[index].name).group(1))  # type: ignore[union-attr]
        self.pids.add(pid)
        return pid

    def disturb(self, index: int, act: Callable[[], Any], then: Callable[[int], None]) -> Any:
        """Stop an engine so that it cannot answer, begin `act`, do something to the engine, and return the result."""
        pid, found = self.pid(index), []
        os.kill(pid, signal.SIGSTOP)
        thread = threading.Thread(target=lambda: found.append(act()))
        thread.start()
        thread.join(0.1)
        assert thread.is_alive() and not found, "the engine is not needed, or answers although it is stopped"
        then(pid)
        thread.join(PATIENCE)
        assert found, "no result in time"
        self.pid(index)
        return found[0]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(ModelConfig(name="demo"))


@pytest.fixture(scope="module")
def cluster(demo: LoadedModel) -> Iterator[Cluster]:
    from betterhalf.cluster.engine_process import start_engines
    from betterhalf.cluster.placement import placement_of
    from betterhalf.cluster.session import open_session
    from betterhalf.cluster.weight_versions import StoredWeights, store_parts

    def weights(version: int) -> StoredWeights:
        named = ((name, parameter.detach().half()) for name, parameter in demo.module.named_parameters())
        return StoredWeights(store_parts(named, "fp16", part_bytes=2**16), version, demo.hf_config)

    session = open_session(CONFIG.cluster)
    try:
        placement = placement_of(CONFIG.cluster)
        session.place(placement)
        engines, notes = start_engines(CONFIG, session, placement.engines), []
        pool = EnginePool(engines, max_restarts=3, rollout_dtype="fp16", tell=notes.append)
        pool.load_weights(weights(1), policy_version=1)
        pool.score(SCORED)
        made = Cluster(pool=pool, engines=engines, weights=weights, notes=notes)
        for index in range(ENGINES):
            made.pid(index)
        yield made
        shared = {path for index in range(ENGINES) for path in shared_memory(made.pid(index))}
        pool.close()
    finally:
        session.close()
    left = [pid for pid in made.pids if runs(pid)]
    assert not left and len(made.pids) > ENGINES, "engines outlive the session"
    assert shared and not any(map(os.path.exists, shared)), "shared memory is left behind"


def shared_memory(pid: int) -> set[str]:
    """Return the files in /dev/shm that a process maps: the object store's."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {line.split()[5] for line in maps.splitlines() if "/dev/shm/" in line}


def runs(pid: int) -> bool:
    """Return whether a process runs, after waiting a little for its end; a zombie does not run."""
    status = Path(f"/proc/{pid}/stat")
    for _ in range(50):
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except (FileNotFoundError, ProcessLookupError):
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(scope="module")
def alone(demo: LoadedModel) -> RolloutEngine:
    """One engine in this process, with the same weights."""
    precision = build_precision(CONFIG.precision, torch.device("cpu"))
    engine = build_engine(CONFIG, demo.hf_config, demo.stop_token_ids, precision)
    named = ((name, parameter.detach().half()) for name, parameter in demo.module.named_parameters())
    engine.load_weights(named, policy_version=1)
    return engine


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Any:
    return cluster.pool.generate(REQUESTS, SAMPLING)


def test_two_engines_sample_and_score_what_one_does(cluster: Cluster, alone: RolloutEngine, undisturbed: Any) -> None:
    expected = alone.generate(REQUESTS, SAMPLING)
    for ours, theirs in zip(undisturbed, expected, strict=True):
        assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.behavior_logprobs == pytest.approx(other.behavior_logprobs, abs=2e-2), "only rounding differs"
    assert cluster.pool.score(SCORED) == alone.score(SCORED), "the same batch gives the same bits"
    assert cluster.pool.digests() == alone.digests()
    assert cluster.pool.report() == alone.report()


def test_an_engine_killed_while_it_samples_is_replaced_and_the_completions_are_the_same(
    cluster: Cluster, undisturbed: Any
) -> None:
    before = [cluster.pid(index) for index in range(ENGINES)]
    found = cluster.disturb(1, lambda: cluster.pool.generate(REQUESTS, SAMPLING), kill)
    assert found == undisturbed, "bit for bit, logprobs included"
    assert cluster.pid(0) == before[0] and cluster.pid(1) != before[1], "only the killed one is replaced"
    note = cluster.notes[-1]
    assert f"process {before[1]})" in note and "Restarting the engine (1 of 3); no step is lost." in note
    assert cluster.pool.take_restarts() == 1
    assert cluster.pool.report().digests == cluster.weights(1).digests()


def test_an_engine_killed_in_a_weight_sync_is_loaded_from_the_start(cluster: Cluster, undisturbed: Any) -> None:
    second = cluster.weights(2)
    cluster.disturb(0, lambda: [cluster.pool.load_weights(second, policy_version=2)], kill)
    assert cluster.pool.report().digests == second.digests()
    found = cluster.pool.generate(REQUESTS, SAMPLING)
    assert {completion.policy_version for group in found for completion in group} == {2}
    assert [[c.behavior_logprobs for c in g] for g in found] == [[c.behavior_logprobs for c in g] for g in undisturbed]
    assert cluster.pool.take_restarts() == 1
    cluster.pool.load_weights(cluster.weights(1), policy_version=1)


def test_an_engine_that_hangs_is_ended_at_its_time_limit_and_replaced(
    cluster: Cluster, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = CONFIG.cluster.model_copy(update={"call_seconds": 1.0})
    hangs = cluster.engines[1]
    with monkeypatch.context() as patched:
        patched.setattr(hangs, "_config", CONFIG.model_copy(update={"cluster": limits}))
        stopped = cluster.pid(1)

        def patient(_pid: int) -> None:
            time.sleep(0.1)
            patched.setattr(hangs, "_config", CONFIG)

        assert cluster.disturb(1, lambda: cluster.pool.generate(REQUESTS, SAMPLING), patient) == undisturbed
    assert not runs(stopped)
    assert re.search(r"did not answer 'generate' within 1 seconds", cluster.notes[-1])
    assert cluster.pool.take_restarts() == 1
