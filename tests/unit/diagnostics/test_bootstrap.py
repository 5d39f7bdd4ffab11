"""The bootstrap against `mismatch_metrics` on explicitly resampled data."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from betterhalf.diagnostics.bootstrap import resampled_metrics
from betterhalf.diagnostics.intervals import confidence_intervals
from betterhalf.diagnostics.logprob_gap import mismatch_metrics


def sample(lengths: list[int], noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Trainer and behavior logprobs of completions of these lengths, and whose token each is."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    behavior = -torch.rand(count, generator=generator, dtype=torch.float64).mul(3).exp() + 1
    trainer = behavior + noise * torch.randn(count, generator=generator, dtype=torch.float64)
    return trainer.clamp(max=0.0), behavior, torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def copied(trainer: Tensor, behavior: Tensor, index: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, Tensor, int]:
    """The data with completion i repeated `counts[i]` times."""
    rows = [(index == i).nonzero().squeeze(1) for i, count in enumerate(counts) for _ in range(count)]
    chosen = torch.cat(rows)
    owner = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))
    return trainer[chosen], behavior[chosen], owner, len(rows)


@pytest.mark.parametrize("noise", [1e-7, 1e-3, 0.7])
@pytest.mark.parametrize("lengths", [[3, 1, 7, 40, 5, 12], [4, 4, 4], [150, 90, 200, 130]])
def test_every_metric_of_a_resample_equals_that_of_the_copied_data(lengths: list[int], noise: float) -> None:
    trainer, behavior, index = sample(lengths, noise)
    generator = torch.Generator().manual_seed(1)
    size = len(lengths)
    counts = [torch.randint(size, (size,), generator=generator).bincount(minlength=size) for _ in range(12)]
    counts += [torch.eye(size, dtype=torch.int64)[0] * size]
    found = resampled_metrics(trainer, behavior, index, size, torch.stack(counts))
    for row, drawn in enumerate(counts):
        expected = mismatch_metrics(*copied(trainer, behavior, index, drawn.tolist()))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name][row].item() == pytest.approx(value, rel=1e-8, abs=1e-8 * noise), (name, drawn)


def test_a_resample_of_equal_logprobs_has_no_mismatch_and_correlation_one() -> None:
    logprobs = torch.full((6,), -0.5, dtype=torch.float64)
    index = torch.tensor([0, 0, 1, 1, 1, 2])
    found = resampled_metrics(logprobs, logprobs, index, 3, torch.tensor([[2, 0, 1], [0, 3, 0]]))
    assert found["mismatch/k3/mean"].tolist() == [0.0, 0.0]
    assert found["mismatch/pearson"].tolist() == [1.0, 1.0]
    assert found["mismatch/ess_fraction"].tolist() == pytest.approx([1.0, 1.0])
    assert found["mismatch/tokens"].tolist() == [5.0, 9.0]


def test_intervals_are_seeded_and_widen_with_confidence() -> None:
    data = sample([20, 30, 25, 40, 10, 15, 35, 22, 18, 27], 0.05)
    first = confidence_intervals(*data, 10, resamples=300, confidence=0.95, seed=3)
    again = confidence_intervals(*data, 10, resamples=300, confidence=0.95, seed=3)
    other = confidence_intervals(*data, 10, resamples=300, confidence=0.95, seed=4)
    narrow = confidence_intervals(*data, 10, resamples=300, confidence=0.5, seed=3)
    assert repr(first) == repr(again)
    assert first["mismatch/k3/mean"] != other["mismatch/k3/mean"]
    outer, inner = first["mismatch/k3/mean"], narrow["mismatch/k3/mean"]
    assert outer.low < inner.low < mismatch_metrics(*data, 10)["mismatch/k3/mean"] < inner.high < outer.high


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    """400 one-token completions: 1.96 standard errors on either side of the mean."""
    trainer, behavior, index = sample([1] * 400, 0.1)
    found = confidence_intervals(trainer, behavior, index, 400, resamples=4000, confidence=0.95, seed=0)
    low, high = found["mismatch/log_ratio/mean"].low, found["mismatch/log_ratio/mean"].high
    d = trainer - behavior
    error = float(d.std(correction=0)) / 20
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    assert (high + low) / 2 == pytest.approx(float(d.mean()), abs=0.15 * error)


def test_identical_siblings_are_not_taken_for_independent() -> None:
    """Four copies of each completion carry no new information: resampling prompts sees that."""
    trainer, behavior, index = sample([10] * 12, 0.05)
    copies = torch.arange(4)
    many_index = (index.unsqueeze(1) * 4 + copies).flatten()
    prompts = torch.arange(48) // 4
    order = many_index.argsort(stable=True)
    data = (trainer.repeat_interleave(4)[order], behavior.repeat_interleave(4)[order], many_index[order], 48)
    settings = {"resamples": 2000, "confidence": 0.95, "seed": 0}

    def width(cluster: Tensor | None) -> float:
        found = confidence_intervals(*data, **settings, cluster_index_S=cluster)["mismatch/log_ratio/mean"]
        return found.high - found.low

    alone = confidence_intervals(trainer, behavior, index, 12, **settings)["mismatch/log_ratio/mean"]
    assert width(prompts) == pytest.approx(alone.high - alone.low, rel=1e-9)
    assert width(None) < 0.55 * width(prompts)


def test_few_prompts_leave_completions_to_be_resampled() -> None:
    data = sample([10] * 12, 0.05)
    settings = {"resamples": 100, "confidence": 0.9, "seed": 0}
    by_completion = confidence_intervals(*data, 12, **settings)
    by_prompt = confidence_intervals(*data, 12, **settings, cluster_index_S=torch.arange(12) // 4)
    assert repr(by_prompt) == repr(by_completion)


def test_completions_without_tokens_do_not_count() -> None:
    trainer, behavior, index = sample([5, 6, 7], 0.1)
    gaps = torch.tensor([1, 3, 4])[index]
    settings = {"resamples": 50, "confidence": 0.9, "seed": 0}
    expected = confidence_intervals(trainer, behavior, index, 3, **settings)
    assert repr(confidence_intervals(trainer, behavior, gaps, 6, **settings)) == repr(expected)


def test_a_thousand_resamples_of_a_default_probe_are_fast() -> None:
    data = sample([128] * 64, 1e-3)
    start = time.process_time()
    confidence_intervals(*data, 64, resamples=1000, confidence=0.95, seed=0, cluster_index_S=torch.arange(64) // 4)
    assert time.process_time() - start < 2.0
