"""Blocks of experts of the native engine on a CPU: router in FP32, products grouped by expert.

Experts are chosen, weighted and summed by the trainer's functions (`precision.routing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from betterhalf.precision.products import product
from betterhalf.precision.routing import RoutingTape, by_expert, chosen_experts, combined, expert_weights
from betterhalf.precision.tiled_products import tiled_product
from betterhalf.rollout.native.fused_parameter import FusedParameter, Operand
from betterhalf.rollout.native.rounding import Rounding

Project = Callable[[Tensor, Tensor], Tensor]
"""(rows [N, in], weight [out, in]) -> results [N, out], rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Experts of a decoder."""

    num_experts: int
    """Experts in each layer that has any, E."""
    per_token: int
    """Experts that compute each token, K."""
    width: int
    """Width of an expert, I."""
    normalise: bool
    """True if the weights of a token's experts are divided by their sum."""
    layers: tuple[int | None, ...]
    """Index of each layer among those with experts; None for a layer with an ordinary MLP."""

    @property
    def num_layers(self) -> int:
        """Number of layers with experts."""
        return sum(place is not None for place in self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Weights of one block of experts, as `LayerWeights` holds projections."""

    router: Tensor
    """Router [E, hidden], FP32 values on the rollout grid."""
    gate_up: tuple[Tensor, ...]
    """Gate and up projections of each expert [2 I, hidden]."""
    down: tuple[Tensor, ...]
    """Down projection of each expert [hidden, I]."""


def read_mixture(hf_config: Any) -> Mixture | None:
    """Return the experts of a transformers configuration like Qwen3-MoE's; None if no layer has any."""
    has_experts = [
        index not in hf_config.mlp_only_layers and (index + 1) % hf_config.decoder_sparse_step == 0
        for index in range(hf_config.num_hidden_layers)
    ]
    if not any(has_experts) or not hf_config.num_experts:
        return None
    places = accumulate(has_experts)
    return Mixture(
        num_experts=hf_config.num_experts,
        per_token=hf_config.num_experts_per_tok,
        width=hf_config.moe_intermediate_size,
        normalise=bool(hf_config.norm_topk_prob),
        layers=tuple(place - 1 if has else None for has, place in zip(has_experts, places, strict=True)),
    )


# -- weights

_ROUTER = "router"


def expert_parameters(
    mixture: Mixture,
    prefix: str,
    hidden: int,
    allocate: Callable[[Mapping[str, int], int], FusedParameter],
    router: Callable[[Mapping[str, int], int], FusedParameter],
) -> dict[str, FusedParameter]:
    """Return the parameters of one block by keys that `expert_weights` reads.

    Args:
        mixture: sizes of the mixture of experts.
        prefix: prefix of the block's names, such as `model.layers.0.mlp.`.
        hidden: width of the residual stream.
        allocate: (name -> rows, columns) -> storage of matrices that are the right side of one product.
        router: the same in FP32.
    """
    parameters = {_ROUTER: router({f"{prefix}gate.weight": mixture.num_experts}, hidden)}
    for expert in range(mixture.num_experts):
        name = f"{prefix}experts.{expert}."
        gate_up = {f"{name}{part}_proj.weight": mixture.width for part in ("gate", "up")}
        parameters[f"gate_up.{expert}"] = allocate(gate_up, hidden)
        parameters[f"down.{expert}"] = allocate({f"{name}down_proj.weight": hidden}, mixture.width)
    return parameters


def expert_operands(held: Mapping[str, Operand]) -> ExpertWeights | None:
    """Return the operands of a block from those of its layer by key; None for a layer with an ordinary MLP."""
    if _ROUTER not in held:
        return None
    plain = {key: operand for key, operand in held.items() if isinstance(operand, Tensor)}
    count = sum(key.startswith("down.") for key in plain)
    return ExpertWeights(
        router=plain[_ROUTER],
        gate_up=tuple(plain[f"gate_up.{expert}"] for expert in range(count)),
        down=tuple(plain[f"down.{expert}"] for expert in range(count)),
    )


def is_router(name: str) -> bool:
    """Return whether a parameter of this Hugging Face name is a router, which computes in FP32."""
    return name.endswith(".mlp.gate.weight")


# -- computation


def mix_experts(
    x: Tensor,
    weights: ExpertWeights,
    mixture: Mixture,
    place: int,
    *,
    rounding: Rounding,
    project: Project,
    activate: Callable[[Tensor], Tensor],
    tape: RoutingTape,
) -> Tensor:
    """Return the weighted sum of the results of each token's experts, rounded once.

    Args:
        x: normed hidden states [T, hidden].
        weights: weights of the block.
        mixture: sizes of the mixture of experts.
        place: index of the layer among those with experts.
        rounding: rounding of the block.
        project: multiplies by a weight and rounds.
        activate: (gate and up [N, 2 I]) -> activation(gate) * up [N, I].
        tape: records the choice of experts.

    Returns:
        [T, hidden] in the container.
    """
    multiply = tiled_product if rounding.tiled else product
    logits_TE = multiply(x.float(), weights.router)
    experts_TK = tape.experts(place, chosen_experts(logits_TE, mixture.per_token))
    order, counts = by_expert(experts_TK, mixture.num_experts)
    rows = x[order.div(mixture.per_token, rounding_mode="floor")]
    results = torch.empty_like(rows)
    for expert, (start, stop) in enumerate(pairwise(accumulate(counts, initial=0))):
        if stop > start:
            gate_up = project(rows[start:stop], weights.gate_up[expert])
            results[start:stop] = project(activate(gate_up), weights.down[expert])
    pairs = results[order.argsort()].view(x.shape[0], mixture.per_token, -1)
    shares = expert_weights(logits_TE, experts_TK, normalise=mixture.normalise)
    return rounding.round(combined(pairs, shares))
