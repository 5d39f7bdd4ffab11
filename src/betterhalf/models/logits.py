"""Function that a model applies to the logits of its LM head, read from its transformers configuration."""

from __future__ import annotations

from typing import Any, Literal

from betterhalf.ops import PLAIN_LOGITS, LogitTransform

_Effect = Literal["divide", "multiply", "bound"]

_TRANSFORMS: dict[str, tuple[str, _Effect]] = {
    **dict.fromkeys(("granite", "granite_swa", "granitemoe", "granitemoeshared"), ("logits_scaling", "divide")),
    "hyperclovax": ("logits_scaling", "multiply"),
    **dict.fromkeys(("cohere", "cohere2"), ("logit_scale", "multiply")),
    **dict.fromkeys(("gemma2", "gemma3_text", "vaultgemma", "nanochat"), ("final_logit_softcapping", "bound")),
}
"""transformers `model_type` -> key of its configuration, and what the model does with its value.

One key means different things to different architectures, so an unknown one is refused (`models.packability`).
"""


def transforms_logits(hf_config: Any) -> bool:
    """Return whether the architecture may change its logits in a way that `logit_transform` knows."""
    return hf_config.model_type in _TRANSFORMS


def logit_transform(hf_config: Any) -> LogitTransform:
    """Return the function that the model applies to its logits; `PLAIN_LOGITS` without one."""
    if not transforms_logits(hf_config):
        return PLAIN_LOGITS
    key, effect = _TRANSFORMS[hf_config.model_type]
    value = getattr(hf_config, key, None)
    if value is None:
        return PLAIN_LOGITS
    if effect == "bound":
        return LogitTransform(cap=float(value))
    return LogitTransform(scale=float(value) if effect == "multiply" else 1.0 / float(value))
