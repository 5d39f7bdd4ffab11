"""Resolution of a configuration to an `Algorithm`, and the resolved presets."""

from __future__ import annotations

from dataclasses import dataclass, fields

from betterhalf.algorithms.loss_path import OwnLoss, load_own_loss
from betterhalf.algorithms.rules import check_correction, check_score_centering, check_surrogate
from betterhalf.config.kl import NO_KL
from betterhalf.config.presets import NO_RATIO
from betterhalf.config.presets import PRESETS as _ROWS
from betterhalf.config.schema import AlgorithmConfig, KlConfig, RatioConfig
from betterhalf.errors import ConfigError
from betterhalf.types import AdvantageKind, AggregationKind, DenominatorKind, PresetName


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """Every choice of one algorithm, resolved."""

    preset: PresetName
    """Name of the row it started from."""
    advantage: AdvantageKind
    """Baseline subtracted from the reward."""
    surrogate: RatioConfig
    """Ratio that multiplies the advantage; its `gradient` says whether the ratio or log pi is differentiated."""
    correction: RatioConfig = NO_RATIO
    """Constant proximal/behavior ratio that multiplies the surrogate."""
    aggregation: AggregationKind
    """Reduction of the token losses to one number."""
    denominator: DenominatorKind = "all"
    """Tokens that the denominator counts; `kept` excludes those that masks reject before the first update."""
    dynamic_sampling: bool = False
    """True to replace groups whose rewards are all equal by groups of fresh prompts."""
    max_sampling_rounds: int = 3
    """Maximum number of generation rounds in a step with dynamic sampling."""
    overlong_buffer: int | None = 0
    """Tokens before the length limit over which a penalty grows; 0 for none, None for a fifth of the limit."""
    overlong_factor: float = 0.5
    """Penalty at the length limit."""
    length_penalty: float = 0.0
    """Penalty of a completion as long as the limit; a shorter one has its share of it."""
    mask_truncated: bool = False
    """True to leave completions that ended at the length limit without a loss."""
    score_centering: int = 0
    """Number of the engine's most likely tokens from which the expected score is computed; 0 for no such term."""
    loss: OwnLoss | None = None
    """Loss of the user's own in place of surrogate, correction and aggregation; None for the built-in one."""
    kl: KlConfig = NO_KL
    """Penalty on the KL divergence to a reference policy."""
    entropy_coefficient: float = 0.0
    """Factor of the entropy bonus; 0 for none."""

    @property
    def needs_proximal(self) -> bool:
        """True if the loss reads `proximal_logprobs`, the trainer's logprobs frozen before the first update."""
        if self.loss is not None:
            return True
        anchored = self.surrogate.level != "none" and self.surrogate.ratio == "current/proximal"
        return anchored or self.correction.level != "none" or self.denominator == "kept"

    @property
    def reads_reference(self) -> bool:
        """True if loss or reward reads the logprobs of the reference policy."""
        return self.kl.coefficient > 0

    @property
    def has_kl_loss(self) -> bool:
        """True if the KL penalty is a term of the loss."""
        return self.reads_reference and self.kl.place == "loss"

    @property
    def trains_every_group(self) -> bool:
        """True if groups whose rewards are all equal have a gradient, because of a KL penalty or an entropy bonus."""
        return self.reads_reference or self.entropy_coefficient > 0

    def overlong_tokens(self, max_tokens: int) -> int:
        """Return the length of the overlong buffer for a limit of `max_tokens`; DAPO uses 4096 of 20480, a fifth."""
        return max_tokens // 5 if self.overlong_buffer is None else self.overlong_buffer


def resolve_algorithm(config: AlgorithmConfig, *, with_loss: bool = True) -> Algorithm:
    """Return the choices of `config`, after checking them.

    Args:
        config: the section `[algorithm]`.
        with_loss: import a loss of the user's own; False where nothing is trained and its file may be missing.

    Raises:
        ConfigError: the choices contradict each other, or the loss cannot be imported.
    """
    choices = {field.name: getattr(config, field.name) for field in fields(Algorithm)}
    own = None if config.loss is None or not with_loss else load_own_loss(config.loss)
    algorithm = Algorithm(**{**choices, "loss": own})
    check_surrogate(algorithm.surrogate)
    check_correction(algorithm.correction)
    _check_together(algorithm)
    if algorithm.score_centering:
        check_score_centering(algorithm.surrogate, algorithm.correction, own_loss=algorithm.loss is not None)
    return algorithm


def _check_together(algorithm: Algorithm) -> None:
    """Refuse choices that are wrong only in combination, or without effect, and a negative overlong buffer."""
    surrogate, correction = algorithm.surrogate, algorithm.correction
    if "none" not in (surrogate.level, correction.level) and surrogate.ratio == "current/behavior":
        raise ConfigError(
            "algorithm.surrogate already divides by the behavior policy, so algorithm.correction would count the "
            'mismatch twice; set algorithm.correction.level="none", or algorithm.surrogate.ratio="current/proximal".'
        )
    if algorithm.overlong_buffer is not None and algorithm.overlong_buffer < 0:
        raise ConfigError(f"algorithm.overlong_buffer={algorithm.overlong_buffer} is negative; use 0 for no penalty.")
    if algorithm.overlong_buffer == 0 and algorithm.overlong_factor != _ROWS[algorithm.preset].overlong_factor:
        raise ConfigError(
            f"algorithm.overlong_factor={algorithm.overlong_factor:g} has no effect, because algorithm.overlong_buffer "
            "is 0; set algorithm.overlong_buffer to a number of tokens, such as a fifth of sampling.max_tokens."
        )
    if algorithm.kl.refresh_every and not algorithm.reads_reference:
        raise ConfigError(
            f"algorithm.kl.refresh_every={algorithm.kl.refresh_every} refreshes a reference policy that nothing reads; "
            "set algorithm.kl.coefficient above 0, as in 0.001, or leave out refresh_every."
        )


PRESETS: dict[PresetName, Algorithm] = {name: resolve_algorithm(AlgorithmConfig(preset=name)) for name in _ROWS}
"""Resolved presets by name."""
