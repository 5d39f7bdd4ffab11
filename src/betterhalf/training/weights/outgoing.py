"""The weights as the engine gets them: named as in the model without adapters, which are merged or sent separately.

Without adapters these are the parameters of the store.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from betterhalf.config.lora import FULL
from betterhalf.config.schema import LoraConfig, PrecisionRoles
from betterhalf.models.adapter_names import plain_name, served_name
from betterhalf.models.adapters import AdaptedLinear, adapted_linears, with_fused
from betterhalf.models.expert_names import unfused
from betterhalf.precision.contract import NotedWeights, folded_digest, weights_digests
from betterhalf.precision.emulation import to_format
from betterhalf.precision.merge import MergeCount, merge_rows
from betterhalf.training.weights.store import WeightStore
from betterhalf.types import DtypeName


class OutgoingWeights:
    """Weights of a store for an engine. As in `WeightStore`, members that yield tensors are collective."""

    def __init__(
        self, module: nn.Module, weights: WeightStore, compute_dtype: DtypeName, lora: LoraConfig = FULL
    ) -> None:
        """Prepare the names; no weight is read yet.

        Args:
            module: with adapters, or without.
            weights: its store.
            compute_dtype: format of the trainer's passes.
            lora: form of the adapters in the engine.
        """
        self._lora = lora
        self._weights, self._compute_dtype = weights, compute_dtype
        self._names = tuple(name for name, _ in module.named_parameters())
        adapted = adapted_linears(module)
        self._adapted = {layer.base: layer for layer in adapted} if lora.merge == "weights" else {}
        beside = () if lora.merge == "weights" else adapted
        self._beside = {name: served_name(name) for layer in beside for name in (layer.down, layer.up)}
        inside = {name for layer in adapted for name in (layer.down, layer.up)}
        base = {name: plain_name(name) for name in self._names if name not in inside}
        self._frozen = base if adapted else {}
        """Parameter of the base -> name in the engine; empty without adapters."""
        self._served = base | self._beside if adapted else {}
        """Parameter -> name in the engine; empty without adapters."""
        changing = [layer.name for layer in self._adapted.values()] + list(self._beside.values())
        closed = with_fused(changing)
        self._constant = {key for key, name in self._frozen.items() if name not in closed}
        """Parameters that are the same in every version."""
        # For their names, whole shapes are enough; a shard of experts cannot be taken apart into its experts.
        shapes = {key: module.get_parameter(key).shape for key in self._names if key in self._constant}
        constant = ((self._frozen[key], torch.empty(shape, device="meta")) for key, shape in shapes.items())
        self.unchanging = frozenset(name for name, _ in unfused(constant))
        """Names of weights that are the same in every version."""
        self._known: dict[str, str] = {}
        """Digests of these in the rollout dtype, once they have been sent."""
        self._base_digest: str | None = None
        self.count: MergeCount | None = None
        """Result of the last whole `on_the_wire`; None before, and if nothing is merged."""

    def on_the_wire(self, wire_dtype: DtypeName, leave_out: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in the engine, weight rounded once to `wire_dtype`), one at a time.

        Args:
            wire_dtype: format of the weights.
            leave_out: names to leave out: none, or all of `unchanging`.
        """
        if not self._served:
            yield from self._weights.on_the_wire(wire_dtype)
            return
        counts = []
        for parameter, name in self._served.items():
            if leave_out and parameter in self._constant:
                continue
            layer = self._adapted.get(parameter)
            if layer is None:
                rows = to_format(self._weights.local(parameter), wire_dtype)
                yield from unfused([(name, self._weights.from_rows(parameter, rows))])
            else:
                merged, count = self._merged(layer, wire_dtype)
                counts.append(count)
                yield name, merged
        if counts:
            changed, lost = self._weights.add_over_ranks(torch.stack(counts).sum(0)).tolist()
            self.count = MergeCount(changed=changed, lost=lost)

    @torch.no_grad()
    def _merged(self, layer: AdaptedLinear, name: DtypeName) -> tuple[Tensor, Tensor]:
        weights = self._weights
        down = weights.from_rows(layer.down, weights.local(layer.down))
        rows, count = merge_rows(weights.local(layer.base), down, weights.local(layer.up), layer.scale, name)
        return weights.from_rows(layer.base, rows), count

    def computing(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in the engine, weight in the compute dtype), one at a time; engines in that dtype hold them."""
        if self._served:
            yield from self.on_the_wire(self._compute_dtype)
        else:
            yield from unfused(self._weights.computing())

    def stream(self, roles: PrecisionRoles, policy_version: int) -> NotedWeights:
        """Return the weights of this version, with the digest of each in the rollout dtype."""
        return NotedWeights(
            lambda leave_out: self.on_the_wire(roles.wire_dtype, leave_out),
            policy_version=policy_version,
            rollout_dtype=roles.rollout_dtype,
            unchanging=self.unchanging,
            known=self._known,
        )

    def base_digest(self) -> str:
        """Return a checksum of the frozen base in the compute dtype, computed once; empty without adapters."""
        if self._base_digest is None:
            frozen = (
                (name, self._weights.from_rows(key, self._weights.local(key))) for key, name in self._frozen.items()
            )
            self._base_digest = folded_digest(weights_digests(frozen)) if self._frozen else ""
        return self._base_digest

    def facts(self) -> dict[str, str]:
        """Return size and form of the adapters in the engine, for the contract; none without adapters."""
        if not self._frozen:
            return {}
        form = "served unmerged" if self._beside else "merged in fp32, rounded once"
        start = "" if self._lora.adapter is None else f"from {self._lora.adapter}, "
        return {"lora": f"rank {self._lora.rank}, scale {self._lora.scale:g}, {start}{form}"}
