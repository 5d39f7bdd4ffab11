"""Precision of a run on one device: the torch dtype of each role, the kind of half matrix products, FP32 islands."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from betterhalf.config.schema import PrecisionConfig, PrecisionRoles
from betterhalf.errors import ConfigError
from betterhalf.precision.formats import is_emulated, torch_dtype
from betterhalf.precision.islands import Islands, resolve_islands
from betterhalf.precision.products import has_native_matmul
from betterhalf.types import DtypeName


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Dtype of every role on one device, with the settings that change what these dtypes mean."""

    roles: PrecisionRoles
    """Format names of all roles."""
    device: torch.device
    """Device that computes."""
    half_matmul: str
    """`auto`, `native` or `fp32_sums`; see `PrecisionConfig.half_matmul`."""
    fp32_modules: tuple[str, ...] = ()
    """Patterns of FP32 islands; see `PrecisionConfig.fp32_modules`."""
    exact: bool = False
    """True if every row's bits must not depend on the other rows; see `RoundingMode`. CPU only."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the trainer's forward and backward passes."""
        return torch_dtype(self.roles.compute_dtype)

    @property
    def wire_dtype(self) -> torch.dtype:
        """Dtype of weights sent to the engine."""
        return torch_dtype(self.roles.wire_dtype)

    @property
    def rollout_dtype(self) -> torch.dtype:
        """Dtype of the engine's computation."""
        return torch_dtype(self.roles.rollout_dtype)

    @property
    def kv_dtype(self) -> torch.dtype:
        """Dtype of the engine's cached keys and values."""
        return torch_dtype(self.roles.kv_dtype)

    def islands(self, num_layers: int, name: DtypeName, *, post_norms: bool = False) -> Islands:
        """Return the FP32 islands of a model with `num_layers` layers that computes in `name`; none if that is `fp32`.

        Set `post_norms` to `has_post_norms` of the model.

        Raises:
            InputError: a pattern matches no module that can be an island; `fp32` is checked too.
        """
        found = resolve_islands(self.fp32_modules, num_layers, post_norms=post_norms)
        return found if name != "fp32" else resolve_islands((), num_layers)

    def fp32_sums(self, name: DtypeName) -> bool:
        """Return whether matrix products of this half format are computed in FP32 on widened operands (CPU only)."""
        if self.device.type != "cpu" or name == "fp32":
            return False
        if self.half_matmul == "auto" and not self.exact:
            return not has_native_matmul(torch_dtype(name))
        return self.exact or self.half_matmul == "fp32_sums"


def build_precision(config: PrecisionConfig, device: torch.device, *, exact: bool = False) -> Precision:
    """Resolve the configured roles for one device; for a GPU, also tell torch to keep sums in FP32.

    Set `exact` for `RunConfig.exact`.

    Raises:
        ConfigError: a role has an emulated format, and the device is a GPU.
    """
    roles = config.roles()
    if device.type == "cuda":
        _refuse_emulation(roles)
        _keep_fp32_sums()
    return Precision(
        roles=roles,
        device=device,
        half_matmul=config.half_matmul,
        fp32_modules=config.fp32_modules,
        exact=exact,
    )


def _refuse_emulation(roles: PrecisionRoles) -> None:
    emulated = next(filter(is_emulated, roles.model_dump().values()), None)
    if emulated is not None:
        raise ConfigError(f"{emulated} is an emulated format, and it is emulated on a CPU only; set device=cpu")


def _keep_fp32_sums() -> None:
    """Forbid cuBLAS to add parts of a half product in half, and to compute FP32 products in TF32."""
    settings = torch.backends.cuda.matmul
    settings.allow_fp16_reduced_precision_reduction = False
    settings.allow_bf16_reduced_precision_reduction = False
    torch.set_float32_matmul_precision("highest")
