"""Coverage of the intervals, by simulation, and the metrics without one."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
import torch
from torch import Tensor

from betterhalf.diagnostics.intervals import EXTREMES, POSITIVE, SIGNED, confidence_intervals, student_t
from betterhalf.diagnostics.logprob_gap import mismatch_metrics

REQUIRED = 0.9
"""Coverage that nominal 95% must reach, within two standard errors of a simulation."""

REPETITIONS = 80

Data = tuple[Tensor, Tensor, Tensor, int, Tensor]


def noise(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """Token noise of standard deviation 1."""
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    if kind == "student_t":
        chi2 = torch.randn(5, count, generator=generator, dtype=torch.float64).square().sum(0)
        return normal / (chi2 / 5).sqrt() / math.sqrt(5 / 3)
    if kind == "mixture":
        wide = torch.rand(count, generator=generator) < 0.05
        return torch.where(wide, 5 * normal, normal) / math.sqrt(0.95 + 0.05 * 25)
    return normal


def probe_like(kind: str, sigma: float, prompts: int, seed: int) -> Data:
    """Four completions of 16 to 48 tokens for each prompt; prompts differ in noise, each completion has its own
    shift, likely tokens move less, and no probability exceeds 1."""
    generator = torch.Generator().manual_seed(seed)
    count = 4 * prompts
    lengths = torch.randint(16, 49, (count,), generator=generator)
    owner_C = torch.arange(count).repeat_interleave(lengths)
    prompt_S = torch.arange(count) // 4
    scale_S = torch.exp(0.3 * torch.randn(prompts, generator=generator, dtype=torch.float64))[prompt_S]
    mu_C = torch.rand(len(owner_C), generator=generator, dtype=torch.float64).sqrt().clamp(1e-4, 0.999)
    shift_S = torch.randn(count, generator=generator, dtype=torch.float64)
    d_C = sigma * (scale_S[owner_C] * noise(kind, len(owner_C), generator) * (1.2 - mu_C) + 0.05 * shift_S[owner_C])
    return (mu_C.log() + d_C).clamp(max=-1e-6), mu_C.log(), owner_C, count, prompt_S


def test_intervals_cover_for_every_kind_of_noise_and_every_metric_that_has_one() -> None:
    started = time.process_time()
    with_interval: Counter[str] = Counter()
    for kind in ("normal", "student_t", "mixture"):
        *data, _ = probe_like(kind, 0.05, 10_000, 1_000_000)
        truth = mismatch_metrics(*data)
        covered: Counter[str] = Counter()
        found: Counter[str] = Counter()
        for seed in range(REPETITIONS):
            trainer, behavior, owner, count, prompts = probe_like(kind, 0.05, 16, seed)
            settings = {"resamples": 100, "confidence": 0.95, "seed": seed, "cluster_index_S": prompts}
            intervals = confidence_intervals(trainer, behavior, owner, count, **settings)
            for name, interval in intervals.items():
                if interval.reason is None:
                    found[name] += 1
                    covered[name] += interval.low <= truth[name] <= interval.high
                else:
                    assert math.isnan(interval.low) and math.isnan(interval.high)
        shares = {name: covered[name] / count for name, count in found.items()}
        least = {name: REQUIRED - 2 * math.sqrt(0.09 / count) for name, count in found.items()}
        assert {name: share for name, share in shares.items() if share < least[name]} == {}, kind
        assert sum(covered.values()) / sum(found.values()) > 0.93
        with_interval += found
    for name in (*SIGNED, *POSITIVE, "pearson", "ess_fraction"):
        assert with_interval[f"mismatch/{name}"] > 0.85 * 3 * REPETITIONS, name
    assert with_interval["mismatch/log_ratio/p99_abs"] > REPETITIONS
    assert time.process_time() - started < 30.0


def test_a_small_effective_sample_size_has_no_interval_and_says_why() -> None:
    """Intervals made of 64 completions miss a true share of 0.45 two times in five."""
    data = probe_like("normal", 0.2, 16, 0)
    settings = {"resamples": 50, "confidence": 0.95, "seed": 0}
    found = confidence_intervals(*data[:4], **settings, cluster_index_S=data[4])["mismatch/ess_fraction"]
    assert math.isnan(found.low) and found.reason is not None
    assert "above 0.25 a sample may lack the large weights" in found.reason


def test_percentiles_of_sequences_take_368_independent_completions() -> None:
    settings = {"resamples": 20, "confidence": 0.95, "seed": 0}
    names = ("mismatch/sequence_log_ratio/p1", "mismatch/sequence_log_ratio/p99")
    few = confidence_intervals(*probe_like("normal", 0.05, 16, 0)[:4], **settings)
    for name in names:
        assert (
            few[name].reason and "64 completions" in few[name].reason and "95% confidence takes 368" in few[name].reason
        )
    *data, _ = probe_like("normal", 0.05, 10_000, 1_000_000)
    truth = mismatch_metrics(*data)
    covered: Counter[str] = Counter()
    for seed in range(25):
        *data, prompts = probe_like("normal", 0.05, 600, seed)
        many = confidence_intervals(*data, **(settings | {"resamples": 2}), cluster_index_S=prompts)
        for name in names:
            assert many[name].reason is None
            covered[name] += many[name].low <= truth[name] <= many[name].high
    assert min(covered.values()) >= 22


def test_few_completions_are_never_called_equivalent_to_none() -> None:
    trainer_C, behavior_C, owner_C, *_ = probe_like("normal", 0.05, 1, 0)
    few_C = owner_C < 3
    found = confidence_intervals(
        *(trainer_C[few_C], behavior_C[few_C], owner_C[few_C], 3), resamples=20, confidence=0.95, seed=0
    )
    reason = found["mismatch/sequence_log_ratio/p99"].reason
    assert reason and "3 completions, equivalent to fewer than 1 independent one, are too few" in reason


def test_extremes_and_counts_have_no_interval() -> None:
    found = confidence_intervals(*probe_like("normal", 0.05, 16, 0)[:4], resamples=20, confidence=0.95, seed=0)
    for name in EXTREMES:
        assert found[f"mismatch/{name}"].reason == (
            "an extreme grows with the number of tokens, so there is no fixed value to bracket"
        )
    assert found["mismatch/tokens"].reason == "a count, not an estimate"


def test_what_one_completion_carries_has_no_interval() -> None:
    behavior = torch.full((40,), -1.0, dtype=torch.float64)
    trainer = behavior.clone()
    trainer[:4] -= torch.tensor([0.1, -0.2, 0.3, 0.1], dtype=torch.float64)
    owner = torch.arange(40) // 4
    settings = {"resamples": 100, "confidence": 0.95, "seed": 0}
    found = confidence_intervals(trainer, behavior, owner, 10, **settings)["mismatch/k3/mean"]
    assert found.reason == "one of 10 completions carries nearly all of it"
    alone = confidence_intervals(trainer[:4], behavior[:4], owner[:4], 1, **settings)["mismatch/k3/mean"]
    assert alone.reason == "a single completion gives no estimate of the spread"


def test_no_mismatch_at_all_is_an_interval_of_no_width() -> None:
    logprobs = torch.linspace(-2, -0.1, 40, dtype=torch.float64)
    found = confidence_intervals(logprobs, logprobs, torch.arange(40) // 4, 10, resamples=50, confidence=0.95, seed=0)
    for name in ("k3/mean", "log_ratio/std", "slope_per_1k"):
        interval = found[f"mismatch/{name}"]
        assert (interval.low, interval.high, interval.reason) == (0.0, 0.0, None)
    assert found["mismatch/ess_fraction"].low == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 15, 2.1314), (0.95, 5, 2.0150), (0.975, 1e6, 1.95997)],
)
def test_students_t_is_that_of_the_tables(probability: float, freedom: float, expected: float) -> None:
    assert student_t(probability, freedom) == pytest.approx(expected, abs=1e-4)
