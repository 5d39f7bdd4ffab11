"""The section `[lora]`: low-rank adapters in place of full fine-tuning."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from betterhalf.config.section import Section
from betterhalf.types import LoraMerge

ALL_LINEAR = "all-linear"
"""Target of every linear layer but the LM head: PEFT's word."""


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685), which train instead of the weights. They need the extra `[lora]`."""

    adapter: str | None = None
    """Folder of an adapter to start from, in PEFT's format, trained on the model of `model.name`. What is left out of
    rank, alpha, scale and targets is as it has them; `null` for a new adapter."""
    rank: int = Field(0, ge=0)
    """Rank of the adapter of each target module; 0 for full fine-tuning."""
    alpha: float | None = Field(None, gt=0)
    """Numerator of the adapter's scale, which is `alpha / rank`; twice the rank by default, as in the paper."""
    rank_stabilised: bool = False
    """Scale by `alpha / sqrt(rank)` instead (arXiv 2312.03732)."""
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    """Linear layers that get an adapter, by the last parts of their names, such as `q_proj` or `mlp.down_proj`;
    `all-linear` for all but the LM head."""
    dropout: float = 0.0
    """Dropout before the adapter; only 0, because dropout would make the trained policy random."""
    merge: LoraMerge = "weights"
    """Form of the adapter in the engine. `weights`: added to the base in FP32 and rounded once. `adapter`: unmerged."""

    @model_validator(mode="after")
    def _rank_is_given(self) -> Self:
        if self.rank == 0:
            other = next(
                (key for key, info in type(self).model_fields.items() if getattr(self, key) != info.default), ""
            )
            if other:
                raise ValueError(
                    f"lora.{other} is set, but lora.rank=0 trains all weights. Set lora.rank, for example to 32, or "
                    f"leave out lora.{other}."
                )
        if not self.target_modules:
            raise ValueError(
                "lora.target_modules is empty, so no layer would get an adapter. Name layers, such as q_proj and "
                f"v_proj, or leave it out for {ALL_LINEAR}."
            )
        if self.dropout:
            raise ValueError(
                f"lora.dropout={self.dropout:g} would make the trained policy random, so that its logprobs could not "
                "be compared with the engine's. Set lora.dropout=0, or leave it out."
            )
        return self

    def without_start(self) -> Self:
        """Return the section for adapters whose values come from elsewhere, such as a checkpoint of a run."""
        return self.model_copy(update={"adapter": None})

    @property
    def active(self) -> bool:
        """True if adapters are trained instead of the weights."""
        return self.rank > 0

    @property
    def scale(self) -> float:
        """Factor of the adapter's product."""
        return self.numerator / (self.rank**0.5 if self.rank_stabilised else self.rank)

    @property
    def numerator(self) -> float:
        """Value of `alpha`, its default included."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


FULL = LoraConfig()
"""Full fine-tuning."""
