"""What the native engine reports for the precision contract, read from its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from betterhalf.config.schema import EngineConfig
from betterhalf.precision.contract import SideReport, weights_digests
from betterhalf.precision.formats import dtype_name
from betterhalf.precision.policy import PrecisionPolicy
from betterhalf.rollout.native.decoder import Decoder


def engine_report(decoder: Decoder, policy: PrecisionPolicy, config: EngineConfig) -> SideReport:
    """Formats, facts and weight digests of a decoder."""
    weights, rounding = decoder.weights, decoder.rounding
    held = weights.grid()
    return SideReport(
        side="engine",
        dtypes={
            "weights": held,
            "compute": dtype_name(rounding.dtype),
            "wire": dtype_name(weights.wire_dtype or policy.wire_dtype),
            "kv": dtype_name(rounding.kv_dtype),
            "lm_head": dtype_name(decoder.logits(_probe(decoder)).dtype),
            "rope": dtype_name(decoder.rope_dtype),
            "norm": held,
        },
        facts=_facts(decoder, policy, config),
        digests=weights_digests(weights.narrowed()),
    )


def _probe(decoder: Decoder) -> Tensor:
    """One hidden state of zeros."""
    hidden = decoder.config.hidden_size
    return torch.zeros(1, hidden, dtype=decoder.rounding.container, device=decoder.weights.norm.device)


def _facts(decoder: Decoder, policy: PrecisionPolicy, config: EngineConfig) -> dict[str, str]:
    rounding, on_cpu = decoder.rounding, policy.device.type == "cpu"
    return {
        "engine": f"native ({decoder.config.architecture})",
        "attention": "batched products in FP32" if on_cpu else "torch scaled_dot_product_attention",
        "matmul_sums": "fp32" if rounding.widened or rounding.exact else "native",
        "rounding": config.rounding,
        "kv_storage": "FP32 holding values of kv_dtype" if on_cpu else "kv_dtype",
        "torch": torch.__version__,
        "device": str(policy.device),
    }
