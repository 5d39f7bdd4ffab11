"""Where the engine rounds to half: every rounding point of the decoder, in both modes, is a method of this one object.

Activations live in a `container`: the rollout dtype itself, or, on a CPU whose half products have FP32 sums, FP32
tensors whose values lie on the half grid. Both hold the same numbers. docs/engines.md has the table of points.

An FP32 island has a Rounding of its own that rounds nothing but keys and values; `LayerRounding` says which part of a
layer uses which.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from betterhalf.kernels import fused
from betterhalf.precision.islands import Islands, LayerIslands
from betterhalf.types import RoundingMode


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """Element-wise steps of the decoder, each rounding where its mode says."""

    mode: RoundingMode
    dtype: torch.dtype
    """The grid: rollout dtype."""
    container: torch.dtype
    """dtype of the tensors that hold activations."""
    kv_dtype: torch.dtype
    """The grid of cached keys and values."""

    def in_fp32(self) -> Rounding:
        """What an FP32 island uses: the cache keeps its grid, nothing else rounds."""
        return replace(self, dtype=torch.float32, container=torch.float32)

    @property
    def exact(self) -> bool:
        """FP32: nothing rounds."""
        return self.dtype == torch.float32

    @property
    def widened(self) -> bool:
        """Half values in FP32 tensors."""
        return self.container != self.dtype

    @property
    def rounds_probabilities(self) -> bool:
        """Softmax probabilities go to half before they meet V: in production kernels and in the trainer's half
        kernels, but not in the trainer's attention with FP32 sums."""
        return not self.exact and (self.mode == "engine" or not self.widened)

    @property
    def aligned(self) -> bool:
        """Rounds where the trainer does."""
        return self.mode == "aligned" and not self.exact

    def round(self, x: Tensor) -> Tensor:
        """To the nearest value of the grid, in the container."""
        if self.exact:
            return x if x.dtype == self.container else x.to(self.container)
        return x.to(self.dtype).to(self.container)

    def to_kv(self, x: Tensor) -> Tensor:
        """Keys or values as the cache holds them; the container is kept."""
        if self.kv_dtype == self.dtype or self.kv_dtype == torch.float32:
            return x
        return x.to(self.kv_dtype).to(x.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last axis; `weight` is FP32. engine: rounded once. aligned: before and after the weight."""
        wide = x.float()
        if self.mode == "engine" and not self.exact:
            return self.round(F.rms_norm(wide, weight.shape, weight, eps))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return self.round(weight * self.round(normed))

    def rope_table(self, angles: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """FP32 cosine and sine of FP32 angles, [..., D/2] -> two of [..., D]. engine: FP32. aligned: on the grid.

        The first half of the sine is negated, so that a rotation is `x * cos + swapped(x) * sin`.
        """
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        if self.aligned:
            return cos.to(self.dtype).float(), sin.to(self.dtype).float()
        return cos, sin

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate heads: x [..., heads, D], cos and sin [..., 1, D]. engine: rounded once. aligned: products and sum."""
        first, second = x.chunk(2, -1)
        swapped = torch.cat((second, first), -1)
        if self.mode == "aligned":
            return self.round(self.round(x * cos) + self.round(swapped * sin))
        return self.round((x * cos).addcmul_(swapped, sin))

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of [..., 2 * width]. engine: FP32, rounded once. aligned: silu and product."""
        if fused(gate_up):
            # Imported here, as below: only where there is a GPU does it need Triton.
            from betterhalf.kernels import decoding

            return decoding.swiglu(gate_up, aligned=self.aligned)
        gate, up = gate_up.chunk(2, -1)
        if self.mode == "aligned":
            return self.round(self.round(F.silu(gate.float())) * up.float())
        return self.round(F.silu(gate.float()) * up)

    def probabilities(self, p: Tensor) -> Tensor:
        """FP32 softmax probabilities as they meet V; the result is FP32."""
        return p.to(self.dtype).float() if self.rounds_probabilities else p

    def add(self, residual: Tensor, branch: Tensor) -> Tensor:
        """The residual stream: one rounded sum in both modes."""
        return self.round(residual + branch)

    def norm_of_sum_on_gpu(
        self, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float, *, adder: Rounding, reader: Rounding
    ) -> tuple[Tensor, Tensor]:
        """`add` as `adder` rounds it, if there is a branch, and `rms_norm` of the sum, rounded again for who reads it,
        in one kernel: [T, H] each."""
        from betterhalf.kernels import decoding

        formats = {"stream": adder.container, "grid": self.container, "reader": reader.container}
        return decoding.add_norm(residual, branch, weight, eps, **formats, aligned=self.aligned)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRounding:
    """How each part of one layer rounds, in the order of computation; `LayerIslands` says what the parts are."""

    stream_in: Rounding
    attention: Rounding
    output: Rounding
    stream_mid: Rounding
    mlp: Rounding
    down: Rounding
    stream_out: Rounding


def layer_roundings(half: Rounding, islands: Islands) -> tuple[LayerRounding, ...]:
    """For each layer: `half` but for its FP32 islands and the residual stream from the first of them on."""
    choice = (half, half.in_fp32())
    parts = [field.name for field in fields(LayerIslands)]
    return tuple(LayerRounding(**{part: choice[getattr(layer, part)] for part in parts}) for layer in islands.layers)
