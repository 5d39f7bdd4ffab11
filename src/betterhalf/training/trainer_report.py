"""The trainer's side of the contract, read from its live tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import transformers
from torch import Tensor, nn

from betterhalf.precision import coverage
from betterhalf.precision.contract import SideReport, tensor_digest
from betterhalf.precision.cpu_linear import CpuLinear
from betterhalf.precision.emulation import emulation_facts
from betterhalf.precision.formats import held_format, narrowest_format
from betterhalf.precision.roles import Precision
from betterhalf.training.weights.outgoing import OutgoingWeights
from betterhalf.training.weights.store import WeightStore


def side_report(
    *,
    module: nn.Module,
    weights: WeightStore,
    outgoing: OutgoingWeights,
    precision: Precision,
    optimizer: torch.optim.Optimizer,
    layers: Mapping[str, nn.Linear | CpuLinear],
    hidden: Tensor,
    logits: Tensor,
    facts: Mapping[str, str],
) -> SideReport:
    """Report formats, facts and digests of a trainer.

    Args:
        module: model that computes the policy.
        weights: store of its weights.
        outgoing: its weights as the engine gets them.
        precision: of the run.
        optimizer: of the masters.
        layers: name -> linear layer.
        hidden: [T, H], final hidden states of a pass.
        logits: [T, V], of the same pass.
        facts: further facts, with `attention` and `rounding` among them.
    """
    compute, wire = precision.roles.compute_dtype, precision.roles.wire_dtype
    digests: dict[str, str] = {}
    kinds: dict[str, Tensor] = {"compute": hidden, "lm_head": logits}
    for name, tensor in outgoing.computing():
        digests[name] = tensor_digest(tensor)
        kinds.setdefault("weights", tensor)
        if "norm" in name:
            kinds.setdefault("norm", tensor)
    kinds.setdefault("norm", hidden)
    _, wired = next(outgoing.on_the_wire(wire))
    _, kinds["gradients"] = next(weights.gradients())
    _, kinds["master"] = next(weights.trainable())
    kinds["rope"] = next((value for name, value in module.named_buffers() if "inv_freq" in name), hidden)
    states = (state["exp_avg"] for state in optimizer.state.values())
    kinds["optimizer"] = next(states, kinds["master"])
    linear = _linear(layers, weights)
    linear += coverage.expert_layers(module, weights.computing_dtype)
    return SideReport(
        side="trainer",
        dtypes={region: held_format(kinds[region], compute) for region in _REGIONS}
        | {"compute": narrowest_format(hidden), "wire": held_format(wired, wire)},
        facts={
            "attention": facts["attention"],
            "linear_layers": coverage.described(linear),
            "matmul_sums": coverage.layers_sum(linear),
            "rounding": facts["rounding"],
            **emulation_facts(compute),
            **{key: value for key, value in facts.items() if key not in ("attention", "rounding")},
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": str(precision.device),
        },
        digests=digests,
    )


def _linear(layers: Mapping[str, nn.Linear | CpuLinear], weights: WeightStore) -> list[coverage.LinearLayer]:
    """Return the layers with the dtypes in which they compute."""
    return [
        coverage.LinearLayer(layer=layer, dtype=weights.computing_dtype(f"{name}.weight"))
        for name, layer in layers.items()
    ]


_REGIONS = ("weights", "compute", "lm_head", "rope", "norm", "master", "gradients", "optimizer")
"""Regions of the report, in its order."""
