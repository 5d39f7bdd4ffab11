"""KL penalty and entropy bonus equal those of TRL and verl, in value and gradient, in the loss and in the reward.

Their formulas are written out here in float64 on padded [batch, length] tensors, as those libraries have them:

verl (main, 2026): `core_algos.kl_penalty_forward`, k1 = logprob - ref, k2 = half its square, k3 = exp(x) - x - 1 with
    x = ref - logprob; `use_kl_loss` aggregates it as the policy loss; `ray_trainer.apply_kl_penalty` subtracts it from
    the rewards of tokens, whose sum is the outcome that GRPO compares within a group; entropy lowers the loss.
TRL (main, 2026): `GRPOTrainer` adds beta * k3 to the loss of each token before the aggregation; `RLOOTrainer` subtracts
    beta * sum over tokens of (old logprob - reference logprob) from the reward.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from betterhalf.algorithms.advantage import rollout_advantages
from betterhalf.algorithms.loss_path import OwnLoss
from betterhalf.algorithms.loss_stats import policy_metrics
from betterhalf.algorithms.own_loss import try_own_loss
from betterhalf.algorithms.policy_loss import policy_loss
from betterhalf.algorithms.presets import PRESETS, Algorithm, resolve_algorithm
from betterhalf.algorithms.regularisation import reference_kl, sequence_penalties
from betterhalf.batches import Denominators, LossInputs
from betterhalf.config.load import load_config, resolved_json
from betterhalf.config.schema import KlConfig
from betterhalf.errors import ConfigError
from betterhalf.types import Completion, Prompt, Rollout, RolloutGroup

LENGTHS = (3, 1, 5, 2)
"""Two groups of two siblings."""
MAX_TOKENS = 6
REWARDS = (1.0, 0.0, 0.25, 0.75)
MASK = torch.arange(MAX_TOKENS) < torch.tensor(LENGTHS)[:, None]
BETA = 0.3


def draws(seed: int, scale: float) -> Tensor:
    """Return float64 [batch, length] noise."""
    return scale * torch.randn(len(LENGTHS), MAX_TOKENS, generator=torch.Generator().manual_seed(seed)).double()


OLD = -draws(0, 1.0).abs() - 0.1
CURRENT = OLD + draws(1, 0.1)
REFERENCE = OLD + draws(2, 0.5)
ADVANTAGES = torch.tensor([0.5, -0.5, 0.25, -0.25], dtype=torch.float64)

KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": lambda logprob, ref: logprob - ref,
    "k2": lambda logprob, ref: 0.5 * (logprob - ref) ** 2,
    "k3": lambda logprob, ref: torch.exp(ref - logprob) - (ref - logprob) - 1,
}
AGGREGATE: dict[str, Callable[[Tensor], Tensor]] = {
    # verl seq-mean-token-sum-norm; TRL dr_grpo
    "constant_length": lambda loss: (loss * MASK).sum() / (len(LENGTHS) * MAX_TOKENS),
    # verl seq-mean-token-mean; TRL grpo
    "sequence_mean": lambda loss: ((loss * MASK).sum(-1) / MASK.sum(-1)).mean(),
    # verl token-mean; TRL bnpo and dapo
    "token_mean": lambda loss: (loss * MASK).sum() / MASK.sum(),
}
OF = Denominators(sequences=len(LENGTHS), tokens=sum(LENGTHS), max_tokens=MAX_TOKENS)


def theirs(
    current: Tensor, advantages: Tensor, aggregation: str, penalty: Tensor | float = 0.0
) -> tuple[float, Tensor]:
    """Return the loss of clipped GRPO with a penalty at each token, and its gradient in [batch, length]."""
    ratio = torch.exp(current - OLD)
    surrogate = -torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.28) * advantages[:, None])
    loss = AGGREGATE[aggregation](surrogate + penalty)
    (gradient,) = torch.autograd.grad(loss, current)
    return loss.item(), gradient[MASK]


def algorithm_of(aggregation: str = "constant_length", **changes: object) -> Algorithm:
    return replace(PRESETS["grpo"], aggregation=aggregation, **changes)  # type: ignore[arg-type]


def inputs(current: Tensor, advantages: Tensor = ADVANTAGES, entropies: Tensor | None = None) -> LossInputs:
    """Return our flat tensors of the padded ones."""
    return LossInputs(
        current_logprobs_C=current[MASK],
        proximal_logprobs_C=OLD[MASK],
        behavior_logprobs_C=OLD[MASK],
        reference_logprobs_C=REFERENCE[MASK],
        current_entropies_C=entropies,
        advantages_S=advantages,
        sequence_index_C=torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)),
    )


def ours(algorithm: Algorithm, advantages: Tensor = ADVANTAGES) -> tuple[float, Tensor]:
    current = CURRENT.clone().requires_grad_()
    loss = policy_loss(algorithm, inputs(current, advantages), OF).loss
    (gradient,) = torch.autograd.grad(loss, current)
    return loss.item(), gradient[MASK]


# -- in the loss


@pytest.mark.parametrize("aggregation", AGGREGATE)
@pytest.mark.parametrize("estimator", KL)
def test_a_kl_loss_has_the_value_and_gradient_of_verl_and_trl(estimator: str, aggregation: str) -> None:
    kl = KlConfig.model_validate({"coefficient": BETA, "estimator": estimator})
    loss, gradient = ours(algorithm_of(aggregation, kl=kl))
    current = CURRENT.clone().requires_grad_()
    expected, slopes = theirs(current, ADVANTAGES, aggregation, BETA * KL[estimator](current, REFERENCE))
    plain, _ = theirs(CURRENT.clone().requires_grad_(), ADVANTAGES, aggregation)
    assert abs(expected - plain) > 1e-3
    assert loss == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, slopes, rtol=1e-11, atol=1e-16)


def test_estimators_by_hand_and_their_slopes() -> None:
    # x = log ref - log pi = ln 2: k1 = -ln 2 (slope 1), k2 = (ln 2)^2 / 2 (slope -x), k3 = 2 - 1 - ln 2 (slope 1 - 2)
    expected = {"k1": (-math.log(2), 1.0), "k2": (0.5 * math.log(2) ** 2, -math.log(2)), "k3": (1 - math.log(2), -1.0)}
    for estimator, (value, slope) in expected.items():
        current = torch.tensor([-1.0 - math.log(2)], dtype=torch.float64, requires_grad=True)
        estimate, bounded = reference_kl(estimator, current, torch.tensor([-1.0]))  # type: ignore[arg-type]
        estimate.sum().backward()
        assert estimate.item() == pytest.approx(value, abs=1e-14) and not bounded.any()
        assert current.grad is not None and current.grad.item() == pytest.approx(slope, abs=1e-14)


@pytest.mark.parametrize("estimator", KL)
def test_log_ratios_are_bounded_counted_and_then_constant(estimator: str) -> None:
    current = torch.tensor([-50.0, -1.0, -1.0], requires_grad=True)
    estimate, bounded = reference_kl(estimator, current, torch.tensor([-1.0, -50.0, -2.0]))  # type: ignore[arg-type]
    estimate.sum().backward()
    at = {x: KL[estimator](torch.tensor(-x).double(), torch.tensor(0.0).double()).item() for x in (20.0, -20.0, -1.0)}
    assert estimate.tolist() == pytest.approx([at[20.0], at[-20.0], at[-1.0]])
    assert bounded.tolist() == [True, True, False]
    assert current.grad is not None and current.grad[:2].tolist() == [0.0, 0.0] and current.grad[2] != 0
    algorithm = algorithm_of(kl=KlConfig.model_validate({"coefficient": 1.0, "estimator": estimator}))
    far = replace(inputs(CURRENT), reference_logprobs_C=REFERENCE[MASK] - torch.eye(11)[4].double() * 60)
    assert policy_metrics(policy_loss(algorithm, far, OF).stats)["policy/bounded_fraction"] == pytest.approx(1 / 11)


def test_equal_policies_have_a_penalty_and_gradient_of_exactly_zero() -> None:
    current = torch.tensor([-0.1234567, -7.7], requires_grad=True)
    for estimator in ("k1", "k2", "k3"):
        estimate, _ = reference_kl(estimator, current, current.detach())  # type: ignore[arg-type]
        assert estimate.tolist() == [0.0, 0.0]
        (slope,) = torch.autograd.grad(estimate.sum(), current)
        assert slope.tolist() == ([1.0, 1.0] if estimator == "k1" else [0.0, 0.0])


def test_on_policy_only_k2_follows_the_gradient_of_the_divergence() -> None:
    """Compare expectations over all tokens of a distribution with the gradient of sum pi log(pi / reference)."""
    logits = torch.tensor([0.3, -0.7, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    log_pi = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((log_pi.exp() * (log_pi - reference)).sum(), logits, retain_graph=True)
    pi, expected = log_pi.detach().exp(), {}
    for estimator in ("k1", "k2", "k3"):
        estimate, _ = reference_kl(estimator, log_pi, reference)  # type: ignore[arg-type]
        (expected[estimator],) = torch.autograd.grad((pi * estimate).sum(), logits, retain_graph=True)
    torch.testing.assert_close(expected["k1"], torch.zeros(4, dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(expected["k2"], exact)
    forward = pi - reference.exp()  # the gradient of KL(reference || pi)
    torch.testing.assert_close(expected["k3"], forward)
    assert not torch.allclose(forward, exact, rtol=0.1)


def test_the_penalty_does_not_depend_on_corrections_and_masks() -> None:
    kl = KlConfig(coefficient=BETA)
    masked = replace(PRESETS["icepop"], kl=kl)
    far = replace(inputs(CURRENT), behavior_logprobs_C=OLD[MASK] - 3.0)  # every token is outside the band
    output = policy_loss(masked, far, OF)
    assert policy_metrics(output.stats)["policy/mask_fraction"] == 1.0
    penalty = BETA * AGGREGATE["constant_length"](KL["k3"](CURRENT, REFERENCE))
    assert output.loss.item() == pytest.approx(penalty.item(), rel=1e-12)
    assert policy_metrics(output.stats)["policy/kl_loss"] == pytest.approx(penalty.item(), rel=1e-12)


def test_rejected_tokens_leave_the_penalty_with_the_denominator() -> None:
    """Reject the first sequence, as verl does by clearing its response mask: the other three are left."""
    kl = KlConfig(coefficient=BETA)
    algorithm = replace(PRESETS["icepop"], kl=kl, aggregation="sequence_mean", denominator="kept")
    far = inputs(CURRENT)
    far = replace(far, behavior_logprobs_C=OLD[MASK] - 3.0 * (far.sequence_index_C == 0))
    of = Denominators(sequences=3.0, tokens=8.0, max_tokens=MAX_TOKENS)
    estimates = KL["k3"](CURRENT, REFERENCE) * MASK
    expected = BETA * (estimates.sum(-1) / MASK.sum(-1))[1:].mean()
    assert policy_metrics(policy_loss(algorithm, far, of).stats)["policy/kl_loss"] == pytest.approx(expected.item())


def test_the_penalty_is_added_to_a_loss_of_the_users_own() -> None:
    def function(inputs: LossInputs, _of: Denominators, _algorithm: Algorithm) -> Tensor:
        return inputs.current_logprobs_C.float().sum()

    own = OwnLoss(path="x:function", digest="", function=function)
    algorithm = algorithm_of(loss=own, kl=KlConfig(coefficient=BETA))
    try_own_loss(own, algorithm)
    output = policy_loss(algorithm, inputs(CURRENT.clone().requires_grad_()), OF)
    penalty = BETA * AGGREGATE["constant_length"](KL["k3"](CURRENT, REFERENCE))
    assert output.loss.item() == pytest.approx((CURRENT * MASK).sum().item() + penalty.item(), rel=1e-6)
    assert policy_metrics(output.stats)["policy/kl_loss"] == pytest.approx(penalty.item(), rel=1e-12)


# -- in the reward


def groups() -> list[RolloutGroup]:
    prompt = Prompt(prompt_id="", text="", token_ids=(1,), answer="")
    rollouts = [
        Rollout(
            prompt=prompt,
            completion=Completion(
                token_ids=(2,) * length, behavior_logprobs=(-1.0,) * length, finish_reason="stop", policy_version=0
            ),
            text="",
            reward=reward,
        )
        for length, reward in zip(LENGTHS, REWARDS, strict=True)
    ]
    return [RolloutGroup(prompt=prompt, rollouts=tuple(rollouts[i : i + 2])) for i in (0, 2)]


@pytest.mark.parametrize("estimator", KL)
def test_a_kl_penalty_in_the_reward_is_that_of_verl(estimator: str) -> None:
    kl = KlConfig.model_validate({"coefficient": BETA, "estimator": estimator, "place": "reward"})
    algorithm = algorithm_of(kl=kl)
    penalties = sequence_penalties(algorithm, inputs(CURRENT)).tolist()
    advantages = rollout_advantages(groups(), algorithm, MAX_TOKENS, penalties)

    last = torch.nn.functional.one_hot(torch.tensor(LENGTHS) - 1, MAX_TOKENS)
    token_rewards = torch.tensor(REWARDS).double()[:, None] * last - BETA * KL[estimator](OLD, REFERENCE) * MASK
    scores = token_rewards.sum(-1).view(2, 2)
    expected = (scores - scores.mean(1, keepdim=True)).flatten()
    assert not torch.allclose(expected, ADVANTAGES, atol=0.01)
    assert advantages == pytest.approx(expected.tolist(), rel=1e-6)

    loss, gradient = ours(algorithm, torch.tensor(advantages).double())
    wanted, slopes = theirs(CURRENT.clone().requires_grad_(), torch.tensor(advantages).double(), "constant_length")
    assert loss == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(gradient, slopes, rtol=1e-11, atol=1e-16)


def test_a_kl_penalty_in_the_reward_of_rloo_is_that_of_trl() -> None:
    algorithm = replace(PRESETS["rloo"], kl=KlConfig(coefficient=BETA, place="reward", estimator="k1"))
    penalties = sequence_penalties(algorithm, inputs(CURRENT)).tolist()
    found = rollout_advantages(groups(), algorithm, MAX_TOKENS, penalties)
    rewards = [r - BETA * float(((OLD - REFERENCE) * MASK)[i].sum()) for i, r in enumerate(REWARDS)]
    assert found == pytest.approx([rewards[i] - rewards[i ^ 1] for i in range(4)], rel=1e-6)


def test_without_penalties_the_rewards_alone_count() -> None:
    algorithm = algorithm_of()
    assert rollout_advantages(groups(), algorithm, MAX_TOKENS, [0.0] * 4) == [0.5, -0.5, -0.25, 0.25]


# -- entropy


@pytest.mark.parametrize("aggregation", AGGREGATE)
def test_an_entropy_bonus_lowers_the_loss_by_its_aggregated_mean(aggregation: str) -> None:
    entropies = draws(5, 1.0).abs()[MASK].requires_grad_()
    output = policy_loss(algorithm_of(aggregation, entropy_coefficient=0.2), inputs(CURRENT, entropies=entropies), OF)
    plain = policy_loss(algorithm_of(aggregation), inputs(CURRENT), OF)
    padded = torch.zeros_like(OLD).masked_scatter(MASK, entropies.detach()).requires_grad_()
    bonus = 0.2 * AGGREGATE[aggregation](padded)
    assert output.loss.item() == pytest.approx(plain.loss.item() - bonus.item(), rel=1e-12)
    assert policy_metrics(output.stats)["policy/entropy_bonus"] == pytest.approx(bonus.item(), rel=1e-12)
    (slopes,) = torch.autograd.grad(-bonus, padded)
    (found,) = torch.autograd.grad(output.loss, entropies)
    torch.testing.assert_close(found, slopes[MASK], rtol=1e-12, atol=0)


# -- contradictions


@pytest.mark.parametrize(
    ("missing", "kl", "entropy", "words"),
    [
        ("reference_logprobs_C", KlConfig(coefficient=1.0), 0.0, "needs reference_logprobs"),
        ("current_entropies_C", KlConfig(), 1.0, "needs the entropies"),
    ],
)
def test_a_missing_input_is_an_error(missing: str, kl: KlConfig, entropy: float, words: str) -> None:
    without = replace(inputs(CURRENT), **{missing: None})
    with pytest.raises(ValueError, match=words):
        policy_loss(algorithm_of(kl=kl, entropy_coefficient=entropy), without, OF)


def test_the_reward_penalty_needs_what_was_measured_before_the_update() -> None:
    with pytest.raises(ValueError, match="needs proximal_logprobs"):
        sequence_penalties(
            algorithm_of(kl=KlConfig(coefficient=1.0)), replace(inputs(CURRENT), proximal_logprobs_C=None)
        )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.kl.refresh_every=5"], "refresh_every=5 refreshes a reference policy that nothing reads; set"),
        (["algorithm.kl.coefficient=-0.1"], r"algorithm.kl.coefficient = -0.1.*at least 0"),
        (["algorithm.kl.coefficient=nan"], "algorithm.kl.coefficient"),
        (["algorithm.kl.refresh_every=-1", "algorithm.kl.coefficient=1"], "algorithm.kl.refresh_every"),
        (["algorithm.entropy_coefficient=-1"], "algorithm.entropy_coefficient"),
        (["algorithm.kl.place=advantage"], "algorithm.kl.place.*loss, reward"),
        (["algorithm.kl.estimator=k4"], "algorithm.kl.estimator.*k1, k2, k3"),
        (["algorithm.kl.coeficient=1"], "Did you mean 'algorithm.kl.coefficient'"),
    ],
)
def test_bad_settings_are_refused_with_the_fix(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve_algorithm(load_config(None, overrides).algorithm)


@pytest.mark.parametrize(
    ("overrides", "estimator"),
    [
        ([], "k3"),
        (["algorithm.kl.place=reward"], "k1"),
        (["algorithm.kl.place=reward", "algorithm.kl.estimator=k3"], "k3"),
        (["algorithm.kl.estimator=k2"], "k2"),
    ],
)
def test_the_default_estimator_depends_on_the_place(overrides: list[str], estimator: str) -> None:
    assert resolve_algorithm(load_config(None, overrides).algorithm).kl.estimator == estimator


def test_a_run_as_experiment_takes_the_default_of_another_place(tmp_path: Path) -> None:
    run = tmp_path / "config.json"
    run.write_text(json.dumps(resolved_json(load_config(None, ["algorithm.kl.coefficient=1"]))), encoding="utf-8")
    assert load_config(run, []).algorithm.kl.estimator == "k3"
    moved = load_config(run, ["algorithm.kl.place=reward"]).algorithm.kl
    assert (moved.coefficient, moved.place, moved.estimator) == (1.0, "reward", "k1")
