"""The section `[algorithm.kl]`: the penalty on the KL divergence from the policy to a reference policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from betterhalf.config.section import Section
from betterhalf.types import KlEstimator, KlPlace

_ESTIMATORS: dict[KlPlace, KlEstimator] = {"loss": "k3", "reward": "k1"}
"""Default estimator of each place, as in verl and TRL."""


class KlConfig(Section):
    """Penalty on KL(pi || reference). The reference is the starting policy, or a later copy of the policy."""

    coefficient: float = Field(0.0, ge=0)
    """Factor of the penalty. 0: no penalty, and no reference policy is kept."""
    place: KlPlace = "loss"
    """`loss`: add the penalty of each token to its loss. `reward`: subtract the sum over a completion's tokens from its
    reward, before advantages are computed."""
    estimator: KlEstimator = _ESTIMATORS["loss"]
    """Estimator of the KL divergence at each token; `k3` by default in the loss, `k1` in the reward."""
    refresh_every: int = Field(0, ge=0)
    """Number of steps after which the current policy becomes the reference; 0 keeps the starting policy."""

    @model_validator(mode="before")
    @classmethod
    def _take_the_estimator_of_the_place(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("estimator") is not None:
            return given
        return {**given, "estimator": _default_estimator(given)}


def own_kl_choices(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices of a resolved section, without an estimator that is the default of its place."""
    if section.get("estimator") == _default_estimator(section):
        return {key: value for key, value in section.items() if key != "estimator"}
    return dict(section)


def _default_estimator(section: Mapping[str, Any]) -> KlEstimator:
    """Return the default for the section's place; that of the loss for an unknown place, which the schema refuses."""
    return _ESTIMATORS["reward" if section.get("place") == "reward" else "loss"]


NO_KL = KlConfig()
"""No penalty."""
