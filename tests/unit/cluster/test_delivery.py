"""Weights reach the engines by a broadcast bit for bit, and every failure ends in time and at the object store.

Ranks and engines are the real ones, as threads; gloo stands in for NCCL, which the configuration would ask for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from tests.thread_processes import ThreadProcess, ThreadSession, stand_in_store

from betterhalf.cluster.delivery import Broadcast, Courier, Handles, StoreOnly
from betterhalf.cluster.engine_process import start_engines
from betterhalf.cluster.placement import placement_of
from betterhalf.cluster.trainer_group import TrainerGroup
from betterhalf.cluster.weight_versions import SentWeights
from betterhalf.config.schema import RunConfig, SamplingConfig
from betterhalf.errors import EngineError, TrainerDiedError, WeightSyncError
from betterhalf.rollout import handles
from betterhalf.rollout.pool import EnginePool
from betterhalf.rollout.weight_group import GroupReceiver, GroupSender
from betterhalf.types import GenerateRequest

LIMIT = 8.0
"""Time limit of a broadcast where a test exceeds it, in seconds; gloo cannot be interrupted before."""


def configured(collective_seconds: float) -> RunConfig:
    cluster = {"backend": "ray", "engines": 2, "collective_seconds": collective_seconds}
    return RunConfig.model_validate({"precision": {"preset": "fp16"}, "device": "cpu", "cluster": cluster})


CONFIG, SHORT = configured(60.0), configured(2 * LIMIT)
REQUESTS = [GenerateRequest(token_ids=(1, 10, 2, 12), group_size=2, key=(0, 1, index)) for index in range(4)]
SAMPLING = SamplingConfig(max_tokens=6)


class Sides:
    """One rank and two engines, and the pool over a broadcast."""

    def __init__(self, session: ThreadSession, config: RunConfig = CONFIG) -> None:
        self.notes: list[str] = []
        self.session = session
        placement = placement_of(config.cluster)
        self.trainer = TrainerGroup(config, session, placement.ranks, keep_reference=False)  # type: ignore[arg-type]
        # The path that GPUs would take.
        self.trainer._config = _sending(config)
        self.engines = start_engines(config, session, placement.engines)  # type: ignore[arg-type]
        courier = Courier(Broadcast(config, self.trainer), "broadcast", self.engines, self.notes.append)
        self.pool = EnginePool(
            self.engines, max_restarts=3, rollout_dtype="fp16", tell=self.notes.append, delivery=courier
        )

    @property
    def rank(self) -> Any:
        process = self.trainer.first
        assert isinstance(process, ThreadProcess)
        return process

    def engine(self, index: int) -> Any:
        process = self.engines[index].process
        assert isinstance(process, ThreadProcess)
        return process

    def sync(self) -> SentWeights:
        stream = self.trainer.weight_stream()
        assert isinstance(stream, SentWeights)
        self.pool.load_weights(stream, policy_version=stream.policy_version)
        return stream

    def update(self, amount: float = 0.01) -> None:
        """Change every weight, as an optimizer step would."""
        for _, master in self.rank.object._trainer.weights.trainable():
            master.data.add_(amount)
        self.rank.object._trainer.weights.publish()
        self.rank.object._trainer.policy_version += 1


def _sending(config: RunConfig) -> Any:
    class Sending:
        transfer = "nccl"

        def __getattr__(self, name: str) -> Any:
            return getattr(config, name)

    return Sending()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    return stand_in_store(monkeypatch)


@pytest.fixture
def make(store: dict[int, Any]) -> Iterator[Callable[..., Sides]]:
    with ExitStack() as stack:

        def build(config: RunConfig = CONFIG) -> Sides:
            session = ThreadSession()
            stack.callback(session.close)
            return Sides(session, config)

        yield build


def held(sides: Sides, index: int) -> dict[str, str]:
    found: dict[str, str] = sides.engine(index).object._engine.digests()
    return found


# -- the broadcast


def test_weights_arrive_bit_for_bit_in_every_sync_and_pass_no_store(
    make: Callable[..., Sides], store: dict[int, Any]
) -> None:
    sides = make()
    seen = []
    for version in range(3):
        stream = sides.sync()
        assert stream.policy_version == version and stream.num_bytes > 0
        assert held(sides, 0) == held(sides, 1) == stream.digests() == sides.pool.digests()
        seen.append(stream.digests())
        assert {one.policy_version for group in sides.pool.generate(REQUESTS, SAMPLING) for one in group} == {version}
        sides.update()
    assert seen[0] != seen[1] != seen[2]
    assert not store and not sides.notes
    assert sides.engine(0).calls.count("join") == 1, "one group serves all syncs"
    assert sides.pool.report().facts["transfer"] == "broadcast"


def test_an_engine_that_is_replaced_loads_from_the_store_and_joins_the_next_broadcast(
    make: Callable[..., Sides], store: dict[int, Any]
) -> None:
    sides = make()
    stream = sides.sync()
    expected = sides.pool.generate(REQUESTS, SAMPLING)
    sides.engine(1).end()
    assert sides.pool.generate(REQUESTS, SAMPLING) == expected
    assert store and sides.engine(1).calls == ["ready", "load_weights", "generate"]
    assert held(sides, 1) == stream.digests()
    sides.update()
    stored = len(store)
    assert sides.sync().digests() == held(sides, 0) == held(sides, 1)
    assert len(sides.notes) == 1, sides.notes
    assert len(store) == stored and sides.engine(1).calls[-4:] == ["leave", "prepare", "join", "receive"]


def test_the_copy_is_kept_where_sampling_overlaps_learning(make: Callable[..., Sides], store: dict[int, Any]) -> None:
    config = CONFIG.model_copy(update={"pipeline": CONFIG.pipeline.model_copy(update={"max_staleness": 1})})
    sides = make(config)
    stream = sides.sync()
    expected = sides.pool.generate(REQUESTS, SAMPLING)
    assert store, "the trainer may move on at any time"
    sides.update()
    sides.engine(0).end()
    assert sides.pool.generate(REQUESTS, SAMPLING) == expected
    assert held(sides, 0) == stream.digests()


def test_weights_that_the_trainer_has_left_behind_are_lost(make: Callable[..., Sides]) -> None:
    sides = make()
    sides.sync()
    sides.update()
    sides.engine(0).end()
    with pytest.raises(TrainerDiedError, match="policy version 0 are lost: the trainer holds version 1"):
        sides.pool.generate(REQUESTS, SAMPLING)


# -- failures


def test_an_engine_that_ends_in_the_middle_is_given_up_in_time(
    make: Callable[..., Sides], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others have the store's copy, and the next sync is a broadcast again."""
    sides = make(SHORT)
    sides.sync()
    sides.update()
    victim = sides.engine(1)
    stuck = threading.Event()
    arriving = GroupReceiver._arriving

    def stops(self: GroupReceiver, group: Any, layout: Any) -> Any:
        for count, pair in enumerate(arriving(self, group, layout)):
            if self is victim.object._receiver and count == 3:
                victim.end()
                stuck.wait(60)
            yield pair

    monkeypatch.setattr(GroupReceiver, "_arriving", stops)
    start = time.monotonic()
    stream = sides.sync()
    assert time.monotonic() - start < 8 * LIMIT
    stuck.set()
    assert held(sides, 0) == held(sides, 1) == stream.digests()
    assert sides.engine(1) is not victim and sides.pool.take_restarts() == 1
    assert "could not be sent by broadcast: engine 1 ended\nThe object store is used for this" in sides.notes[0]
    assert sides.pool.report().facts["transfer"] == "object store, because broadcast failed"
    sides.update()
    assert sides.sync().digests() == held(sides, 0) == held(sides, 1)
    assert sides.engine(1).calls.count("receive") == 1 and len(sides.notes) == 2
    assert sides.pool.report().facts["transfer"] == "broadcast"


def test_an_engine_that_does_not_receive_ends_at_the_time_limit(
    make: Callable[..., Sides], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = make(SHORT)
    sides.sync()
    sides.update()
    receiver = sides.engine(0).object._receiver
    receive = receiver.receive

    def late(layout: Any, *, policy_version: int) -> None:
        time.sleep(LIMIT + 2)
        receive(layout, policy_version=policy_version)

    monkeypatch.setattr(receiver, "receive", late)
    start = time.monotonic()
    stream = sides.sync()
    assert time.monotonic() - start < 8 * LIMIT
    assert held(sides, 0) == held(sides, 1) == stream.digests()
    assert len(sides.notes) == 1 and sides.pool.take_restarts() == 0


def test_after_two_failures_the_store_takes_over_with_a_last_note(
    make: Callable[..., Sides], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = make(SHORT)

    def fails(self: GroupSender, weights: Any) -> None:
        raise RuntimeError("no such interface")

    monkeypatch.setattr(GroupSender, "send", fails)
    for _ in range(4):
        stream = sides.sync()
        assert held(sides, 0) == held(sides, 1) == stream.digests()
        sides.update()
    assert ["for this weight sync" in note for note in sides.notes] == [True, False]
    assert "rank 0 could not send: RuntimeError: no such interface" in sides.notes[1]
    assert "for the rest of the run" in sides.notes[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, tensor: ("unknown", tensor), "the engine has no weight 'unknown'"),
        (lambda name, tensor: (name, tensor[:-1]), r"weight 'model\.norm\.weight' has shape"),
    ],
)
def test_a_wrong_name_or_shape_is_refused_by_the_engine(
    make: Callable[..., Sides], monkeypatch: pytest.MonkeyPatch, change: Any, words: str
) -> None:
    sides = make(SHORT)
    store = sides.rank.object._trainer.weights
    real = store.on_the_wire
    monkeypatch.setattr(
        store,
        "on_the_wire",
        lambda dtype: (change(n, t) if n == "model.norm.weight" else (n, t) for n, t in real(dtype)),
    )
    with pytest.raises(EngineError, match=words):
        sides.sync()
    assert len(sides.notes) == 1
    with pytest.raises(EngineError, match="hold no weights"):
        sides.pool.generate(REQUESTS, SAMPLING)


def test_a_weight_that_is_missing_in_the_middle_ends_in_time(
    make: Callable[..., Sides], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = make(SHORT)
    sides.sync()
    weights = sides.rank.object._trainer.weights
    real = weights.on_the_wire
    with monkeypatch.context() as patched:
        patched.setattr(
            weights, "on_the_wire", lambda dtype: ((n, t) for n, t in real(dtype) if n != "model.norm.weight")
        )
        start = time.monotonic()
        with pytest.raises(EngineError, match=r"'model\.norm\.weight'"):
            sides.sync()
        assert time.monotonic() - start < 8 * LIMIT
    assert "'lm_head.weight' was sent where the engines expect WireWeight(name='model.norm.weight'" in sides.notes[0]
    assert sides.sync().digests() == held(sides, 0) == held(sides, 1)


def test_bits_that_change_on_the_way_are_an_error(make: Callable[..., Sides], monkeypatch: pytest.MonkeyPatch) -> None:
    sides = make(SHORT)
    arriving = GroupReceiver._arriving

    def flips(self: GroupReceiver, group: Any, layout: Any) -> Any:
        for name, tensor in arriving(self, group, layout):
            if self is sides.engine(1).object._receiver and name == "model.norm.weight":
                tensor[0] += 1
            yield name, tensor

    monkeypatch.setattr(GroupReceiver, "_arriving", flips)
    with pytest.raises(WeightSyncError, match=r"engine 1: .*the first is model\.norm\.weight"):
        sides.sync()


def test_a_rank_that_ends_is_an_error_of_the_trainer(make: Callable[..., Sides]) -> None:
    sides = make(SHORT)
    sides.sync()
    stream = sides.trainer.weight_stream()
    sides.rank.end()
    start = time.monotonic()
    with pytest.raises(TrainerDiedError):
        sides.pool.load_weights(stream, policy_version=stream.policy_version)
    assert time.monotonic() - start < 8 * LIMIT


# -- handles


class HandleEngine:
    """An engine that reads handles, which are tensors here."""

    def __init__(self, gpu: str) -> None:
        self.gpu = gpu
        self.held: dict[str, Any] = {}
        self.calls: list[str] = []
        self.fails_in = ""

    def call(self, method: str, *arguments: Any, seconds: float) -> Any:
        process = ThreadProcess(self, "engine", EngineError)
        answer = process.call(method, *arguments)
        self.calls.append(method)
        return answer

    def prepare(self, layout: Any, model_config: Any) -> None: ...

    def begin_update(self) -> None:
        self.held = {}

    def update(self, info: dict[str, Any]) -> None:
        if self.fails_in == "update":
            raise EngineError("no such handle")
        self.held |= {name: one[self.gpu] for name, one in zip(info["names"], info["ipc_handles"], strict=True)}

    def finish_update(self, wire_dtype: torch.dtype, policy_version: int) -> dict[str, str]:
        return dict.fromkeys(self.held, "d")

    def abandon_update(self) -> None:
        self.held = {}


def test_each_engine_reads_the_handles_of_its_own_gpu(
    make: Callable[..., Sides], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = make()
    monkeypatch.setattr(handles, "_AT_ONCE", 2**16)
    monkeypatch.setattr("betterhalf.cluster.weight_outbox.handles_of", lambda part, device: update_of(part, "gpu0"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: threading.Barrier(1))
    monkeypatch.setattr(threading.Barrier, "synchronize", lambda self: None, raising=False)
    engine: Any = HandleEngine("gpu0")
    sent = sides.trainer.weight_stream()
    assert isinstance(sent, SentWeights)
    (found,) = Handles(CONFIG, sides.trainer).send(sent, [engine])
    assert found.keys() == sent.digests().keys() == engine.held.keys()
    assert engine.calls.count("update") > 1
    real = sides.rank.object._trainer.weights.on_the_wire("fp16")
    assert all(torch.equal(engine.held[name], tensor) for name, tensor in real)
    engine.fails_in = "update"
    with pytest.raises(EngineError, match="no such handle"):
        Handles(CONFIG, sides.trainer).send(sent, [engine])
    assert engine.calls[-1] == "abandon_update"
    engine.fails_in = ""
    assert Handles(CONFIG, sides.trainer).send(sent, [engine]) == [found], "the ranks start again at the first weight"


def update_of(part: list[tuple[str, torch.Tensor]], gpu: str) -> dict[str, Any]:
    return {"names": [name for name, _ in part], "ipc_handles": [{gpu: tensor} for _, tensor in part]}


def test_handles_of_several_gpus_become_one_update() -> None:
    weights = [("a", torch.zeros(1)), ("b", torch.ones(1))]
    both = handles.merged([update_of(weights, "gpu0"), update_of(weights, "gpu1")])
    assert both["names"] == ["a", "b"] and [list(one) for one in both["ipc_handles"]] == [["gpu0", "gpu1"]] * 2


def test_the_object_store_alone_delivers_nothing() -> None:
    assert StoreOnly().deliver(None, [0, 1]) == {}  # type: ignore[arg-type]
    assert StoreOnly().path == "object store"
