"""Weights broadcast by rank 0 to engines in processes of their own, under Ray; gloo stands in for NCCL on CPUs.

One session serves all tests, because its start and that of ranks and engines take some thirty seconds.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from betterhalf.cluster.trainer_group import TrainerGroup
from betterhalf.cluster.weight_versions import SentWeights
from betterhalf.config.schema import RunConfig, SamplingConfig
from betterhalf.errors import TrainerDiedError
from betterhalf.rollout.pool import EnginePool
from betterhalf.types import GenerateRequest

pytestmark = [
    pytest.mark.extra,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed; run scripts/install --ray"
    ),
]

LIMIT = 10.0
CONFIG = RunConfig.model_validate(
    {
        "precision": {"preset": "fp16"},
        "device": "cpu",
        "cluster": {"backend": "ray", "trainers": 2, "engines": 2, "collective_seconds": LIMIT, "call_seconds": 60.0},
    }
)
REQUESTS = [GenerateRequest(token_ids=(1, 10, 2, 12), group_size=2, key=(0, 1, index)) for index in range(4)]
SAMPLING = SamplingConfig(max_tokens=8)
PATIENCE = 120.0


@dataclass
class Cluster:
    """Two ranks and two engines in processes, joined by a broadcast."""

    trainer: TrainerGroup
    pool: EnginePool
    engines: tuple[Any, ...]

    def pid(self, process: Any) -> int:
        return int(re.search(r"process (\d+)", process.name).group(1))  # type: ignore[union-attr]

    def sync(self) -> SentWeights:
        stream = self.trainer.weight_stream()
        assert isinstance(stream, SentWeights)
        self.pool.load_weights(stream, policy_version=stream.policy_version)
        return stream

    def versions(self) -> set[int]:
        groups = self.pool.generate(REQUESTS, SAMPLING)
        return {completion.policy_version for group in groups for completion in group}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    from betterhalf.cluster.delivery import open_delivery
    from betterhalf.cluster.engine_process import start_engines
    from betterhalf.cluster.placement import placement_of
    from betterhalf.cluster.session import open_session

    # The one seam: the path that whole GPUs would take. Each end chooses gloo by its device.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunConfig, "transfer", property(lambda _config: "nccl"))
        session = open_session(CONFIG.cluster)
        try:
            placement = placement_of(CONFIG.cluster)
            session.place(placement)
            engines = start_engines(CONFIG, session, placement.engines)
            trainer = TrainerGroup(CONFIG, session, placement.ranks, keep_reference=False)
            delivery = open_delivery(CONFIG, trainer, engines)
            pool = EnginePool(engines, max_restarts=3, rollout_dtype="fp16", delivery=delivery)
            yield Cluster(trainer=trainer, pool=pool, engines=engines)
            pool.close()
            trainer.close()
        finally:
            session.close()


def in_time(act: Callable[[], Any], then: Callable[[], None]) -> Any:
    """Begin `act` in a thread, do `then` once it waits, and return the result or the error."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(act())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(1.0)
    assert thread.is_alive() and not found
    then()
    thread.join(PATIENCE)
    assert found, "no result in time"
    return found[0]


def test_every_engine_holds_the_bits_that_the_ranks_sent(cluster: Cluster) -> None:
    first = cluster.sync()
    assert cluster.pool.digests() == first.digests() == cluster.trainer.report().digests
    assert cluster.pool.report().digests == first.digests(), "compared over both engines"
    assert cluster.pool.report().facts["transfer"] == "NCCL broadcast from rank 0"
    assert cluster.versions() == {first.policy_version}
    assert cluster.sync().digests() == first.digests() and not first._parts, "nothing went through the store"


def test_an_engine_killed_in_the_middle_is_replaced_and_joins_the_next_sync(cluster: Cluster) -> None:
    expected = cluster.sync().digests()
    stopped = cluster.pid(cluster.engines[1])
    os.kill(stopped, signal.SIGSTOP)
    start = time.monotonic()
    stream = in_time(cluster.sync, lambda: os.kill(stopped, signal.SIGKILL))
    assert time.monotonic() - start < 6 * LIMIT
    assert isinstance(stream, SentWeights), stream
    assert cluster.pool.report().digests == expected
    assert "object store" in cluster.pool.report().facts["transfer"]
    assert cluster.pid(cluster.engines[1]) != stopped and cluster.pool.take_restarts() == 1
    assert cluster.versions() == {stream.policy_version}
    again = cluster.sync()
    assert cluster.pool.report().facts["transfer"] == "NCCL broadcast from rank 0" and not again._parts


def test_an_engine_that_hangs_in_the_middle_costs_the_time_limit(cluster: Cluster) -> None:
    """Rank 0 gives up before the other rank, which waits for it in a collective, loses patience."""
    cluster.sync()
    stopped = cluster.pid(cluster.engines[0])
    os.kill(stopped, signal.SIGSTOP)
    start = time.monotonic()
    stream = in_time(cluster.sync, lambda: (time.sleep(LIMIT + 2), os.kill(stopped, signal.SIGCONT))[0])
    assert time.monotonic() - start < 8 * LIMIT
    assert isinstance(stream, SentWeights), stream
    assert cluster.pool.report().digests == stream.digests()


def test_a_rank_killed_in_the_middle_is_an_error_of_the_trainer(cluster: Cluster) -> None:
    """Last, because the ranks are not started again here."""
    cluster.sync()
    stopped = cluster.pid(cluster.trainer.first)
    stream = cluster.trainer.weight_stream()
    os.kill(stopped, signal.SIGSTOP)
    load = cluster.pool.load_weights
    error = in_time(
        lambda: load(stream, policy_version=stream.policy_version), lambda: os.kill(stopped, signal.SIGKILL)
    )
    assert isinstance(error, TrainerDiedError) and "rank 0" in str(error)
