"""Measurements and losses on padded tensors: those of the packed form, and those that TRL and verl log."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import betterhalf
from betterhalf.algorithms.denominators import train_denominators
from betterhalf.algorithms.policy_loss import policy_loss as packed_policy_loss
from betterhalf.algorithms.presets import PRESETS
from betterhalf.batches import Denominators, LossInputs
from betterhalf.config.schema import AlgorithmConfig
from betterhalf.diagnostics import budget, logprob_gap
from betterhalf.errors import ConfigError, EngineError, InputError, NumericsError, PrecisionWarning

B, L = 7, 12
NAN = float("nan")


def batch(seed: int = 0, noise: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """Return trainer and behavior logprobs [B, L] in float64 with garbage in the padding, and their mask."""
    draws = torch.Generator().manual_seed(seed)
    behavior = -torch.rand(B, L, generator=draws, dtype=torch.float64) * 3 - 1e-3
    trainer = (behavior + noise * torch.randn(B, L, generator=draws, dtype=torch.float64)).clamp(max=-1e-6)
    mask = torch.zeros(B, L, dtype=torch.int64)
    for row in range(B):
        start = (2, 0, 1, 0, 2, 1, 0)[row]
        mask[row, start : start + 3 + row] = 1
    mask[4, 3] = 0  # a hole
    garbage = torch.where(mask.bool(), 0.0, NAN)
    return trainer + garbage, behavior + garbage, mask


def packed(mask: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Return the values of the tokens row by row, and the row of each, by plain loops."""
    places = [(row, column) for row in range(B) for column in range(L) if mask[row, column]]
    index = torch.tensor([row for row, _ in places])
    return *(torch.stack([value[place] for place in places]) for value in values), index


def test_padded_metrics_equal_the_packed_ones() -> None:
    trainer, behavior, mask = batch()
    trainer_C, behavior_C, index_C = packed(mask, trainer, behavior)
    expected = logprob_gap.mismatch_metrics(trainer_C, behavior_C, index_C, B)
    assert betterhalf.mismatch_metrics(trainer, behavior, mask=mask) == expected
    assert betterhalf.mismatch_metrics(trainer, behavior, mask.bool()) == expected
    assert betterhalf.mismatch_metrics(trainer_C, behavior_C, sequence_index=index_C) == expected
    assert betterhalf.fit_budget(trainer, behavior, mask=mask, floor=0.3) == budget.fit_budget(
        trainer_C - behavior_C, index_C, B, floor=0.3
    )
    profile = logprob_gap.gap_profile(trainer_C, behavior_C, index_C, B, L)
    assert betterhalf.mismatch_profile(trainer, behavior, mask=mask) == profile


def test_padding_at_the_other_end_changes_nothing() -> None:
    trainer, behavior, mask = batch()
    moved = [torch.cat([torch.full((B, 5), NAN, dtype=torch.float64), x], dim=1) for x in (trainer, behavior)]
    longer = torch.cat([torch.zeros(B, 5, dtype=torch.int64), mask], dim=1)
    assert betterhalf.mismatch_metrics(*moved, mask=longer) == betterhalf.mismatch_metrics(trainer, behavior, mask=mask)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask].mean()


def test_the_metrics_that_trl_logs_follow_from_ours() -> None:
    """TRL 1.16, GRPOTrainer: `sampling/*`, from the absolute difference and the ratio of the completion tokens."""
    trainer, behavior, mask = batch()
    ours = betterhalf.mismatch_metrics(trainer, behavior, mask=mask)
    chosen = mask.bool()
    difference = (trainer - behavior).abs()[chosen]
    ratio = (trainer - behavior).exp()[chosen]
    assert ours["mismatch/log_ratio/mean_abs"] == pytest.approx(float(difference.mean()), rel=1e-12)
    assert ours["mismatch/log_ratio/max_abs"] == pytest.approx(float(difference.max()), rel=1e-12)
    assert math.exp(ours["mismatch/log_ratio/min"]) == pytest.approx(float(ratio.min()), rel=1e-12)
    assert math.exp(ours["mismatch/log_ratio/max"]) == pytest.approx(float(ratio.max()), rel=1e-12)
    # k3 = ratio - 1 - log_ratio, token by token
    mean = 1 + ours["mismatch/k3/mean"] + ours["mismatch/log_ratio/mean"]
    assert mean == pytest.approx(float(ratio.mean()), rel=1e-12)


def test_the_sequence_ratios_that_trl_logs_follow_from_the_profile() -> None:
    trainer, behavior, mask = batch()
    profile = betterhalf.mismatch_profile(trainer, behavior, mask=mask)
    ratios = [math.exp(total) for _, total in profile.completions]
    expected = torch.where(mask.bool(), trainer - behavior, 0.0).sum(-1).exp()
    assert ratios == pytest.approx(expected.tolist(), rel=1e-12)


def test_the_metrics_that_verl_logs_of_probabilities_follow_from_ours() -> None:
    """verl, utils/debug/metrics.py: `training/rollout_probs_diff_*` and the correlation."""
    trainer, behavior, mask = batch()
    ours = betterhalf.mismatch_metrics(trainer, behavior, mask=mask)
    pi, mu = (x.exp()[mask.bool()] for x in (trainer, behavior))
    difference, tokens = (pi - mu).abs(), ours["mismatch/tokens"]
    assert ours["mismatch/prob_gap/mean_abs"] == pytest.approx(float(difference.mean()), rel=1e-11)
    largest = max(ours["mismatch/prob_gap/max"], -ours["mismatch/prob_gap/min"])
    assert largest == pytest.approx(float(difference.max()), rel=1e-11)
    sample_std = ours["mismatch/prob_gap/std_abs"] * math.sqrt(tokens / (tokens - 1))
    assert sample_std == pytest.approx(float(difference.std()), rel=1e-11)
    correlation = torch.corrcoef(torch.stack([pi, mu]))[0, 1]
    assert ours["mismatch/pearson"] == pytest.approx(float(correlation), rel=1e-11)


def test_the_metrics_that_verl_logs_of_the_correction_follow_from_ours() -> None:
    """verl, trainer/ppo/rollout_corr_helper.py: `rollout_corr/*` without a correction, for ratios within exp(20)."""
    trainer, behavior, mask = batch()
    ours = betterhalf.mismatch_metrics(trainer, behavior, mask=mask)
    chosen = mask.bool()
    d = torch.where(chosen, trainer - behavior, 0.0)
    lengths = mask.sum(-1)
    assert ours["mismatch/k1/mean"] == pytest.approx(float(masked_mean(-d, chosen)), rel=1e-11)
    assert ours["mismatch/k3/mean"] == pytest.approx(float(masked_mean(d.exp() - d - 1, chosen)), rel=1e-11)
    # ours is the mean of (w - 1)^2, verl's the mean of w^2, minus 1
    mean_minus_one = ours["mismatch/k3/mean"] + ours["mismatch/log_ratio/mean"]
    chi2_token = float(masked_mean((2 * d).exp(), chosen)) - 1
    assert ours["mismatch/chi2_token"] + 2 * mean_minus_one == pytest.approx(chi2_token, rel=1e-9)
    completions = betterhalf.mismatch_profile(trainer, behavior, mask=mask).completions
    chi2_sequence = sum(math.exp(2 * total) for _, total in completions) / B - 1
    assert chi2_sequence == pytest.approx(float((2 * d.sum(-1)).exp().mean()) - 1, rel=1e-11)
    log_ppl_difference = [-total / length for length, total in completions]
    expected = -d.sum(-1) / lengths
    assert log_ppl_difference == pytest.approx(expected.tolist(), rel=1e-11)
    ppl_ratio = sum(map(math.exp, log_ppl_difference)) / B
    assert ppl_ratio == pytest.approx(float(expected.exp().mean()), rel=1e-12)


def loss_inputs(mask: Tensor, *, proximal: bool = True) -> tuple[dict[str, Tensor], LossInputs]:
    """Return the same batch in padded and in packed form, in float64; the leaf of each has a gradient."""
    current, behavior, _ = batch(1)
    anchor, _, _ = batch(2, noise=0.3)
    advantages = torch.linspace(-1.5, 2.0, B, dtype=torch.float64)
    current_C, behavior_C, anchor_C, index_C = packed(mask, current, behavior, anchor)
    padded = {"current": current.requires_grad_(), "behavior": behavior, "advantages": advantages, "anchor": anchor}
    inputs = LossInputs(
        current_logprobs_C=current_C.detach().requires_grad_(),
        behavior_logprobs_C=behavior_C,
        proximal_logprobs_C=anchor_C if proximal else None,
        advantages_S=advantages,
        sequence_index_C=index_C,
    )
    return padded, inputs


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_loss_of_padded_tensors_is_the_packed_one(preset: str) -> None:
    _, _, mask = batch(1)
    padded, inputs = loss_inputs(mask)
    counts = Denominators(sequences=float(B), tokens=float(mask.sum()), max_tokens=L)
    expected = packed_policy_loss(PRESETS[preset], inputs, train_denominators(PRESETS[preset], [inputs], counts))
    found = betterhalf.policy_loss(
        preset,
        padded["current"],
        padded["behavior"],
        padded["advantages"],
        proximal_logprobs=padded["anchor"],
        mask=mask,
    )
    assert found.loss.dim() == 0
    assert torch.equal(found.loss, expected.loss)
    assert betterhalf.policy_metrics(found.stats) == betterhalf.policy_metrics(expected.stats)
    found.loss.backward()
    expected.loss.backward()
    gradient = padded["current"].grad
    assert gradient is not None
    assert torch.equal(gradient[mask.bool()], inputs.current_logprobs_C.grad)
    assert float(gradient[~mask.bool()].abs().sum()) == 0.0


def test_the_loss_of_one_token_is_the_one_computed_by_hand() -> None:
    current = torch.tensor([[-1.0, -9.0]], dtype=torch.float64, requires_grad=True)
    behavior = torch.tensor([[-1.2, -9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 0]])
    found = betterhalf.policy_loss(
        {"preset": "reinforce", "aggregation": "token_mean"}, current, behavior, torch.tensor([2.0]), mask=mask
    )
    assert found.loss.item() == pytest.approx(2.0)  # -A log pi = -2 x -1
    ratio = math.exp(0.2)
    weighted = betterhalf.policy_loss("pg_seq_is", current, behavior, torch.tensor([2.0]), mask=mask, max_tokens=4)
    assert weighted.loss.item() == pytest.approx(-ratio * 2.0 * -1.0 / 4, rel=1e-7)


def test_advantages_of_each_token_count_if_they_are_those_of_the_row() -> None:
    _, _, mask = batch(1)
    padded, _ = loss_inputs(mask)

    def loss(advantages: Tensor) -> float:
        found = betterhalf.policy_loss("rloo", padded["current"], padded["behavior"], advantages, mask=mask)
        return found.loss.item()

    rows = padded["advantages"]
    assert loss(rows[:, None].expand(B, L) * mask) == loss(rows) == loss(rows[:, None])
    with pytest.raises(InputError, match="one advantage for each completion"):
        loss(torch.rand(B, L))


def test_micro_batches_with_shared_denominators_add_up() -> None:
    _, _, mask = batch(1)
    padded, _ = loss_inputs(mask)
    whole = Denominators(sequences=float(B), tokens=float(mask.sum()), max_tokens=32)

    def loss(rows: slice) -> Tensor:
        return betterhalf.policy_loss(
            "dapo",
            padded["current"][rows],
            padded["behavior"][rows],
            padded["advantages"][rows],
            proximal_logprobs=padded["anchor"][rows],
            mask=mask[rows],
            denominators=whole,
        ).loss

    assert (loss(slice(0, 3)) + loss(slice(3, B))).item() == pytest.approx(loss(slice(0, B)).item(), rel=1e-12)


def test_an_algorithm_is_a_name_choices_or_a_configuration() -> None:
    _, _, mask = batch(1)
    padded, _ = loss_inputs(mask)

    def loss(algorithm: betterhalf.api.tensors.AlgorithmLike) -> float:
        return betterhalf.policy_loss(
            algorithm,
            padded["current"],
            padded["behavior"],
            padded["advantages"],
            proximal_logprobs=padded["anchor"],
            mask=mask,
        ).loss.item()

    same = [loss("icepop"), loss({"preset": "icepop"}), loss(PRESETS["icepop"]), loss(AlgorithmConfig(preset="icepop"))]
    assert len(set(same)) == 1
    assert loss({"preset": "grpo", "surrogate": {"upper": 1.001}}) != loss("grpo")
    with pytest.raises(ConfigError, match="Did you mean grpo"):
        loss("grpoo")


def test_the_loss_asks_for_what_it_needs() -> None:
    _, _, mask = batch(1)
    padded, _ = loss_inputs(mask)
    arguments = (padded["current"], padded["behavior"], padded["advantages"])
    with pytest.raises(InputError, match="grpo needs proximal_logprobs.*current_logprobs.detach"):
        betterhalf.policy_loss("grpo", *arguments, mask=mask)
    with pytest.raises(InputError, match="most likely tokens, which this function does not take"):
        betterhalf.policy_loss({"preset": "rloo", "score_centering": 8}, *arguments, mask=mask)
    with pytest.raises(InputError, match="denominators already hold max_tokens"):
        counts = Denominators(sequences=1.0, tokens=1.0, max_tokens=1)
        betterhalf.policy_loss("rloo", *arguments, mask=mask, denominators=counts, max_tokens=3)
    with pytest.raises(InputError, match="max_tokens=0 is not a length"):
        betterhalf.policy_loss("rloo", *arguments, mask=mask, max_tokens=0)


def test_a_kl_penalty_and_an_entropy_bonus_are_added_as_by_hand() -> None:
    current = torch.tensor([[-1.0, -2.0, NAN]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-1.5, -1.8, NAN]], dtype=torch.float64)
    entropies = torch.tensor([[0.5, 0.25, NAN]], dtype=torch.float64)
    mask, none = torch.tensor([[1, 1, 0]]), torch.tensor([0.0])
    choices = {"preset": "rloo", "aggregation": "token_mean", "kl": {"coefficient": 0.1}, "entropy_coefficient": 0.01}
    found = betterhalf.policy_loss(
        choices, current, current.detach(), none, reference_logprobs=reference, entropies=entropies, mask=mask
    )
    k3 = sum(math.exp(x) - 1 - x for x in (-0.5, 0.2)) / 2
    assert found.loss.item() == pytest.approx(0.1 * k3 - 0.01 * 0.375, rel=1e-12)
    with pytest.raises(InputError, match="algorithm.kl needs reference_logprobs"):
        betterhalf.policy_loss(choices, current, current.detach(), none, entropies=entropies, mask=mask)
    with pytest.raises(InputError, match="entropy_coefficient needs entropies"):
        betterhalf.policy_loss(choices, current, current.detach(), none, reference_logprobs=reference, mask=mask)
    with pytest.raises(InputError, match="Subtract the penalty from the rewards"):
        in_reward = {"preset": "rloo", "kl": {"coefficient": 0.1, "place": "reward"}}
        betterhalf.policy_loss(in_reward, current, current.detach(), none, mask=mask)
    with pytest.raises(InputError, match="Subtract the penalty from the rewards"):
        betterhalf.policy_loss(in_reward, current, current.detach(), none, reference_logprobs=reference, mask=mask)


def test_a_mask_of_truncated_completions_is_that_of_the_caller() -> None:
    choices, (current, behavior, mask) = {"preset": "rloo", "mask_truncated": True}, batch()
    with pytest.raises(InputError, match="clear the mask of these completions"):
        betterhalf.policy_loss(choices, current, behavior, torch.zeros(len(mask)), mask=mask)


Measure = Callable[..., object]


@pytest.mark.parametrize("measure", [betterhalf.mismatch_metrics, betterhalf.mismatch_profile, betterhalf.fit_budget])
def test_measurements_refuse_what_they_cannot_measure(measure: Measure) -> None:
    trainer, behavior, mask = batch()
    with pytest.raises(InputError, match="the mask is empty"):
        measure(trainer, behavior, mask=torch.zeros_like(mask))
    with pytest.raises(InputError, match="behavior_logprobs has the shape"):
        measure(trainer, behavior[:, :-1], mask=mask)


def test_logprobs_that_are_not_finite_are_errors_of_their_side() -> None:
    trainer, behavior, mask = batch()
    with pytest.raises(NumericsError, match="trainer logprobs are not finite"):
        betterhalf.mismatch_metrics(trainer, behavior.nan_to_num(0.0), mask=torch.ones_like(mask))
    with pytest.raises(EngineError, match="behavior logprobs are not finite"):
        betterhalf.mismatch_metrics(trainer.nan_to_num(0.0), behavior, mask=torch.ones_like(mask))


def test_half_logprobs_measure_their_own_rounding_and_say_so() -> None:
    trainer, _, mask = batch()
    with pytest.warns(PrecisionWarning, match="trainer_logprobs is torch.bfloat16"):
        found = betterhalf.mismatch_metrics(trainer.bfloat16(), trainer.float(), mask=mask)
    assert found["mismatch/log_ratio/max_abs"] > 1e-4


def test_a_profile_needs_contiguous_sequences() -> None:
    values = torch.full((4,), -1.0)
    with pytest.raises(InputError, match="not contiguous; sort"):
        betterhalf.mismatch_profile(values, values, sequence_index=torch.tensor([0, 1, 0, 1]))


def test_a_floor_that_is_no_share_is_refused() -> None:
    values = torch.full((4,), -1.0)
    with pytest.raises(InputError, match="floor=1.5"):
        betterhalf.fit_budget(values, values, sequence_index=torch.tensor([0, 0, 1, 1]), floor=1.5)
