"""The native engine's report for the precision contract, read from its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from betterhalf.config.schema import NativeEngineConfig
from betterhalf.errors import EngineNumericsError
from betterhalf.precision import coverage
from betterhalf.precision.contract import SideReport, weights_digests
from betterhalf.precision.emulation import emulation_facts
from betterhalf.precision.formats import dtype_name, narrowest_format
from betterhalf.precision.products import packed
from betterhalf.precision.roles import Precision
from betterhalf.rollout.native.decoder import Decoder, linear
from betterhalf.rollout.native.mixture import is_router
from betterhalf.rollout.native.rounding import Rounding


def engine_report(decoder: Decoder, precision: Precision, config: NativeEngineConfig) -> SideReport:
    """Return formats, facts and weight digests of a decoder.

    Raises:
        EngineNumericsError: it computes NaN or infinity, which no format's grid contains.
    """
    weights = decoder.weights
    held, (hidden, cached) = weights.grid(), _probe(decoder)
    return SideReport(
        side="engine",
        dtypes={
            "weights": held,
            "compute": narrowest_format(hidden),
            "wire": weights.wire_format,
            "kv": narrowest_format(cached),
            "lm_head": dtype_name(decoder.logits(hidden).dtype),
            "rope": dtype_name(decoder.rope_dtype),
            "norm": held,
        },
        facts=_facts(decoder, precision, config),
        digests=weights_digests(weights.narrowed()),
    )


@torch.inference_mode()
def _probe(decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Run a short prompt and return its final hidden state, and its keys and values as cached."""
    count = min(8, decoder.weights.embedding.shape[0])
    decoder.reserve(count)
    hidden, cached = decoder.prefill(torch.arange(count, device=decoder.weights.norm.device), (count,))
    if not bool(hidden.isfinite().all()):
        name = decoder.rounding.format
        raise EngineNumericsError(
            f"the engine's hidden states are not finite in {name}: {decoder.weights.why_not_finite()}"
        )
    return hidden, cached


def _facts(decoder: Decoder, precision: Precision, config: NativeEngineConfig) -> dict[str, str]:
    on_cpu = precision.device.type == "cpu"
    return {
        "engine": f"native ({decoder.config.architecture})",
        "attention": _attention(decoder.rounding, on_cpu=on_cpu),
        **_linear_layers(decoder),
        "rounding": config.rounding,
        **emulation_facts(decoder.rounding.format, decoder.rounding.kv_format),
        "fp32_modules": decoder.islands.described(),
        "kv_storage": "FP32 holding values of kv_dtype" if on_cpu else "kv_dtype",
        "torch": torch.__version__,
        "device": str(precision.device),
    }


def _attention(rounding: Rounding, *, on_cpu: bool) -> str:
    if rounding.tiled:
        return "tiles in FP32, as the trainer's"
    return "batched products in FP32" if on_cpu else "torch over prompts, Triton over the cache"


def _linear_layers(decoder: Decoder) -> dict[str, str]:
    """Report the decoder's projections, unfused, and the format of their sums, from products of test weights."""
    half, islands, shapes = decoder.rounding, decoder.islands, {}
    kinds: list[coverage.LayerKind] = []
    for names, held in decoder.weights.projections():
        rounding = half.in_fp32() if islands.hold(names[0]) or is_router(names[0]) else half
        kinds += ["fp32" if rounding.exact else "widened" if rounding.widened else "native"] * len(names)
        shapes[held.shape, rounding.dtype, held.dtype] = rounding
    exact = [_sums_in_fp32(decoder, rounding, *key[::2]) for key, rounding in shapes.items()]
    return {"linear_layers": coverage.in_words(kinds), "matmul_sums": coverage.sums_in_words(exact)}


@torch.inference_mode()
def _sums_in_fp32(decoder: Decoder, rounding: Rounding, shape: torch.Size, held: torch.dtype) -> bool:
    """Return whether a projection of this shape, held in this dtype, sums in FP32."""
    storage = decoder.weights.storage

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(held)
        return linear(rounding, x.to(rounding.container), packed(weight) if storage.packs else weight, None)

    return coverage.sums_in_fp32(multiply, torch.empty(shape, dtype=rounding.dtype, device=storage.device))
