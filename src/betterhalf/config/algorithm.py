"""The section `[algorithm]`: a preset, with any of its choices replaced.

The table of a ratio may be sparse: `surrogate = { upper = 1.2 }` changes that number of the preset and keeps the rest.
A `RatioConfig` is always a complete ratio. Files stay sparse until the last layer is merged, so the values of all
layers apply to the preset that is named last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

from pydantic import Field, model_validator

from betterhalf.config.kl import NO_KL, KlConfig, own_kl_choices
from betterhalf.config.presets import NO_RATIO, PRESETS, Preset
from betterhalf.config.ratio import RatioConfig
from betterhalf.config.section import Section
from betterhalf.types import AdvantageKind, AggregationKind, DenominatorKind, PresetName

_DEFAULT: PresetName = "grpo"
_CHOICES = tuple(field.name for field in fields(Preset))
_RATIOS = ("surrogate", "correction")
_OF_TREATMENT = ("lower", "upper", "keep_weight", "dual_clip")
"""Choices of a ratio that have a meaning only for its treatment."""


class AlgorithmConfig(Section):
    """A preset with any of its choices replaced; the others are those of the preset."""

    shorthand: ClassVar[str | None] = "preset"

    preset: PresetName = _DEFAULT
    """Preset to start from; docs/algorithms.md has the formula of each."""
    advantage: AdvantageKind = PRESETS[_DEFAULT].advantage
    """Baseline subtracted from the reward."""
    surrogate: RatioConfig = PRESETS[_DEFAULT].surrogate
    """Ratio that multiplies the advantage."""
    correction: RatioConfig = PRESETS[_DEFAULT].correction
    """Ratio proximal/behavior that corrects for the mismatch; `level = "none"` switches it off."""
    aggregation: AggregationKind = PRESETS[_DEFAULT].aggregation
    """Reduction of token losses to one number."""
    denominator: DenominatorKind = PRESETS[_DEFAULT].denominator
    """`all`: count every token, masked or not, as in the paper. `kept`: do not count masked tokens."""
    dynamic_sampling: bool = PRESETS[_DEFAULT].dynamic_sampling
    """Replace groups whose rewards are all equal by groups of other prompts (DAPO, arXiv 2503.14476)."""
    max_sampling_rounds: int = Field(3, ge=1)
    """Maximum number of rounds of generation in a step with `dynamic_sampling`."""
    overlong_buffer: int | None = PRESETS[_DEFAULT].overlong_buffer
    """Number of tokens before the length limit over which a soft penalty grows (DAPO); 0 for no penalty. The preset
    `dapo` uses a fifth of the limit."""
    overlong_factor: float = Field(PRESETS[_DEFAULT].overlong_factor, ge=0)
    """Penalty at the length limit. 0.5 is half the range of rewards of 0 and 1, as DAPO's factor of 1 is half the range
    of its rewards of -1 and 1."""
    length_penalty: float = Field(0.0, ge=0)
    """Penalty on length, subtracted from the reward: `length_penalty * tokens / sampling.max_tokens`."""
    mask_truncated: bool = False
    """Leave completions that ended at the length limit without a loss (DAPO's overlong filtering, arXiv 2503.14476).
    They keep counting in their group's baseline; with `denominator = "kept"` they leave the denominators."""
    score_centering: int = Field(0, ge=0)
    """Cancel the drift towards the engine's distribution, computed from this number of its most likely tokens (Score
    Centering, arXiv 2609.20807, uses 128); 0 for no such term. Needs the native engine."""
    routing_replay: bool = False
    """Compute the trainer's passes over a mixture of experts with the experts that the engine chose when it sampled
    (routing replay, arXiv 2510.11370); their weights, and the gradient of the router, come from the trainer's own
    logits. Needs an engine that reports its choices."""
    loss: str | None = None
    """Import path of a loss of your own, `module:function` or `folder/file.py:function`; it replaces `surrogate`,
    `correction` and `aggregation`. docs/losses.md has an example."""
    kl: KlConfig = NO_KL
    """Penalty on the KL divergence to a reference policy; none by default."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Factor of the entropy bonus: the loss is lowered by this times the mean entropy of the policy at the completion
    tokens, aggregated as the loss is; 0 for none."""

    @model_validator(mode="before")
    @classmethod
    def _take_the_rest_from_the_preset(cls, given: Any) -> Any:
        return _completed(given) if isinstance(given, Mapping) else given


def own_choices(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices of a resolved `algorithm` section that differ from its preset; completing them restores it."""
    row = _row(section)
    sparse = {key: value for key, value in section.items() if key not in _CHOICES or value != row[key]}
    for key in _RATIOS:
        if isinstance(ratio := sparse.get(key), Mapping):
            changed = {name: value for name, value in ratio.items() if value != row[key].get(name)}
            same = _over(row[key], changed) == _over(row[key], ratio)
            sparse[key] = changed if same else dict(ratio)
    if isinstance(kl := sparse.get("kl"), Mapping):
        sparse["kl"] = own_kl_choices(kl)
    return {key: value for key, value in sparse.items() if key not in _CHOICES or value is not None}


def _completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return every choice: the given value, or else the preset's; None counts as not given."""
    chosen = {key: value for key, value in given.items() if key not in _CHOICES or value is not None}
    row = _row(given)
    for key in _RATIOS:
        if isinstance(ratio := chosen.get(key), Mapping):
            chosen[key] = _over(row[key], ratio)
    return row | chosen


def _row(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preset's choices as plain values; the default's for an unknown name, which the schema refuses."""
    name = section.get("preset", _DEFAULT)
    preset = PRESETS[name] if isinstance(name, str) and name in PRESETS else PRESETS[_DEFAULT]
    values = {key: getattr(preset, key) for key in _CHOICES}
    return {key: value.model_dump() if isinstance(value, RatioConfig) else value for key, value in values.items()}


def _over(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the given choices of a ratio over those of the preset.

    A ratio that is switched off or on keeps nothing of the preset, and a changed treatment drops the preset's bounds.
    """
    level = given.get("level", own["level"])
    if level != own["level"] and "none" in (level, own["level"]):
        return {**(NO_RATIO.model_dump() if level == "none" else {}), **given}
    other = given.get("treatment", own["treatment"]) != own["treatment"]
    kept = {key: value for key, value in own.items() if not (other and key in _OF_TREATMENT)}
    return {**kept, **given}
