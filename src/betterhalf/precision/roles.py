"""Which format each role uses, as torch dtypes, and how half matrix products are computed on this device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from betterhalf.config.schema import PrecisionConfig, PrecisionRoles
from betterhalf.precision.formats import torch_dtype
from betterhalf.precision.islands import Islands, resolve_islands
from betterhalf.precision.products import has_native_matmul
from betterhalf.types import DtypeName


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The dtype of every role on one device."""

    roles: PrecisionRoles
    """Names of the formats."""
    device: torch.device
    half_matmul: str
    """`auto`, `native` or `fp32_sums`; see `PrecisionConfig.half_matmul`."""
    fp32_modules: tuple[str, ...] = ()
    """Patterns of FP32 islands; see `PrecisionConfig.fp32_modules`."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Forward and backward of the trainer."""
        return torch_dtype(self.roles.compute_dtype)

    @property
    def wire_dtype(self) -> torch.dtype:
        """Weights on their way to the engine."""
        return torch_dtype(self.roles.wire_dtype)

    @property
    def rollout_dtype(self) -> torch.dtype:
        """Computation of the engine."""
        return torch_dtype(self.roles.rollout_dtype)

    @property
    def kv_dtype(self) -> torch.dtype:
        """Cached keys and values."""
        return torch_dtype(self.roles.kv_dtype)

    def islands(self, num_layers: int, name: DtypeName) -> Islands:
        """The FP32 islands of a model of so many layers that computes in `name`; none in FP32.

        Raises:
            InputError: a pattern matches no module that can be an island, in whatever format.
        """
        found = resolve_islands(self.fp32_modules, num_layers)
        return found if name != "fp32" else resolve_islands((), num_layers)

    def fp32_sums(self, name: DtypeName) -> bool:
        """Whether matrix products of this format run on half-grid operands with sums in FP32 (CPU only)."""
        if self.device.type != "cpu" or name == "fp32":
            return False
        if self.half_matmul == "auto":
            return not has_native_matmul(torch_dtype(name))
        return self.half_matmul == "fp32_sums"


def build_precision(config: PrecisionConfig, device: torch.device) -> Precision:
    """Resolve the configuration's roles for one device; on a GPU, also tell torch to keep sums in FP32."""
    if device.type == "cuda":
        _keep_fp32_sums()
    return Precision(
        roles=config.roles(), device=device, half_matmul=config.half_matmul, fp32_modules=config.fp32_modules
    )


def _keep_fp32_sums() -> None:
    """cuBLAS may add parts of a half product in half unless told not to, and FP32 products may drop to TF32."""
    settings = torch.backends.cuda.matmul
    settings.allow_fp16_reduced_precision_reduction = False
    settings.allow_bf16_reduced_precision_reduction = False
    torch.set_float32_matmul_precision("highest")
