"""The table of presets: the choices that make up each algorithm.

A preset is a row of choices: the baseline subtracted from the reward, the importance ratio that multiplies the
advantage, the ratio that corrects for the mismatch, and the reduction of token losses to one number. docs/algorithms.md
gives the formula and the source of each.
"""

from __future__ import annotations

from dataclasses import dataclass

from betterhalf.config.ratio import RatioConfig
from betterhalf.types import AdvantageKind, AggregationKind, DenominatorKind, PresetName

NO_RATIO = RatioConfig(level="none", gradient="logprob")
"""The ratio 1: a surrogate is then log pi alone, and a correction has no effect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One row of the table; `AlgorithmConfig` has the same fields and explains them."""

    advantage: AdvantageKind
    surrogate: RatioConfig
    correction: RatioConfig = NO_RATIO
    aggregation: AggregationKind
    denominator: DenominatorKind = "all"
    dynamic_sampling: bool = False
    overlong_buffer: int | None = 0
    overlong_factor: float = 0.5


def _ratio(text: str, **choices: object) -> RatioConfig:
    """Build a ratio from a string of level, ratio and treatment, such as `token current/proximal clip`."""
    level, ratio, treatment = text.split()
    return RatioConfig.model_validate({"level": level, "ratio": ratio, "treatment": treatment, **choices})


PPO_CLIP = _ratio("token current/proximal clip", lower=0.8, upper=1.28)
"""The clipped surrogate of arXiv 1707.06347, with the asymmetric bounds of the paper's code."""

PRESETS: dict[PresetName, Preset] = {
    "grpo": Preset(
        advantage="group_mean",
        surrogate=PPO_CLIP,
        aggregation="constant_length",
    ),
    "grpo_std": Preset(
        advantage="group_standardised",
        surrogate=PPO_CLIP,
        aggregation="sequence_mean",
    ),
    "grpo_token_tis": Preset(
        advantage="group_mean",
        surrogate=PPO_CLIP,
        correction=_ratio("token proximal/behavior truncate", upper=3),
        aggregation="constant_length",
    ),
    "grpo_seq_tis": Preset(
        advantage="group_mean",
        surrogate=PPO_CLIP,
        correction=_ratio("sequence proximal/behavior truncate", upper=3),
        aggregation="constant_length",
    ),
    "grpo_seq_mis": Preset(
        advantage="group_mean",
        surrogate=PPO_CLIP,
        correction=_ratio("sequence proximal/behavior mask", upper=3),
        aggregation="constant_length",
    ),
    "gspo": Preset(
        advantage="group_mean",
        surrogate=_ratio("geometric_mean current/proximal clip", lower=1 - 3e-4, upper=1 + 4e-4),
        aggregation="sequence_mean",
    ),
    "pg_seq_is": Preset(
        advantage="group_mean",
        surrogate=_ratio("sequence current/behavior raw", gradient="logprob"),
        aggregation="constant_length",
    ),
    "pg_seq_tis": Preset(
        advantage="group_mean",
        surrogate=_ratio("sequence current/behavior truncate", upper=3, gradient="logprob"),
        aggregation="constant_length",
    ),
    "pg_seq_mis": Preset(
        advantage="group_mean",
        surrogate=_ratio("sequence current/behavior mask", upper=3, gradient="logprob"),
        aggregation="constant_length",
    ),
    "reinforce": Preset(
        advantage="raw",
        surrogate=NO_RATIO,
        aggregation="constant_length",
    ),
    "rloo": Preset(
        advantage="leave_one_out",
        surrogate=NO_RATIO,
        aggregation="constant_length",
    ),
    "dapo": Preset(
        advantage="group_standardised",
        surrogate=_ratio("token current/proximal clip", lower=0.8, upper=1.28, dual_clip=10),
        aggregation="token_mean",
        dynamic_sampling=True,
        overlong_buffer=None,
    ),
    "cispo": Preset(
        advantage="group_standardised",
        surrogate=_ratio("token current/proximal truncate", upper=5, gradient="logprob"),
        aggregation="token_mean",
    ),
    "icepop": Preset(
        advantage="group_mean",
        surrogate=PPO_CLIP,
        correction=_ratio("token proximal/behavior mask", lower=0.5, upper=5),
        aggregation="constant_length",
    ),
    "geo_mask": Preset(
        advantage="group_mean",
        surrogate=PPO_CLIP,
        correction=_ratio("geometric_mean proximal/behavior mask", lower=0.99, upper=1.01, keep_weight=False),
        aggregation="constant_length",
    ),
    "dppo_tv": Preset(
        advantage="group_mean",
        surrogate=_ratio("token current/behavior truncate", upper=20, gradient="logprob", probability_gap=0.2),
        aggregation="token_mean",
    ),
}
"""Every preset by its name."""
