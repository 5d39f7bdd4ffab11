"""Everything cut off is counted, and rejected tokens leave the denominator if configured."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from betterhalf.algorithms.denominators import kept_counts, train_denominators
from betterhalf.algorithms.loss_stats import LossStats, largest_token_share, policy_metrics
from betterhalf.algorithms.policy_loss import LossOutput, kept_mask, policy_loss
from betterhalf.algorithms.presets import PRESETS, Algorithm, resolve_algorithm
from betterhalf.batches import Denominators, LossInputs, TokenTensors
from betterhalf.config.schema import AlgorithmConfig, RatioConfig
from betterhalf.distributed.world import SingleProcess, reduce_over_ranks
from betterhalf.metrics.names import check_known

INDEX = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
"""A long completion of five tokens and a short one of three, under a limit of eight."""


def loss_of(
    algorithm: Algorithm,
    *,
    drift: list[float] | None = None,
    mismatch: list[float] | None = None,
    advantages: tuple[float, float] = (1.0, -1.0),
    of: Denominators | None = None,
) -> tuple[LossOutput, Tensor]:
    """Return loss and gradient of tokens with these ratios current/proximal and proximal/behavior."""
    behavior = torch.full((8,), -3.0, dtype=torch.float64)
    proximal = behavior + torch.tensor(mismatch or [1.0] * 8, dtype=torch.float64).log()
    current = (proximal + torch.tensor(drift or [1.0] * 8, dtype=torch.float64).log()).requires_grad_()
    output = policy_loss(
        algorithm,
        LossInputs(
            current_logprobs_C=current,
            proximal_logprobs_C=proximal,
            behavior_logprobs_C=behavior,
            advantages_S=torch.tensor(advantages),
            sequence_index_C=INDEX,
        ),
        of or Denominators(sequences=2.0, tokens=8.0, max_tokens=8),
    )
    (gradient,) = torch.autograd.grad(output.loss, current)
    return output, gradient


def tokens_with(mismatch: list[float]) -> TokenTensors:
    """Return tokens with these ratios proximal/behavior."""
    return TokenTensors(
        proximal_logprobs_C=torch.tensor(mismatch, dtype=torch.float64).log() - 3,
        behavior_logprobs_C=torch.full((8,), -3.0, dtype=torch.float64),
        advantages_S=torch.tensor([1.0, -1.0]),
        sequence_index_C=INDEX,
    )


def kept(algorithm: Algorithm, mismatch: list[float]) -> Tensor:
    return kept_mask(algorithm, tokens_with(mismatch))


def test_clip_counts_tokens_without_gradient_only() -> None:
    # With advantage 1, only 1.5 of 1.5, 0.5, 1.2 is clipped; with advantage -1, only 0.7 of 0.7, 1.5, 1.
    output, gradient = loss_of(PRESETS["grpo"], drift=[1.5, 0.5, 1.2, 1, 1, 0.7, 1.5, 1])
    metrics = policy_metrics(output.stats)
    assert metrics["policy/clip_fraction"] == 2 / 8 == (gradient == 0).double().mean().item()
    assert metrics["policy/mask_fraction"] == metrics["policy/truncate_fraction"] == 0
    assert metrics["policy/ratio/mean"] == pytest.approx((1.5 + 0.5 + 1.2 + 1 + 1 + 0.7 + 1.5 + 1) / 8)
    assert metrics["policy/ratio/max"] == pytest.approx(1.5)


def test_dual_clip_counts_as_clip() -> None:
    output, gradient = loss_of(PRESETS["dapo"], drift=[1, 1, 1, 1, 1, 11, 9, 1])
    assert policy_metrics(output.stats)["policy/clip_fraction"] == 1 / 8
    assert gradient[5] == 0


def test_masks_are_counted_by_length() -> None:
    # icepop keeps 0.5 to 5: it drops two of the five tokens of the long completion, one of the three of the short one.
    output, _ = loss_of(PRESETS["icepop"], mismatch=[6, 0.4, 1, 1, 2, 7, 1, 1])
    metrics = policy_metrics(output.stats)
    assert metrics["policy/mask_fraction"] == 3 / 8
    assert metrics["policy/rejected_share/long"] == 2 / 5
    assert metrics["policy/rejected_share/short"] == pytest.approx(1 / 3)


def test_effective_sample_size_before_and_after_truncation_by_hand() -> None:
    # Weights 9, 1 x 7: (9 + 7)^2 / (8 (81 + 7)) = 4 / 11. Capped at 3: (3 + 7)^2 / (8 (9 + 7)) = 25 / 32.
    output, _ = loss_of(PRESETS["grpo_token_tis"], mismatch=[9.0] + [1.0] * 7)
    metrics = policy_metrics(output.stats)
    assert metrics["policy/truncate_fraction"] == 1 / 8
    assert metrics["policy/ess_before"] == pytest.approx(4 / 11)
    assert metrics["policy/ess_after"] == pytest.approx(25 / 32)


def test_effective_sample_size_after_masking_counts_the_dropped() -> None:
    # Seven equal weights of eight: 7^2 / (8 x 7) = 7 / 8.
    output, _ = loss_of(PRESETS["icepop"], mismatch=[9.0] + [1.0] * 7)
    assert policy_metrics(output.stats)["policy/ess_after"] == pytest.approx(7 / 8)


def test_clipped_tokens_carry_no_weight() -> None:
    # Ratios 1.5 (clipped for A > 0) and seven of 1: before (1.5 + 7)^2 / (8 (2.25 + 7)), after 7 / 8.
    output, _ = loss_of(PRESETS["grpo"], drift=[1.5] + [1.0] * 7)
    metrics = policy_metrics(output.stats)
    assert metrics["policy/ess_before"] == pytest.approx(8.5**2 / 74)
    assert metrics["policy/ess_after"] == pytest.approx(7 / 8)


def test_everything_masked_leaves_no_effective_sample_and_no_gradient() -> None:
    output, gradient = loss_of(PRESETS["icepop"], mismatch=[9.0] * 8)
    metrics = policy_metrics(output.stats)
    assert (metrics["policy/ess_before"], metrics["policy/ess_after"]) == (pytest.approx(1.0), 0.0)
    assert output.loss == 0 and not gradient.any()


def test_bounded_log_ratios_are_counted_and_have_no_gradient() -> None:
    huge = math.exp(25)
    output, gradient = loss_of(PRESETS["grpo"], drift=[1, 1, 1, 1, 1, huge, 1, 1])
    assert policy_metrics(output.stats)["policy/bounded_fraction"] == 1 / 8
    assert policy_metrics(output.stats)["policy/ratio/max"] == pytest.approx(math.exp(20))
    assert gradient[5] == 0 and gradient[6] != 0


def test_loss_metric_is_the_mean_over_train_batches() -> None:
    output, _ = loss_of(PRESETS["grpo"])
    both = output.stats + output.stats
    assert policy_metrics(both, train_batches=2)["policy/loss"] == pytest.approx(output.loss.item())


def test_nothing_adds_nothing_and_reports_neutral_values() -> None:
    output, _ = loss_of(PRESETS["icepop"], mismatch=[9.0] + [1.0] * 7)
    assert policy_metrics(LossStats.empty() + output.stats) == policy_metrics(output.stats)
    ones = ("policy/ess_before", "policy/ess_after", "policy/ratio/mean", "policy/ratio/max")
    neutral = dict.fromkeys((*ones, "policy/ratio/max_negative"), 1.0)
    nothing = policy_metrics(LossStats.empty())
    assert nothing == {name: neutral.get(name, 0.0) for name in nothing}


DRIFT = [1.5, 0.5, 9, 1, 1, 0.7, 4, 1]
"""Ratios current/proximal; 4 is the largest of the second completion, whose advantage is negative."""


@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo", "pg_seq_is", "icepop", "dppo_tv", "reinforce"])
def test_the_largest_ratio_of_negative_advantage_is_that_of_single_tokens_for_every_algorithm(preset: str) -> None:
    # With a ratio to the engine, of whole sequences, without a ratio, clipped or masked: current/proximal of a token.
    output, _ = loss_of(PRESETS[preset], drift=DRIFT, mismatch=[3.0] * 8)
    assert policy_metrics(output.stats)["policy/ratio/max_negative"] == pytest.approx(4)
    swapped, _ = loss_of(PRESETS[preset], drift=DRIFT, advantages=(-1.0, 1.0))
    assert policy_metrics(swapped.stats)["policy/ratio/max_negative"] == pytest.approx(9)
    for advantages in ((1.0, 1.0), (1.0, 0.0)):
        none, _ = loss_of(PRESETS[preset], drift=DRIFT, advantages=advantages)
        assert policy_metrics(none.stats)["policy/ratio/max_negative"] == 1


def test_a_ratio_below_one_stays_below_one_and_a_huge_one_is_bounded() -> None:
    for drift, expected in (([0.5] * 8, 0.5), ([1.0] * 7 + [1e30], math.exp(20))):
        output, _ = loss_of(PRESETS["pg_seq_is"], drift=drift)
        assert policy_metrics(output.stats)["policy/ratio/max_negative"] == pytest.approx(expected)


def test_without_measured_logprobs_no_ratio_is_counted() -> None:
    # A pack outside the measured sample, for an algorithm that does not read the anchor.
    current = torch.full((8,), -3.0)
    inputs = LossInputs(
        current_logprobs_C=current,
        behavior_logprobs_C=current - 2,
        advantages_S=torch.tensor([1.0, -1.0]),
        sequence_index_C=INDEX,
    )
    stats = policy_loss(PRESETS["pg_seq_is"], inputs, Denominators(sequences=2.0, tokens=8.0, max_tokens=8)).stats
    metrics = policy_metrics(stats)
    assert metrics["policy/ratio/max_negative"] == 1 and metrics["policy/ratio/max"] == pytest.approx(math.exp(10))


def test_the_largest_ratio_of_packs_and_optimizer_steps_is_their_maximum() -> None:
    packs = [loss_of(PRESETS["grpo"], drift=[1.0] * 7 + [ratio])[0].stats for ratio in (2.0, 64.0, 0.5)]
    assert policy_metrics(sum(packs, LossStats.empty()), 3)["policy/ratio/max_negative"] == pytest.approx(64)


def with_gradient(*rows: list[float]) -> LossStats:
    """Return statistics of one micro-batch with these gradients of tokens."""
    return LossStats.empty().with_gradient(torch.tensor(rows, dtype=torch.float16))


def test_the_share_of_the_largest_token_by_hand() -> None:
    # Norms 5, 12 and 0: 12 / sqrt(25 + 144).
    one = with_gradient([3, 4], [0, 12], [0, 0])
    assert largest_token_share(one) == pytest.approx(12 / 13)
    # A second pack with norms 84: 84 / sqrt(25 + 144 + 84^2) = 84 / 85.
    assert largest_token_share(one + with_gradient([84, 0])) == pytest.approx(84 / 85)
    assert largest_token_share(with_gradient([1, 0], [0, 1], [-1, 0], [0, -1])) == pytest.approx(1 / 2)
    assert largest_token_share(with_gradient([7e-8, 0])) == 1
    # Norms beyond FP16, whose squares would be infinite in it.
    assert largest_token_share(with_gradient([4e4, 3e4], [0, 0])) == 1


def test_without_a_gradient_no_token_has_a_share() -> None:
    assert largest_token_share(LossStats.empty()) == largest_token_share(with_gradient([0, 0])) == 0
    nothing = LossStats.empty().with_gradient(torch.zeros(0, 2))
    assert largest_token_share(nothing) == 0


class TwoRanks(SingleProcess):
    """One of two ranks; the other has a larger gradient and a larger ratio."""

    def __init__(self, own: LossStats, other: LossStats) -> None:
        self.added, self.larger = ([getattr(other, name) for name in names] for names in (SUMMED, LARGEST))

    def sum_(self, values: Tensor) -> None:
        values += torch.tensor([*self.added, 1.0], dtype=torch.float64)

    def max_(self, values: Tensor) -> None:
        torch.maximum(values, torch.tensor(self.larger, dtype=torch.float64), out=values)


LARGEST = ("ratio_max", "ratio_max_negative", "gradient_squared_max")
SUMMED = tuple(field.name for field in fields(LossStats) if field.name not in (*LARGEST, "own"))


def test_ratio_and_share_are_those_of_all_ranks() -> None:
    ranks = [
        loss_of(PRESETS["grpo"], drift=[1.0] * 7 + [ratio])[0].stats.with_gradient(torch.tensor([row]))
        for ratio, row in ((2.0, [3.0, 4.0]), (8.0, [0.0, 12.0]))
    ]
    reduced = reduce_over_ranks(ranks[0], TwoRanks(*ranks))
    assert reduced.ratio_max_negative == pytest.approx(8)
    assert (reduced.gradient_squared, reduced.gradient_squared_max) == pytest.approx((169, 144))
    assert reduced.tokens == 16


def test_every_policy_metric_is_in_the_catalogue() -> None:
    check_known(policy_metrics(LossStats.empty()))


def test_statistics_carry_no_graph() -> None:
    output, _ = loss_of(PRESETS["pg_seq_tis"])
    names = [name for name in output.stats.__slots__ if name != "own"]
    assert not any(getattr(output.stats, name).requires_grad for name in names)


def test_a_ratio_exactly_at_a_mask_bound_is_kept_and_the_next_number_is_not() -> None:
    ratio = torch.tensor(0.7, dtype=torch.float64).exp().item()
    for upper, masked in ((ratio, 0.0), (math.nextafter(ratio, 0), 1.0)):
        mask = RatioConfig(level="token", ratio="proximal/behavior", treatment="mask", upper=upper)
        algorithm = resolve_algorithm(AlgorithmConfig(preset="grpo", correction=mask))
        zero = torch.zeros(1, dtype=torch.float64)
        output = policy_loss(
            algorithm,
            LossInputs(
                current_logprobs_C=zero.clone().requires_grad_(),
                proximal_logprobs_C=zero,
                behavior_logprobs_C=zero - 0.7,
                advantages_S=torch.ones(1),
                sequence_index_C=torch.zeros(1, dtype=torch.int64),
            ),
            Denominators(sequences=1.0, tokens=1.0, max_tokens=1),
        )
        assert output.stats.masked == masked


def test_a_ratio_exactly_at_the_clip_keeps_its_whole_gradient() -> None:
    # clamp and maximum each have a tie here; the gradient must still be -A r / 8 / 2, not a part of it.
    ratio = torch.tensor(0.25, dtype=torch.float64).exp().item()
    clip = RatioConfig(level="token", treatment="clip", lower=0.5, upper=ratio)
    algorithm = resolve_algorithm(AlgorithmConfig(preset="grpo", surrogate=clip))
    current = torch.tensor([0.25], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    output = policy_loss(
        algorithm,
        LossInputs(
            current_logprobs_C=current,
            proximal_logprobs_C=zero,
            behavior_logprobs_C=zero,
            advantages_S=torch.ones(1),
            sequence_index_C=torch.zeros(1, dtype=torch.int64),
        ),
        Denominators(sequences=2.0, tokens=2.0, max_tokens=8),
    )
    (gradient,) = torch.autograd.grad(output.loss, current)
    assert gradient.item() == pytest.approx(-ratio / 16) and output.stats.clipped == 0


# -- denominators


def test_kept_mask_is_what_the_loss_drops_before_any_update() -> None:
    mismatch = [6, 0.4, 1, 1, 2, 7, 1, 1]
    assert kept(PRESETS["icepop"], mismatch).tolist() == [False, False, True, True, True, False, True, True]
    # The products, 4.8 of the long completion and 7 of the short one, exceed 3.
    assert not kept(PRESETS["grpo_seq_mis"], mismatch).any()
    assert kept(PRESETS["grpo"], mismatch).all()
    assert kept(PRESETS["pg_seq_mis"], [1, 1, 1, 1, 2, 4, 1, 1]).tolist() == [True] * 5 + [False] * 3


def test_kept_counts_drop_a_sequence_when_nothing_of_it_is_left() -> None:
    index, three = torch.tensor([0, 0, 1, 1]), torch.tensor([False, True, False, False])
    sequences, tokens = kept_counts(three, index, 3)
    # Sequence 0 keeps one token, 1 keeps none, 2 has no tokens.
    assert (sequences.item(), tokens.item()) == (2, 1)


def test_denominators_follow_the_choice_and_never_reach_zero() -> None:
    everything, without = PRESETS["icepop"], replace(PRESETS["icepop"], denominator="kept")
    of = Denominators(sequences=4.0, tokens=20.0, max_tokens=8)
    # The two sequences have eight tokens: the second loses all three of its tokens, the first keeps four.
    one, two = tokens_with([6, 1, 1, 1, 2, 7, 7, 0.1]), tokens_with([1.0] * 8)
    assert train_denominators(everything, [one, two], of) == of
    assert train_denominators(without, [one, two], of) == Denominators(sequences=3.0, tokens=12.0, max_tokens=8)
    assert train_denominators(without, [tokens_with([9.0] * 8)], of) == replace(of, sequences=1.0, tokens=1.0)


def test_masks_before_the_first_update_need_the_proximal_logprobs() -> None:
    with pytest.raises(ValueError, match="need proximal_logprobs"):
        kept_mask(PRESETS["icepop"], replace(tokens_with([1.0] * 8), proximal_logprobs_C=None))


def test_kept_denominator_makes_the_sequence_mean_one_over_kept_tokens() -> None:
    # On policy with weight 1: two of five and three of three tokens kept, so -1 and +1 for the means of the sequences.
    mask = RatioConfig(level="token", ratio="proximal/behavior", treatment="mask", upper=1.5, keep_weight=False)
    config = AlgorithmConfig(preset="grpo", correction=mask, aggregation="sequence_mean", denominator="kept")
    _, gradient = loss_of(resolve_algorithm(config), mismatch=[2, 2, 2, 1, 1, 1, 1, 1])
    assert gradient.tolist() == pytest.approx([0, 0, 0, -1 / 4, -1 / 4, 1 / 6, 1 / 6, 1 / 6])
    _, fixed = loss_of(
        resolve_algorithm(config.model_copy(update={"denominator": "all"})), mismatch=[2, 2, 2, 1, 1, 1, 1, 1]
    )
    assert fixed.tolist() == pytest.approx([0, 0, 0, -1 / 10, -1 / 10, 1 / 6, 1 / 6, 1 / 6])
