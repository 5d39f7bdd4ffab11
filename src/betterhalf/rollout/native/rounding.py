"""Rounding points of the native engine: a method of `Rounding` for each, in all modes.

Activations are stored in a `container`: the rollout dtype itself, or, on a CPU whose half products have FP32 sums, FP32
tensors whose values are on the half grid. Both hold the same numbers. docs/engines.md has the table of points. An
emulated format has the same points and containers as BF16.

An FP32 island has its own `Rounding`, which rounds keys and values only; `LayerRounding` assigns one to each part of a
layer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from betterhalf.kernels import fused
from betterhalf.precision.cpu_activations import gelu_tanh, silu
from betterhalf.precision.emulation import to_format
from betterhalf.precision.formats import is_emulated, torch_dtype
from betterhalf.precision.islands import Islands, LayerIslands
from betterhalf.rollout.native.families import Activation, NormKind
from betterhalf.types import DtypeName, RoundingMode


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """Element-wise operations of the decoder, which round where the mode says."""

    mode: RoundingMode
    """`engine` rounds where production engines do, `aligned` where the trainer does; `exact` rounds as `aligned`."""
    format: DtypeName
    """Grid of activations: the rollout dtype."""
    container: torch.dtype
    """dtype of the tensors that hold activations."""
    kv_format: DtypeName
    """Grid of cached keys and values."""

    @property
    def dtype(self) -> torch.dtype:
        """torch dtype of `format`."""
        return torch_dtype(self.format)

    @property
    def kv_dtype(self) -> torch.dtype:
        """torch dtype of `kv_format`."""
        return torch_dtype(self.kv_format)

    def in_fp32(self) -> Rounding:
        """Return the rounding of an FP32 island: the cache keeps its grid, nothing else rounds."""
        return replace(self, format="fp32", container=torch.float32)

    @property
    def exact(self) -> bool:
        """True in FP32, where nothing rounds."""
        return self.dtype == torch.float32

    @property
    def widened(self) -> bool:
        """True if FP32 tensors hold half values."""
        return self.container != self.dtype

    @property
    def rounds_probabilities(self) -> bool:
        """True if softmax probabilities are rounded to half before their product with V.

        Production kernels and the trainer's half kernels do this; the trainer's attention with FP32 sums does not.
        """
        return not self.exact and (self.mode == "engine" or not self.widened)

    @property
    def aligned(self) -> bool:
        """True if half values are rounded where the trainer rounds them."""
        return self.mode != "engine" and not self.exact

    @property
    def tiled(self) -> bool:
        """True if products and attention are computed by the trainer's functions, independently of the batch."""
        return self.mode == "exact"

    def round(self, x: Tensor) -> Tensor:
        """Round to the nearest value of the grid; the result is in the container."""
        return to_format(x, self.format, self.container)

    @property
    def rounds_products(self) -> bool:
        """True if a product's result is not on the grid yet: it has FP32 sums, or the format is emulated."""
        return self.widened or is_emulated(self.format)

    def to_kv(self, x: Tensor) -> Tensor:
        """Round keys or values to the grid of the cache; their dtype is kept."""
        if self.kv_format in (self.format, "fp32"):
            return x
        return to_format(x, self.kv_format).to(x.dtype)

    def embedding(self, rows: Tensor, scale: float, *, rounds_scale: bool) -> Tensor:
        """Multiply embeddings [..., H] by `scale`, and round once; with `rounds_scale`, `scale` is rounded first."""
        x = rows.to(self.container)
        if scale == 1.0:
            return x
        if rounds_scale:
            scale = float(to_format(torch.tensor(scale), self.format))
        return self.round(x.float() * scale)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, kind: NormKind = "llama") -> Tensor:
        """Apply RMSNorm over the last axis; `weight` is FP32.

        engine: rounded once. aligned: rounded before and after the weight, or once, as `kind` says.
        """
        wide = x.float()
        factor = weight + 1 if kind == "one_plus" else weight
        if self.mode == "engine" and not self.exact:
            return self.round(F.rms_norm(wide, factor.shape, factor, eps))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return self.round(factor * (self.round(normed) if kind == "llama" else normed))

    def rope_table(self, angles: Tensor, scaling: float, *, in_fp32: bool = False) -> tuple[Tensor, Tensor]:
        """Return FP32 cosine and sine of FP32 angles, [..., D/2] -> two of [..., D].

        engine: not rounded. aligned: rounded to the grid, unless the trainer rotates `in_fp32`.
        The first half of the sine is negated, so that a rotation is `x * cos + swapped(x) * sin`.
        """
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        if self.aligned and not in_fp32:
            return to_format(cos, self.format, cos.dtype), to_format(sin, self.format, sin.dtype)
        return cos, sin

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, *, in_fp32: bool = False) -> Tensor:
        """Rotate the first D dimensions of heads: x [..., heads, D or more], cos and sin [..., 1, D].

        engine: rounded once. aligned: both products and their sum are rounded, unless the trainer rotates `in_fp32`.
        """
        width = cos.shape[-1]
        if width < x.shape[-1]:
            rotated = self.rope(x[..., :width], cos, sin, in_fp32=in_fp32)
            return torch.cat((rotated, x[..., width:]), -1)
        first, second = x.chunk(2, -1)
        swapped = torch.cat((second, first), -1)
        if self.mode == "engine":
            return self.round((x * cos).addcmul_(swapped, sin))
        if in_fp32:
            return self.round(x * cos + swapped * sin)
        return self.round(self.round(x * cos) + self.round(swapped * sin))

    def swiglu(self, gate_up: Tensor, activation: Activation = "silu") -> Tensor:
        """Compute activation(gate) * up from [..., 2 * width].

        engine: in FP32, rounded once. aligned: activation and product are both rounded.
        """
        if fused(gate_up) and activation == "silu":
            # Imported here, as below, because it needs Triton, which only a GPU requires.
            from betterhalf.kernels import decoding

            return decoding.swiglu(gate_up, aligned=self.aligned)
        gate, up = gate_up.chunk(2, -1)
        activated = self._activated(gate, activation)
        if self.mode == "engine":
            return self.round(activated * up)
        return self.round(self.round(activated) * up.float())

    def _activated(self, gate: Tensor, activation: Activation) -> Tensor:
        """Return the activation, in FP32 or already rounded; in mode `exact` it does not depend on the batch."""
        if activation == "silu":
            return silu(gate) if self.tiled else F.silu(gate.float())
        if self.tiled:
            return gelu_tanh(gate)
        # Below -4 the result is mostly cancellation error, so only torch's half kernel gives the trainer's values.
        return F.gelu(gate.to(self.dtype) if self.aligned else gate.float(), approximate="tanh")

    def probabilities(self, p: Tensor) -> Tensor:
        """Round FP32 softmax probabilities before their product with V, if the mode says so; the result is FP32."""
        return to_format(p, self.format, p.dtype) if self.rounds_probabilities else p

    def add(self, residual: Tensor, branch: Tensor, scale: float = 1.0) -> Tensor:
        """Add `scale * branch` to the residual stream; product and sum are rounded once each in all modes."""
        if scale != 1.0:
            branch = self.round(branch.float() * scale)
        return self.round(residual + branch)

    def norm_of_sum_on_gpu(
        self, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float, *, adder: Rounding, reader: Rounding
    ) -> tuple[Tensor, Tensor]:
        """Compute `add` and `rms_norm` of the sum in one kernel.

        Args:
            residual: residual stream [T, H].
            branch: result to be added, as in `Decoder`; None without one.
            weight: FP32 weight of the norm.
            eps: added to the mean square.
            adder: rounds the sum.
            reader: rounds the norm once more, for the operation that reads it.

        Returns:
            The sum and its norm, [T, H] each.
        """
        from betterhalf.kernels import decoding

        formats = {"stream": adder.container, "grid": self.container, "reader": reader.container}
        return decoding.add_norm(residual, branch, weight, eps, **formats, aligned=self.aligned)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRounding:
    """Rounding of each part of one layer, in the order of computation; `LayerIslands` describes the parts."""

    stream_in: Rounding
    attention: Rounding
    output: Rounding
    attention_norm: Rounding
    stream_mid: Rounding
    mlp: Rounding
    down: Rounding
    mlp_norm: Rounding
    stream_out: Rounding


def layer_roundings(half: Rounding, islands: Islands) -> tuple[LayerRounding, ...]:
    """Return each layer's rounding: `half`, except in FP32 islands and in the residual stream from the first one on."""
    choice = (half, half.in_fp32())
    parts = [field.name for field in fields(LayerIslands)]
    return tuple(LayerRounding(**{part: choice[getattr(layer, part)] for part in parts}) for layer in islands.layers)
