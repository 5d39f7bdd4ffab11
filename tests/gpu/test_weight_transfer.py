"""Weights reach vLLM and native engines on GPUs by NCCL and by CUDA IPC, bit for bit."""

from __future__ import annotations

import importlib.util
import multiprocessing
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from betterhalf.config.schema import ModelConfig, PrecisionConfig, RunConfig, VllmEngineConfig
from betterhalf.distributed.group import Membership, free_address
from betterhalf.models.loading import LoadedModel, load_model
from betterhalf.precision.contract import weights_digests
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.rollout.handles import handles_of, parts_of
from betterhalf.rollout.vllm.engine import VllmEngine
from betterhalf.rollout.vllm.nccl import NcclSender
from betterhalf.rollout.weight_group import GroupReceiver, GroupSender, layout_of
from betterhalf.types import TransferName

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

FIRST = torch.device("cuda", 0)
PRECISION = PrecisionConfig.model_validate({"preset": "fp16"})
Weights = list[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(ModelConfig(name="demo"))


def weights(demo: LoadedModel, shift: float = 0.0) -> Weights:
    return [(name, (one.detach() + shift).half().to(FIRST)) for name, one in demo.module.named_parameters()]


def places() -> tuple[Membership, Membership]:
    host, port = free_address()
    first, second = (Membership(rank=rank, world_size=2, host=host, port=port, seconds=120.0) for rank in range(2))
    return first, second


def vllm_engine(demo: LoadedModel, transfer: TransferName) -> VllmEngine:
    return VllmEngine(
        demo.hf_config,
        precision=build_precision(PRECISION, torch.device("cuda")),
        config=VllmEngineConfig(gpu_memory_utilization=0.2),
        stop_token_ids=demo.stop_token_ids,
        transfer=transfer,
        shares_device=transfer == "ipc",
    )


@pytest.fixture
def on_second_gpu(monkeypatch: pytest.MonkeyPatch, demo: LoadedModel) -> Iterator[VllmEngine]:
    torch.zeros(1, device=FIRST)  # this process has seen its GPUs; its children see the second one
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    engine = vllm_engine(demo, "nccl")
    yield engine
    engine.close()


@two_gpus
@needs_vllm
def test_vllm_receives_over_nccl(on_second_gpu: VllmEngine, demo: LoadedModel) -> None:
    engine, (first, second) = on_second_gpu, places()
    layout = layout_of(weights(demo))
    engine.prepare(layout)
    joining = threading.Thread(target=engine.join, args=(second,))
    joining.start()
    sender = NcclSender(first, FIRST, layout)
    joining.join()
    for version, shift in enumerate((0.0, 0.125)):
        sent = weights(demo, shift)
        sending = threading.Thread(target=sender.send, args=(sent,))
        sending.start()
        engine.receive(layout, policy_version=version)
        sending.join()
        assert engine.digests() == weights_digests(sent)
    engine.leave()
    sender.leave()


@two_gpus
@needs_vllm
def test_vllm_is_taken_out_of_a_broadcast_that_never_comes(on_second_gpu: VllmEngine, demo: LoadedModel) -> None:
    engine, (first, second) = on_second_gpu, places()
    sent = weights(demo)
    engine.prepare(layout_of(sent))
    joining = threading.Thread(target=engine.join, args=(second,))
    joining.start()
    sender = NcclSender(first, FIRST, layout_of(sent))
    joining.join()
    threading.Timer(5.0, engine.give_up).start()
    with pytest.raises(Exception, match="SIGKILL"):
        engine.receive(layout_of(sent), policy_version=0)
    sender.leave()
    engine.load_weights(iter(sent), policy_version=1)
    assert engine.digests() == weights_digests(sent)


@two_gpus
def test_rank_0_leaves_a_broadcast_that_nobody_receives(demo: LoadedModel) -> None:
    """A native engine that never receives: leaving from another thread frees the sender."""
    first, second = places()
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_never_receives, args=(second, ready, done))
    other.start()
    sender = GroupSender(first, FIRST, layout_of(weights(demo)))
    assert ready.wait(60)
    threading.Timer(5.0, sender.leave).start()
    with pytest.raises(RuntimeError):
        sender.send(weights(demo))
    done.set()
    other.join(30)


def _never_receives(place: Membership, ready: Any, done: Any) -> None:
    GroupReceiver(None, torch.device("cuda", 1)).join(place)  # type: ignore[arg-type]
    ready.set()
    done.wait(120)


@two_gpus
def test_a_native_engine_receives_over_nccl(demo: LoadedModel) -> None:
    first, second = places()
    sent = weights(demo)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply_async(_native_digests, (second, [(n, str(t.dtype), tuple(t.shape)) for n, t in sent]))
        GroupSender(first, FIRST, layout_of(sent)).send(sent)
        assert found.get(120) == weights_digests(sent)


def _native_digests(place: Membership, shapes: list[tuple[str, str, tuple[int, ...]]]) -> dict[str, str]:
    device = torch.device("cuda", 1)
    torch.cuda.set_device(device)
    demo = load_model(ModelConfig(name="demo"))
    config = RunConfig.model_validate({"precision": {"preset": "fp16"}})
    engine = build_engine(config, demo.hf_config, demo.stop_token_ids, build_precision(PRECISION, device))
    receiver = GroupReceiver(engine, device)
    receiver.join(place)
    layout = layout_of((name, torch.empty(shape, dtype=torch.float16)) for name, _, shape in shapes)
    receiver.receive(layout, policy_version=0)
    return engine.digests()


@needs_vllm
def test_vllm_reads_handles_of_another_process(demo: LoadedModel) -> None:
    engine = vllm_engine(demo, "ipc")
    try:
        for version, shift in enumerate((0.0, 0.125)):
            sent = weights(demo, shift)
            engine.prepare(layout_of(sent))
            engine.begin_update()
            for part in parts_of(sent):
                engine.update(handles_of(part, FIRST))
            engine.finish_update(torch.float16, policy_version=version)
            assert engine.digests() == weights_digests(sent)
            engine.sleep()
            engine.wake()
            assert engine.digests() == weights_digests(sent), "kept while it sleeps"
    finally:
        engine.close()
