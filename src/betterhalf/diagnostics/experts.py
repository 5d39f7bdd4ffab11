"""Routing of a mixture of experts: comparison of the trainer's and the engine's choices, and balance of the load.

T tokens, L layers with experts, K experts for each token, E experts in a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayer:
    """Routing of a step in one layer with experts."""

    change_fraction: float | None
    """Share of tokens whose set of experts differs between trainer and engine; None if the engine reports none."""
    load: float
    """Tokens of the busiest expert, divided by an even load."""
    unused: int
    """Number of experts that no token chose."""


def changed_tokens(trainer_TLK: Tensor, engine_TLK: Tensor) -> Tensor:
    """Return bool [T, L], True where the set of experts differs; the order of a token's experts does not count.

    Args:
        trainer_TLK: integers [T, L, K], choices of the trainer's routers.
        engine_TLK: integers [T, L, K], choices of the engine's routers for the same tokens.
    """
    first, second = (experts.long().sort(-1).values for experts in (trainer_TLK, engine_TLK))
    return (first != second).any(-1)


def change_metrics(changed_TL: Tensor) -> dict[str, float]:
    """Return `experts/change_fraction/*` from `changed_tokens` of at least one token."""
    by_layer_L = changed_TL.double().mean(0)
    return {
        "experts/change_fraction/mean": float(by_layer_L.mean()),
        "experts/change_fraction/max_layer": float(by_layer_L.max()),
        "experts/change_fraction/any_layer": float(changed_TL.any(1).double().mean()),
    }


def load_metrics(counts_LE: Tensor) -> dict[str, float]:
    """Return `experts/load/*` and `experts/unused_fraction`; 1 is an even load.

    Args:
        counts_LE: integers [L, E], number of tokens that chose each expert; each layer has a token.
    """
    load_LE = counts_LE.double() / counts_LE.double().mean(1, keepdim=True)
    busiest_L = load_LE.max(1).values
    return {
        "experts/load/mean": float(busiest_L.mean()),
        "experts/load/max": float(busiest_L.max()),
        "experts/unused_fraction": float((counts_LE == 0).double().mean()),
    }


def expert_layers(counts_LE: Tensor, changed_TL: Tensor | None) -> tuple[ExpertLayer, ...]:
    """Return the routing in each layer.

    Args:
        counts_LE: as in `load_metrics`.
        changed_TL: result of `changed_tokens`; None if the engine does not report its experts.
    """
    load_L = (counts_LE.double() / counts_LE.double().mean(1, keepdim=True)).max(1).values.tolist()
    unused_L = (counts_LE == 0).sum(1).tolist()
    changes_L = [None] * len(load_L) if changed_TL is None else changed_TL.double().mean(0).tolist()
    return tuple(
        ExpertLayer(change_fraction=change, load=load, unused=unused)
        for change, load, unused in zip(changes_L, load_L, unused_L, strict=True)
    )


def expert_counts(experts_TLK: Tensor, num_experts: int) -> Tensor:
    """Return the number of tokens that chose each expert, int64 [L, E].

    Args:
        experts_TLK: integers [T, L, K].
        num_experts: E.
    """
    return torch.stack(
        [torch.bincount(layer.flatten().long(), minlength=num_experts) for layer in experts_TLK.unbind(1)]
    )


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the choices [T, L, K] of several packs, at least one, of one model."""
    return torch.cat([part.long() for part in parts])
