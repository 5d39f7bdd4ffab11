"""The table of presets, and how a configuration becomes an `Algorithm`.

A preset is nothing but a row of choices: what is subtracted from the reward, which importance ratio multiplies the
advantage, which one corrects for the mismatch, and how token losses become one number. docs/algorithms.md gives the
formula and the source of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from betterhalf.algorithms.rules import check_correction, check_surrogate
from betterhalf.config.schema import AlgorithmConfig, RatioConfig
from betterhalf.errors import ConfigError
from betterhalf.types import PresetName

AdvantageKind = Literal["group_mean", "group_standardised", "leave_one_out", "raw"]
AggregationKind = Literal["constant_length", "sequence_mean", "token_mean"]
DenominatorKind = Literal["all", "kept"]

NO_RATIO = RatioConfig(level="none", gradient="score")
"""The ratio 1: as a surrogate it leaves log pi, as a correction it leaves the surrogate alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """Every choice of one algorithm, resolved."""

    preset: PresetName
    """Name of the row it started from."""
    advantage: AdvantageKind
    """Baseline subtracted from the reward."""
    surrogate: RatioConfig
    """The ratio that multiplies the advantage and carries the gradient."""
    correction: RatioConfig = NO_RATIO
    """The constant proximal/behavior ratio that multiplies the surrogate."""
    aggregation: AggregationKind
    """How token losses become one number."""
    denominator: DenominatorKind = "all"
    """`kept`: what masks reject before the first update leaves the denominator."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal by fresh prompts."""
    max_sampling_rounds: int = 3
    """Rounds of generation in a step with dynamic sampling."""
    overlong_buffer: int | None = 0
    """Tokens before the length limit over which a penalty grows to 1; 0 for none, None for a fifth of the limit."""

    @property
    def needs_proximal(self) -> bool:
        """Whether the loss reads `proximal_logprobs`, the trainer's logprobs frozen before the first update."""
        anchored = self.surrogate.level != "none" and self.surrogate.ratio == "current/proximal"
        return anchored or self.correction.level != "none" or self.denominator == "kept"

    def overlong_tokens(self, max_tokens: int) -> int:
        """Length of the overlong buffer under a limit of `max_tokens`; DAPO's own is 4096 of 20480, a fifth."""
        return max_tokens // 5 if self.overlong_buffer is None else self.overlong_buffer


def _ratio(text: str, **choices: object) -> RatioConfig:
    """`_ratio("token current/proximal clip", ...)`: level, ratio and treatment in one readable string."""
    level, ratio, treatment = text.split()
    return RatioConfig.model_validate({"level": level, "ratio": ratio, "treatment": treatment, **choices})


PPO_CLIP = _ratio("token current/proximal clip", lower=0.8, upper=1.28)
"""The clipped surrogate of arXiv 1707.06347, with the asymmetric bounds that the paper's code uses."""

PRESETS: dict[PresetName, Algorithm] = {
    algorithm.preset: algorithm
    for algorithm in (
        Algorithm(preset="grpo", advantage="group_mean", surrogate=PPO_CLIP, aggregation="constant_length"),
        Algorithm(preset="grpo_std", advantage="group_standardised", surrogate=PPO_CLIP, aggregation="sequence_mean"),
        Algorithm(
            preset="grpo_token_tis",
            advantage="group_mean",
            surrogate=PPO_CLIP,
            correction=_ratio("token proximal/behavior truncate", upper=3),
            aggregation="constant_length",
        ),
        Algorithm(
            preset="grpo_seq_tis",
            advantage="group_mean",
            surrogate=PPO_CLIP,
            correction=_ratio("sequence proximal/behavior truncate", upper=3),
            aggregation="constant_length",
        ),
        Algorithm(
            preset="grpo_seq_mis",
            advantage="group_mean",
            surrogate=PPO_CLIP,
            correction=_ratio("sequence proximal/behavior mask", upper=3),
            aggregation="constant_length",
        ),
        Algorithm(
            preset="gspo",
            advantage="group_mean",
            surrogate=_ratio("geometric_mean current/proximal clip", lower=1 - 3e-4, upper=1 + 4e-4),
            aggregation="sequence_mean",
        ),
        Algorithm(
            preset="pg_seq_is",
            advantage="group_mean",
            surrogate=_ratio("sequence current/behavior raw", gradient="score"),
            aggregation="constant_length",
        ),
        Algorithm(
            preset="pg_seq_tis",
            advantage="group_mean",
            surrogate=_ratio("sequence current/behavior truncate", upper=3, gradient="score"),
            aggregation="constant_length",
        ),
        Algorithm(
            preset="pg_seq_mis",
            advantage="group_mean",
            surrogate=_ratio("sequence current/behavior mask", upper=3, gradient="score"),
            aggregation="constant_length",
        ),
        Algorithm(preset="reinforce", advantage="raw", surrogate=NO_RATIO, aggregation="constant_length"),
        Algorithm(preset="rloo", advantage="leave_one_out", surrogate=NO_RATIO, aggregation="constant_length"),
        Algorithm(
            preset="dapo",
            advantage="group_standardised",
            surrogate=_ratio("token current/proximal clip", lower=0.8, upper=1.28, dual_clip=10),
            aggregation="token_mean",
            dynamic_sampling=True,
            overlong_buffer=None,
        ),
        Algorithm(
            preset="cispo",
            advantage="group_standardised",
            surrogate=_ratio("token current/proximal truncate", upper=5, gradient="score"),
            aggregation="token_mean",
        ),
        Algorithm(
            preset="icepop",
            advantage="group_mean",
            surrogate=PPO_CLIP,
            correction=_ratio("token proximal/behavior mask", lower=0.5, upper=5),
            aggregation="constant_length",
        ),
        Algorithm(
            preset="geo_mask",
            advantage="group_mean",
            surrogate=PPO_CLIP,
            correction=_ratio("geometric_mean proximal/behavior mask", lower=0.99, upper=1.01, keep_weight=False),
            aggregation="constant_length",
        ),
        Algorithm(
            preset="dppo_tv",
            advantage="group_mean",
            surrogate=_ratio("token current/behavior truncate", upper=20, gradient="score", probability_gap=0.2),
            aggregation="token_mean",
        ),
    )
}
"""Every preset by its name."""

_CHOICES = ("advantage", "surrogate", "correction", "aggregation", "denominator", "dynamic_sampling", "overlong_buffer")


def resolve_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The preset of `config`, with the choices that `config` gives in place of its own.

    Raises:
        ConfigError: the choices contradict each other.
    """
    given = {name: value for name in _CHOICES if (value := getattr(config, name)) is not None}
    algorithm = replace(PRESETS[config.preset], max_sampling_rounds=config.max_sampling_rounds, **given)
    check_surrogate(algorithm.surrogate)
    check_correction(algorithm.correction)
    _check_together(algorithm)
    return algorithm


def _check_together(algorithm: Algorithm) -> None:
    """Refuse what only the combination of choices makes wrong."""
    surrogate, correction = algorithm.surrogate, algorithm.correction
    if "none" not in (surrogate.level, correction.level) and surrogate.ratio == "current/behavior":
        raise ConfigError(
            "algorithm.surrogate already divides by the behavior policy, so algorithm.correction would count the "
            'mismatch twice; set algorithm.correction.level="none", or algorithm.surrogate.ratio="current/proximal".'
        )
    if algorithm.overlong_buffer is not None and algorithm.overlong_buffer < 0:
        raise ConfigError(f"algorithm.overlong_buffer={algorithm.overlong_buffer} is negative; use 0 for no penalty.")
