"""Transfer of weights to the child."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from betterhalf.errors import EngineError
from betterhalf.rollout import handles
from betterhalf.rollout.vllm import transfer

SHAPES = {"a.weight": (2, 3), "b.bias": (3,)}


def weights() -> dict[str, Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(3)}


def test_all_weights_pass_and_a_tied_head_is_left_out() -> None:
    sent = [*weights().items(), ("lm_head.weight", torch.zeros(1))]
    assert [name for name, _ in transfer.checked(sent, SHAPES)] == ["a.weight", "b.bias"]


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ([("c", torch.zeros(1))], "the engine has no weight 'c'"),
        ([("b.bias", torch.ones(3)), ("b.bias", torch.ones(3))], "weight 'b.bias' arrived twice"),
        ([("b.bias", torch.ones(4))], r"weight 'b.bias' has shape \(4,\), the engine's has \(3,\)"),
        ([("b.bias", torch.ones(3))], "1 weights did not arrive at the engine, 'a.weight' among them"),
    ],
)
def test_wrong_weights_are_refused_by_name(sent: list[tuple[str, Tensor]], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        list(transfer.checked(sent, SHAPES))


def test_a_file_holds_every_weight_while_it_is_loaded_and_is_gone_after() -> None:
    paths: list[Path] = []

    def ask(verb: str, path: str) -> None:
        assert verb == "load_file"
        loaded = load_file(path)
        assert torch.equal(loaded["a.weight"], weights()["a.weight"].T.contiguous())
        paths.append(Path(path))

    dtype = transfer.send_file(ask, [("a.weight", weights()["a.weight"].T), ("b.bias", torch.ones(3))])
    assert dtype == torch.float32
    assert not paths[0].exists() and not paths[0].parent.exists()


def test_a_full_shared_memory_is_avoided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transfer, "_SHARED_MEMORY", tmp_path)
    assert transfer._folder_for(1) == tmp_path
    assert transfer._folder_for(10**18) is None
    monkeypatch.setattr(transfer, "_SHARED_MEMORY", tmp_path / "absent")
    assert transfer._folder_for(1) is None


class Gpu:
    uuid = "GPU-1"


def test_handles_travel_in_parts_between_begin_and_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(handles, "_AT_ONCE", 16)
    monkeypatch.setattr(handles, "reduce_tensor", lambda tensor: (None, ("handle", tuple(tensor.shape))))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu())
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: asked.append(("collect", {})))
    dtype = transfer.send_handles(
        lambda verb, **values: asked.append((verb, values)), weights().items(), torch.device("cuda")
    )
    assert dtype == torch.float32
    assert [verb for verb, _ in asked] == ["begin_update", "update", "update", "finish_update", "collect"]
    assert asked[1][1]["info"] == {
        "names": ["a.weight"],
        "dtype_names": ["float32"],
        "shapes": [[2, 3]],
        "ipc_handles": [{"GPU-1": ("handle", (2, 3))}],
    }


@pytest.mark.gpu
def test_a_handle_opens_in_another_process() -> None:
    """CUDA IPC with the same handles from which vLLM's receiver rebuilds tensors."""
    import multiprocessing

    tensor = torch.arange(8.0, device="cuda")
    ((handle,),) = (one.values() for one in handles.handles_of([("a", tensor)], tensor.device)["ipc_handles"])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_rebuilt_sum, (handle,)) == 28.0


def _rebuilt_sum(arguments: tuple[Any, ...]) -> float:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    return float(rebuild_cuda_tensor(*arguments).sum())
