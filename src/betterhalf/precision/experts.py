"""Layers of a mixture of experts under the precision rules: replacements for those of transformers.

`Router` computes its logits in FP32 from the half hidden states. `Experts` rounds where transformers' module does: the
results of both projections, the activation, and its product with the up projection. It differs in the sum over a
token's experts, which is an FP32 sum with FP32 weights, rounded once; transformers rounds weights, terms and partial
sums to half.

T tokens, E experts, K experts for each token, H hidden size, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from betterhalf.precision.cpu_linear import Widened, cpu_linear
from betterhalf.precision.grouped_products import grouped_product
from betterhalf.precision.roles import Precision
from betterhalf.precision.routing import (
    RoutingTape,
    by_expert,
    chosen_experts,
    combine,
    expert_weights,
    spread,
)
from betterhalf.precision.tiled_products import block_sizes

_FAMILIES = ("Qwen3Moe", "Qwen2Moe", "Olmoe", "FlexOlmo")
"""Prefixes of transformers' classes with 3-D experts and a router of softmax, top-k and optional normalisation."""
_ROUTERS = tuple(f"{family}TopKRouter" for family in _FAMILIES)
_EXPERTS = tuple(f"{family}Experts" for family in _FAMILIES)


class Projection(nn.Module):
    """A matrix of a router or of experts as a linear layer without values, to test and count its products."""

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        multiply: Callable[[Tensor, Tensor], Tensor],
        *,
        widens: bool,
        always_fp32: bool = False,
    ) -> None:
        """Describe the matrix.

        Args:
            shape: [out, in].
            device: device of the products.
            multiply: computes x @ weight^T of x [N, in] as the module does, differentiable.
            widens: half products have FP32 operands.
            always_fp32: the result is FP32 whatever the operands are.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, device=device).expand(shape))
        self.bias: None = None
        self.widens, self.always_fp32 = widens, always_fp32
        self._multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in] to [N, out]."""
        return self._multiply(x, self.weight)


class Router(nn.Module):
    """Replacement for a router of transformers: same parameter, same name, FP32 logits."""

    def __init__(self, router: Any, tape: RoutingTape, layer: int, *, tiled: bool) -> None:
        """Take over the parameter of `router`, without a copy.

        Args:
            router: module with `weight` [E, H], `top_k` and `norm_topk_prob`.
            tape: records the choices, or replaces them.
            layer: index among the layers with experts.
            tiled: compute rows independently of each other.

        Raises:
            InputError: `tiled` is set, and this processor cannot compute rows independently.
        """
        super().__init__()
        self.weight: nn.Parameter = router.weight
        self.top_k, self.normalise = int(router.top_k), bool(router.norm_topk_prob)
        self.layer, self.tiled, self._tape = layer, tiled, tape
        self._wide: Widened | None = None
        if tiled:
            block_sizes(*self.weight.shape, torch.get_num_threads())

    def weight_wide(self) -> Tensor:
        """Return the weight as float32 [E, H]."""
        if self.weight.dtype == torch.float32:
            return self.weight.detach()
        if self._wide is None or self._wide.source is not self.weight:
            self._wide = Widened(self.weight)
        return self._wide()

    def forget(self) -> None:
        """Widen the weight again in the next call; see `Widened.forget`."""
        if self._wide is not None:
            self._wide.forget()

    def projections(self) -> dict[str, list[Projection]]:
        """Return name of a parameter -> its matrices, as in `Experts.projections`."""

        def multiply(x: Tensor, weight: Tensor) -> Tensor:
            return cpu_linear(x, weight, None, weight.detach().float(), None, tiled=self.tiled, dtype=torch.float32)

        shape = int(self.weight.shape[0]), int(self.weight.shape[1])
        return {"weight": [Projection(shape, self.weight.device, multiply, widens=True, always_fp32=True)]}

    def logits(self, x: Tensor) -> Tensor:
        """Return router logits, float32 [T, E], of x [T, H]."""
        return cpu_linear(x, self.weight, None, self.weight_wide(), None, tiled=self.tiled, dtype=torch.float32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, float32 [T, E], and weights, float32, and indices of the experts, [T, K], of x [..., H]."""
        logits_TE = self.logits(x.reshape(-1, x.shape[-1]))
        experts_TK = self._tape.experts(self.layer, chosen_experts(logits_TE.detach(), self.top_k))
        return logits_TE, expert_weights(logits_TE, experts_TK, normalise=self.normalise), experts_TK


class Experts(nn.Module):
    """Replacement for experts of transformers in two 3-D parameters: same parameters, same names, FP32 sums."""

    def __init__(self, experts: Any, *, widens: bool, tiled: bool) -> None:
        """Take over the parameters of `experts`, without a copy.

        Args:
            experts: module with `gate_up_proj` [E, 2 I, H], `down_proj` [E, H, I] and `act_fn`.
            widens: half products have FP32 operands.
            tiled: compute rows independently of each other.

        Raises:
            InputError: `tiled` is set, and this processor cannot compute rows independently.
        """
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = experts.gate_up_proj, experts.down_proj, experts.act_fn
        self.widens, self.tiled = widens, tiled
        self._wide: dict[str, Widened] = {}
        if tiled:
            for weight in (self.gate_up_proj, self.down_proj):
                block_sizes(*weight.shape[1:], torch.get_num_threads())

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return int(self.gate_up_proj.shape[0])

    def projections(self) -> dict[str, list[Projection]]:
        """Return name of a parameter -> the matrices in it: gate and up, or down, of each expert."""

        def multiply(x: Tensor, weight: Tensor) -> Tensor:
            operand = weight.detach().float() if self.widens else weight.detach()
            return grouped_product(x, weight[None], operand[None], (x.shape[0],), tiled=self.tiled)

        _, hidden, width = self.down_proj.shape
        gate, down = (
            Projection(shape, self.down_proj.device, multiply, widens=self.widens)
            for shape in ((width, hidden), (hidden, width))
        )
        return {"gate_up_proj": [gate] * 2 * self.num_experts, "down_proj": [down] * self.num_experts}

    def _product(self, name: str, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        weight: nn.Parameter = getattr(self, name)
        return grouped_product(rows, weight, self._operand(name, weight), counts, tiled=self.tiled)

    def _operand(self, name: str, weight: nn.Parameter) -> Tensor:
        if weight.dtype == torch.float32 or not self.widens:
            return weight.detach()
        if name not in self._wide or self._wide[name].source is not weight:
            self._wide[name] = Widened(weight)
        return self._wide[name]()

    def forget(self) -> None:
        """Widen the weights again in the next call; see `Widened.forget`."""
        for wide in self._wide.values():
            wide.forget()

    def forward(self, x: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return the weighted sum of the results of each token's experts, [T, H], of x [T, H]."""
        count = experts_TK.shape[1]
        order, counts = by_expert(experts_TK, self.num_experts)
        gate, up = self._product("gate_up_proj", spread(x, order, count), counts).chunk(2, -1)
        results = self._product("down_proj", self.act_fn(gate) * up, counts)
        pairs = results[order.argsort()].view(x.shape[0], count, -1)
        return combine(pairs, weights_TK)


def is_replaced(part: nn.Module) -> bool:
    """Return whether `use_experts` replaces this module of transformers."""
    return type(part).__name__ in (*_ROUTERS, *_EXPERTS)


def use_experts(module: nn.Module, precision: Precision) -> RoutingTape | None:
    """Replace, in place, routers and experts of a mixture of experts; parameters and their names stay.

    Args:
        module: transformers model.
        precision: compute dtype, device and kind of half products.

    Returns:
        The tape of its routers; None without routers that this module knows.

    Raises:
        InputError: rows must be independent (`Precision.exact`), and this processor's are not.
    """
    tape, layers = RoutingTape(), 0
    widens = precision.fp32_sums(precision.roles.compute_dtype)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in _ROUTERS:
                setattr(parent, name, Router(child, tape, layers, tiled=precision.exact))
                layers += 1
            elif type(child).__name__ in _EXPERTS:
                setattr(parent, name, Experts(child, widens=widens, tiled=precision.exact))
    return tape if layers else None
