"""The results of one (trainer dtype, rollout dtype) pair, as `probe.json` holds them.

Axes: C completion tokens, S sequences.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.diagnostics.budget import Budget, fit_budget
from betterhalf.diagnostics.intervals import Interval, confidence_intervals
from betterhalf.diagnostics.logprob_gap import (
    PROBABILITY_EDGES,
    GapBin,
    completion_positions,
    k3,
    mismatch_bins,
    mismatch_metrics,
    position_edges,
)

MAX_POINTS = 1000
"""Maximum number of tokens in the scatter plot; `tokens.parquet` has them all."""

_SIGNIFICANT = 9
"""Significant digits of a probability in the scatter plot; FP32 has no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One quantity and its confidence interval."""

    value: float
    """Point estimate."""
    low: float
    """NaN where there is no interval."""
    high: float
    """NaN where there is no interval."""
    reason: str | None
    """Reason why there is no interval; None if there is one."""


RAW_RATIO = 10.0
"""Factor by which k3 must be smaller at temperature 1 than at the stated temperature for logprobs to count as raw.

Measured with the demo model and SmolLM2-135M at temperatures 0.6 to 0.9: raw logprobs give 18 (BF16, 0.9) to 1e9
(FP32), processed ones at most 0.06. Two policies that truly differ give about 1 at either temperature.
"""

_RAW_LEAST = 1e-8
"""k3 below which both values are rounding noise, and so is their ratio; a wrong temperature gives 1e-4 or more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemperatureFit:
    """Fit of given behavior logprobs to softmax(logits / temperature) and to softmax(logits), which raw ones fit."""

    stated: float
    """Temperature that the file, or else the configuration, states; not 1."""
    k3_at_stated: float
    """Mean k3 in nats when the trainer divides its logits by the stated temperature."""
    k3_at_1: float
    """Mean k3 in nats when the trainer does not divide its logits."""
    tokens: int
    """Number of tokens in both means."""
    raw: bool
    """True if the logprobs fit temperature 1: k3 is at least `RAW_RATIO` times smaller there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReport:
    """Results of one pair. With `error` set, it could not be measured: numbers are NaN, and series are empty."""

    train: str
    """Trainer dtype; `dump` if the trainer logprobs come from a file."""
    rollout: str
    """Rollout dtype; `dump` if a file does not state it."""
    seconds: float
    """Time to score these rollouts with this trainer; sampling and building the trainer are counted separately."""
    k3: float = math.nan
    """Mean over tokens, in nats."""
    k3_ci: tuple[float, float] = (math.nan, math.nan)
    """Confidence interval of k3; NaN if there is none, for the reason given in `metrics`."""
    mean_abs: float = math.nan
    """Mean of abs(pi - mu), in probability."""
    max_abs: float = math.nan
    """Largest abs(pi - mu)."""
    sequence_kl: float = math.nan
    """KL(mu || pi) of a whole completion in nats: the mean over completions of the summed token k3, which by the chain
    rule is unbiased, and is far less noisy than k3 of the sums."""
    slope_per_1k: float = math.nan
    """Least-squares slope of the sequence log-ratio against length, in nats per 1,000 tokens."""
    tokens: int = 0
    """Number of completion tokens, C."""
    metrics: dict[str, Estimate]
    """Every `mismatch/` metric, by its name without that prefix."""
    budget: Budget | None = None
    """Length up to which sequence weights are useful; None if the pair could not be measured."""
    points: tuple[tuple[float, float], ...] = ()
    """(mu, pi) of at most `MAX_POINTS` tokens, evenly thinned."""
    completions: tuple[tuple[int, float], ...] = ()
    """(length, sequence log-ratio) of each completion."""
    by_position: tuple[GapBin, ...] = ()
    """Bins by position in the completion."""
    by_probability: tuple[GapBin, ...] = ()
    """Bins by mu."""
    temperature: TemperatureFit | None = None
    """Temperature that given logprobs fit; None if the stated temperature is 1 or the logprobs are not given."""
    error: str | None = None
    """Reason why the pair could not be measured; None if it was."""

    def to_json(self) -> dict[str, Any]:
        """Return the pair as in `probe.json`; a failed one has its dtypes, seconds and error only."""
        if self.error is not None:
            return {"train": self.train, "rollout": self.rollout, "seconds": self.seconds, "error": self.error}
        fields = asdict(self)
        del fields["error"]
        return fields


def failed_pair(train: str, rollout: str, error: str, *, seconds: float = 0.0) -> PairReport:
    """Return the report of a pair that could not be measured."""
    return PairReport(train=train, rollout=rollout, seconds=seconds, metrics={}, error=error)


def temperature_fit(stated: float, behavior_logprobs_C: Tensor, at_stated_C: Tensor, at_1_C: Tensor) -> TemperatureFit:
    """Compare behavior logprobs with the trainer's at the stated temperature and at 1; float64 [C] each."""
    at_stated, at_1 = (float(k3(pi_C - behavior_logprobs_C).mean()) for pi_C in (at_stated_C, at_1_C))
    return TemperatureFit(
        stated=stated,
        k3_at_stated=at_stated,
        k3_at_1=at_1,
        tokens=behavior_logprobs_C.numel(),
        raw=at_stated > _RAW_LEAST and at_stated >= RAW_RATIO * at_1,
    )


def pair_report(
    train: str,
    rollout: str,
    trainer_logprobs_C: Tensor,
    behavior_logprobs_C: Tensor,
    sequence_index_C: Tensor,
    num_sequences: int,
    *,
    seconds: float,
    bootstrap: int,
    confidence: float,
    seed: int,
    cluster_index_S: Tensor | None = None,
) -> PairReport:
    """Measure one pair.

    Args:
        train: trainer dtype.
        rollout: rollout dtype.
        trainer_logprobs_C: [C], log pi at the weights that sampled.
        behavior_logprobs_C: [C], log mu.
        sequence_index_C: int64 [C], which completion each token belongs to; its tokens are contiguous and in order.
        num_sequences: number of sequences, S; each has at least one token.
        seconds: time that scoring took.
        bootstrap: number of resamples for the intervals.
        confidence: level of the intervals.
        seed: seed of the resamples.
        cluster_index_S: int64 [S], which prompt each completion continues; see `confidence_intervals`.

    Raises:
        EngineNumericsError: behavior logprobs are not finite.
        NumericsError: trainer logprobs are not finite.
        ValueError: there are no tokens.
    """
    trainer_C, behavior_C = trainer_logprobs_C.detach().double(), behavior_logprobs_C.detach().double()
    data = (trainer_C, behavior_C, sequence_index_C, num_sequences)
    values = mismatch_metrics(*data)
    intervals = confidence_intervals(
        *data, resamples=bootstrap, confidence=confidence, seed=seed, cluster_index_S=cluster_index_S
    )
    d_C = ops.log_ratio(trainer_C, behavior_C)
    return PairReport(
        train=train,
        rollout=rollout,
        seconds=seconds,
        k3=values["mismatch/k3/mean"],
        k3_ci=(intervals["mismatch/k3/mean"].low, intervals["mismatch/k3/mean"].high),
        mean_abs=values["mismatch/prob_gap/mean_abs"],
        max_abs=max(abs(values["mismatch/prob_gap/max"]), abs(values["mismatch/prob_gap/min"])),
        sequence_kl=float(k3(d_C).sum()) / num_sequences,
        slope_per_1k=values["mismatch/slope_per_1k"],
        tokens=d_C.numel(),
        metrics=_estimates(values, intervals),
        budget=fit_budget(d_C, sequence_index_C, num_sequences),
        points=_points(behavior_C, trainer_C),
        completions=_completions(d_C, sequence_index_C, num_sequences),
        by_position=_by_position(trainer_C, behavior_C, sequence_index_C),
        by_probability=mismatch_bins(trainer_C, behavior_C, behavior_C.exp(), PROBABILITY_EDGES),
    )


def _estimates(values: dict[str, float], intervals: dict[str, Interval]) -> dict[str, Estimate]:
    return {
        name.removeprefix("mismatch/"): Estimate(
            value=value, low=intervals[name].low, high=intervals[name].high, reason=intervals[name].reason
        )
        for name, value in values.items()
    }


def _points(behavior_C: Tensor, trainer_C: Tensor) -> tuple[tuple[float, float], ...]:
    count = min(MAX_POINTS, len(behavior_C))
    chosen = torch.linspace(0, len(behavior_C) - 1, count, dtype=torch.float64).round().long()
    pairs = zip(behavior_C[chosen].exp().tolist(), trainer_C[chosen].exp().tolist(), strict=True)
    return tuple((_short(mu), _short(pi)) for mu, pi in pairs)


def _short(value: float) -> float:
    return float(f"{value:.{_SIGNIFICANT}g}")


def _completions(d_C: Tensor, sequence_index_C: Tensor, num_sequences: int) -> tuple[tuple[int, float], ...]:
    lengths = torch.bincount(sequence_index_C, minlength=num_sequences).tolist()
    return tuple(zip(lengths, ops.segment_sum(d_C, sequence_index_C, num_sequences).tolist(), strict=True))


def _by_position(trainer_C: Tensor, behavior_C: Tensor, sequence_index_C: Tensor) -> tuple[GapBin, ...]:
    positions_C = completion_positions(sequence_index_C)
    return mismatch_bins(trainer_C, behavior_C, positions_C, position_edges(int(positions_C.max()) + 1))
