"""Rules against choices of a ratio that cannot be combined, with their fixes; one table for each use of a ratio."""

from __future__ import annotations

from collections.abc import Callable

from betterhalf.config.schema import RatioConfig
from betterhalf.errors import ConfigError

Rule = tuple[Callable[[RatioConfig], bool], str, str]
"""(test that is true if the rule is broken, problem, fix)."""

_UNUSED = {"treatment": "raw", "lower": None, "upper": None, "keep_weight": True} | dict.fromkeys(
    ("dual_clip", "probability_gap")
)
"""Choices without effect on a ratio that is always 1, with their neutral values."""

_SURROGATE: tuple[Rule, ...] = (
    (
        lambda r: r.ratio == "proximal/behavior",
        "has ratio proximal/behavior, which does not depend on the weights being trained",
        'set ratio to "current/proximal" or "current/behavior", or use algorithm.correction',
    ),
    (
        lambda r: r.treatment == "clip" and r.gradient == "logprob",
        "clips a ratio that carries no gradient",
        'set gradient = "ratio", or treatment = "truncate"',
    ),
    (
        lambda r: not r.keep_weight and r.gradient == "ratio",
        "drops the weight that carries the gradient",
        'set gradient = "logprob", or keep_weight = true',
    ),
    (
        lambda r: r.probability_gap is not None and (r.level != "token" or r.ratio != "current/behavior"),
        "compares probabilities of pi and mu, but its ratio is not the tokens' current/behavior",
        'set level = "token" and ratio = "current/behavior", or leave out probability_gap',
    ),
)

_CORRECTION: tuple[Rule, ...] = (
    (
        lambda r: r.ratio != "proximal/behavior",
        "has another ratio than proximal/behavior, the only one that corrects for the mismatch alone",
        'set ratio = "proximal/behavior"',
    ),
    (
        lambda r: r.treatment == "clip",
        "has treatment clip, which depends on the advantage and the gradient, and those belong to the surrogate",
        'set treatment = "truncate" or "mask"',
    ),
    (
        lambda r: r.probability_gap is not None,
        "has a probability_gap, which needs the current policy",
        "move it to algorithm.surrogate",
    ),
)

_ANY: tuple[Rule, ...] = (
    (
        lambda r: any(bound is not None and bound <= 0 for bound in (r.lower, r.upper)),
        "has a bound of the ratio that is not positive",
        "give bounds of the ratio itself, as in 0.8 and 1.28, not 0.2 and 0.28",
    ),
    (
        lambda r: r.lower is not None and r.upper is not None and r.lower > r.upper,
        "has lower above upper (one of them may come from the preset)",
        "give both, the smaller one as lower",
    ),
    (
        lambda r: r.treatment == "raw" and (r.lower is not None or r.upper is not None),
        "has bounds, but treatment raw does not use them",
        'leave them out, or set treatment = "truncate", "mask" or "clip"',
    ),
    (
        lambda r: r.treatment == "truncate" and r.upper is None,
        "truncates without an upper bound",
        "give upper, as in 3",
    ),
    (
        lambda r: r.treatment == "truncate" and r.lower is not None,
        "truncates, which takes no lower bound",
        "leave out lower",
    ),
    (
        lambda r: r.treatment == "mask" and r.lower is None and r.upper is None,
        "masks without a bound",
        "give lower, upper or both",
    ),
    (
        lambda r: r.treatment == "clip" and (r.lower is None or r.upper is None),
        "clips without two bounds",
        "give lower and upper, as in 0.8 and 1.28",
    ),
    (
        lambda r: r.treatment == "clip" and not (r.lower or 0) <= 1 <= (r.upper or 0),
        "has bounds for clip that do not include 1",
        "give a lower bound of at most 1 and an upper bound of at least 1, as in 0.8 and 1.28",
    ),
    (
        lambda r: r.treatment != "mask" and not r.keep_weight,
        "drops the weight without masking",
        'set treatment = "mask", or keep_weight = true',
    ),
    (
        lambda r: r.treatment == "clip" and r.probability_gap is not None,
        "has both a clip and a probability_gap, two trust regions for one ratio",
        "keep one of them",
    ),
    (
        lambda r: r.dual_clip is not None and (r.treatment != "clip" or r.dual_clip <= 1),
        "has a dual_clip, which must exceed 1 and needs treatment clip",
        'set treatment = "clip" and dual_clip above 1, or leave it out',
    ),
)


def check_surrogate(ratio: RatioConfig) -> None:
    """Raise ConfigError if the surrogate's choices contradict each other; level `none` excludes every other choice."""
    _check("algorithm.surrogate", ratio, _SURROGATE + _ANY)


def check_correction(ratio: RatioConfig) -> None:
    """Raise ConfigError if the correction's choices contradict each other; level `none` excludes every other choice."""
    _check("algorithm.correction", ratio, _CORRECTION + _ANY)


def check_score_centering(surrogate: RatioConfig, correction: RatioConfig, *, own_loss: bool) -> None:
    """Raise ConfigError if the loss is not the score of each token times a constant, which is what can be centred."""
    key = "algorithm.score_centering"
    if own_loss:
        raise ConfigError(f"{key} is part of the built-in loss; leave it out, or leave out algorithm.loss.")
    if correction.level != "none":
        raise ConfigError(
            f'{key} centres one ratio, current/behavior; set algorithm.correction.level = "none", and put the bounds '
            'into algorithm.surrogate, with ratio = "current/behavior".'
        )
    if surrogate.level == "none":
        return
    weighs_scores = surrogate.ratio == "current/behavior" and surrogate.gradient == "logprob"
    if not weighs_scores or surrogate.level != "token" or surrogate.probability_gap is not None:
        raise ConfigError(
            f"{key} needs a surrogate that multiplies the score of each token by a constant; set algorithm=rloo, or "
            'algorithm.surrogate = { level = "token", ratio = "current/behavior", treatment = "truncate", upper = 2, '
            'gradient = "logprob" }.'
        )
    if surrogate.treatment == "raw":
        raise ConfigError(
            f"{key} has no effect: the score is centred already where the ratio current/behavior has no bounds; leave "
            'it out, or set algorithm.surrogate.treatment = "truncate" or "mask".'
        )


def _check(key: str, ratio: RatioConfig, rules: tuple[Rule, ...]) -> None:
    if ratio.level == "none":
        _check_switched_off(key, ratio)
        return
    for broken, wrong, fix in rules:
        if broken(ratio):
            raise ConfigError(f"{key} {wrong}; {fix}.")


def _check_switched_off(key: str, ratio: RatioConfig) -> None:
    given = [f"{key}.{name}" for name, neutral in _UNUSED.items() if getattr(ratio, name) != neutral]
    if given:
        raise ConfigError(
            f'{key}.level is "none", so there is no ratio for {" and ".join(given)} to treat; leave that out, or set '
            f'{key}.level to "token", "sequence" or "geometric_mean".'
        )
