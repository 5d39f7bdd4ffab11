"""Catalogue of the metrics of a run: name, unit, meaning and healthy band of each.

`python -m betterhalf.metrics.catalogue > docs/metrics.md` writes the page of documentation. Bands are published alarm
thresholds or follow from definitions; a value outside its band is a reason to look closer, not a verdict.
"""

from __future__ import annotations

from betterhalf.metrics.evaluation import MEANING, TEMPLATES
from betterhalf.metrics.experts import EXPERTS
from betterhalf.metrics.lora import LORA
from betterhalf.metrics.metric import Band, Metric
from betterhalf.metrics.regularisation import REGULARISATION
from betterhalf.metrics.restarts import ENGINE_RESTARTS, RANK_RESTARTS
from betterhalf.metrics.staleness import STALENESS
from betterhalf.metrics.support import SUPPORT
from betterhalf.metrics.time_and_system import SYSTEM, TIME
from betterhalf.metrics.turn_metrics import TURNS

_VERL = "verl, docs on rollout correction"
_NEMO = "NeMo-RL, GRPO guide"
_HALF = (
    "by definition: below it, half of the batch is lost. Measured (docs/mismatch.md): SmolLM2 at 147 tokens 0.996 in "
    "FP16, 0.70 in BF16; demo at 35 tokens with an engine whose weights are 20% off 0.63"
)

_ACCIDENTS = (
    "measured (docs/mismatch.md), GRPO on running sums, 100 steps: none in FP16 and BF16 (in BF16 up to 9e-4 in six of "
    "15,000 steps, docs/results.md), 6e-4 of all tokens in e8m3 (emulated), which learned with dips, 1e-2 in e8m2, "
    "which collapsed, and 6e-3 with only the engine in e8m2, which learned"
)
_ACCIDENTS_ABOVE = (
    "measured, `betterhalf train experiments/base/collapse.toml training.steps=30 watchdog.levels=[] precision=P`, "
    "mean of the steps: none in FP16 and BF16, 1.4e-4 of all tokens in e8m2 (emulated; 7e-4 in the worst step), 2.6e-5 "
    "with only the engine in e8m2 (4e-4)"
)
_NEGATIVE_RATIO = (
    "measured (docs/mismatch.md, docs/study), GRPO on running sums, 4 optimizer steps, learning rate 3e-4: up to 13 in "
    "FP16 and BF16 in 120 steps, 58 and 37 in 15,000 (docs/results.md); 793 in e8m4 and 260 in e8m3 (both emulated), "
    "which learned with dips, 4e6 in e8m2, which collapsed"
)

_MISMATCH = (
    Metric(
        "mismatch/k1/mean",
        "nats",
        "KL(mu to pi), estimated by the mean of -log_ratio: unbiased, signed, noisy.",
        (-0.1, 0.1),
        _VERL,
    ),
    Metric(
        "mismatch/k2/mean",
        "nats",
        "The same KL by half the mean square of log_ratio: never negative, slightly biased.",
    ),
    Metric(
        "mismatch/k3/mean",
        "nats",
        "The same KL by the mean of exp(log_ratio) - 1 - log_ratio: unbiased, never negative. The number to watch.",
        (None, 1e-3),
        _NEMO,
    ),
    Metric("mismatch/prob_gap/mean_abs", "probability", "Mean of abs(pi - mu) over tokens."),
    Metric("mismatch/prob_gap/std_abs", "probability", "Standard deviation of abs(pi - mu) over tokens."),
    Metric("mismatch/prob_gap/p99_abs", "probability", "99th percentile of abs(pi - mu)."),
    Metric(
        "mismatch/prob_gap/max",
        "probability",
        "Largest pi - mu. It approaches 1 in runs that collapse.",
        (None, 0.5),
        "our choice from arXiv 2510.26788: FP16 within about 0.1 with spikes to 0.5, BF16 up to 1",
    ),
    Metric(
        "mismatch/prob_gap/min",
        "probability",
        "Smallest (most negative) pi - mu. It approaches -1 in runs that collapse.",
        (-0.5, None),
        "our choice from arXiv 2510.26788: FP16 within about 0.1 with spikes to 0.5, BF16 up to 1",
    ),
    Metric(
        "mismatch/log_ratio/mean", "nats", "Mean of log_ratio over tokens: the bias that adds up over a completion."
    ),
    Metric("mismatch/log_ratio/mean_abs", "nats", "Mean of abs(log_ratio) over tokens."),
    Metric("mismatch/log_ratio/max", "nats", "Largest log_ratio; its exponential is the largest ratio pi/mu."),
    Metric("mismatch/log_ratio/min", "nats", "Smallest (most negative) log_ratio."),
    Metric("mismatch/log_ratio/std", "nats", "Standard deviation of log_ratio over tokens."),
    Metric("mismatch/log_ratio/p99_abs", "nats", "99th percentile of abs(log_ratio)."),
    Metric("mismatch/log_ratio/max_abs", "nats", "Largest abs(log_ratio); rare tokens dominate it."),
    Metric("mismatch/sequence_log_ratio/mean", "nats", "Mean over completions of the summed log_ratio."),
    Metric("mismatch/sequence_log_ratio/std", "nats", "Standard deviation over completions of the summed log_ratio."),
    Metric(
        "mismatch/sequence_log_ratio/p1",
        "nats",
        "1st percentile over completions of the summed log_ratio: the long tail of arXiv 2510.26788, figure 2.",
    ),
    Metric("mismatch/sequence_log_ratio/p99", "nats", "99th percentile over completions of the summed log_ratio."),
    Metric(
        "mismatch/slope_per_1k",
        "nats per 1000 tokens",
        "Least-squares slope of the summed log_ratio against length; through the origin if all lengths are equal.",
        (-0.2, 0.2),
        "our choice, between -0.07 (FP16) and -1.01 (BF16) in arXiv 2510.26788, figure 2",
    ),
    Metric(
        "mismatch/ess_fraction",
        "share",
        "Effective sample size of the completions weighted by pi/mu, before any truncation.",
        (0.5, None),
        _HALF,
    ),
    Metric(
        "mismatch/accident_fraction",
        "share",
        "Tokens with log_ratio below -3: the trainer finds them 20 times less likely than the engine that sampled them "
        "did. With a negative advantage and several optimizer steps, such a token can dominate the gradient.",
        (None, 1e-3),
        _ACCIDENTS,
    ),
    Metric(
        "mismatch/accident_fraction_above",
        "share",
        "Tokens with log_ratio above 3: the trainer finds them 20 times more likely than the engine did. An engine "
        "that errs so rarely samples the token, so these are rarer.",
        (None, 1e-4),
        _ACCIDENTS_ABOVE,
    ),
    Metric(
        "mismatch/chi2_token",
        "1",
        "Chi-squared divergence: mean of (pi/mu - 1)^2 over tokens; (pi/mu)^2 - 1 has the same mean and more noise.",
        (None, 1.0),
        _VERL,
    ),
    Metric(
        "mismatch/pearson",
        "1",
        "Correlation of pi and mu over tokens; if one of them is constant, 1 if both are equal and 0 otherwise.",
        (0.99, None),
        "MiniMax-M1, arXiv 2506.13585: about 0.9 bad, 0.99 good",
    ),
    Metric("mismatch/tokens", "tokens", "Number of measured tokens."),
)

_LOGNORMAL = "lognormal algebra, docs/mismatch.md"

_BUDGET = (
    Metric("budget/sigma2", "nats^2", "Variance of the token log-ratio around its mean."),
    Metric(
        "budget/correlation",
        "1",
        "tau: variance of the completions' summed log-ratio, divided by that of independent tokens (1 if independent).",
    ),
    Metric(
        "budget/predicted_ess",
        "share",
        "Effective sample size predicted for the lengths L of the step: 1 / mean(exp(L sigma2 tau)).",
        (0.5, None),
        f"by definition: below it, half of the batch is lost; the prediction is {_LOGNORMAL}",
    ),
    Metric(
        "budget/observed_ess",
        "share",
        "Effective sample size of the completions weighted by pi/mu, as measured; never below 1 / completions.",
        (0.5, None),
        _HALF,
    ),
    Metric(
        "budget/max_length",
        "tokens",
        "Length at which the predicted effective sample size falls to 0.5; null without any mismatch.",
    ),
)

_OPTIM = (
    Metric(
        "optim/loss_scale",
        "1",
        "Loss scale after the step; 1 if the loss is not scaled.",
        (1.0, None),
        "by definition: a factor below 1 would push gradients towards zero",
        reduction="last",
    ),
    Metric(
        "optim/skipped",
        "optimizer steps",
        "Optimizer steps skipped because a gradient was not finite.",
        reduction="sum",
    ),
    Metric("optim/first_offender", "name", "First parameter with a gradient that was not finite; null without one."),
    Metric("optim/updates_applied", "optimizer steps", "Optimizer steps that changed the weights.", reduction="sum"),
    Metric(
        "optim/grad_norm",
        "1",
        "Global norm of the unscaled gradient before clipping, mean over applied updates; null without an update.",
    ),
    Metric(
        "optim/token_share/max",
        "share",
        "Share of the largest token in the gradient, in the worst applied optimizer step: the largest norm of the "
        "gradient with respect to a token's final hidden state, divided by the root of the sum of the squares of all "
        "of them; null without an update. 1: one token is the whole gradient; 1/sqrt(N): N tokens have equal parts. It "
        "has no band: 1 is common, in every format, once a policy is sure of nearly all tokens.",
        reduction="max",
    ),
    RANK_RESTARTS,
    Metric("optim/learning_rate", "1", "Learning rate of the last optimizer step.", reduction="last"),
    Metric(
        "optim/subnormal_fraction",
        "share",
        "Scaled gradient elements below the smallest normal number of the compute dtype, among those that are not "
        "zero; mean of the step. They have lost precision, but are not zero.",
        (None, 0.1),
        "measured, demo in FP16, 12 steps: 2e-4 at loss scale 65536, 2e-3 at 4096, 0.08 at 64, 0.96 at 1, where 2e-7, "
        "2e-6, 1e-4 and 3e-3 of the elements have become zero",
    ),
    Metric(
        "optim/zero_fraction",
        "share",
        "Gradient elements that are exactly zero; mean of the step. The excess over an FP32 run has underflowed; some "
        "are zero in exact arithmetic as well (rows of an untied embedding for absent tokens; 7.7e-4 in demo). The "
        "doctor compares with FP32 and calls 1% unsafe.",
    ),
    Metric(
        "optim/overflow_fraction",
        "share",
        "Gradient elements that are not finite, in the worst optimizer step.",
        reduction="max",
    ),
)

_POLICY = (
    Metric("policy/version", "updates", "Applied updates so far; a skipped step does not count.", reduction="last"),
    Metric(
        "policy/loss", "1", "Policy loss, mean over the optimizer steps of the step. Its value says little by itself."
    ),
    Metric("policy/entropy/mean", "nats", "Entropy of the trainer's distribution, mean over completion tokens."),
    Metric("policy/ratio/mean", "1", "Mean over tokens of the surrogate's ratio, before its treatment."),
    Metric("policy/ratio/max", "1", "Largest surrogate ratio of a token, before its treatment.", reduction="max"),
    Metric(
        "policy/ratio/max_negative",
        "1",
        "Largest ratio pi/pi' of a single token, current to before the first update of the step (to the weights that "
        "sampled, if the step was sampled ahead), among the tokens with a negative advantage; at most e^20. PPO's clip "
        "does not bound their gradient, dual clip does. 1 without such tokens, and in the first optimizer step.",
        (None, 50.0),
        _NEGATIVE_RATIO,
        reduction="max",
    ),
    Metric("policy/clip_fraction", "share", "Tokens whose gradient is zero because of PPO's clip or dual clip."),
    Metric("policy/mask_fraction", "share", "Tokens dropped by a mask of the surrogate or of the correction."),
    Metric("policy/truncate_fraction", "share", "Tokens with a weight capped at its upper bound."),
    Metric(
        "policy/bounded_fraction",
        "share",
        "Tokens whose log-ratio was beyond +-20 and was bounded.",
        (None, 0.0),
        "by definition: a ratio of 5e8 is an error, not a sample",
    ),
    Metric(
        "policy/rejected_share/short", "share", "Masked tokens among those of completions up to half the length limit."
    ),
    Metric(
        "policy/rejected_share/long",
        "share",
        "Masked tokens among those of longer completions. More than among short ones: a bias of the mask.",
    ),
    Metric(
        "policy/ess_before",
        "share",
        "Effective sample size of the tokens by their full importance weight, before truncation, masks and clip.",
        (0.3, None),
        _VERL,
    ),
    Metric("policy/ess_after", "share", "The same for the weight that multiplies the gradient, zeros included."),
)

_ROLLOUT = (
    Metric("rollout/reward/mean", "reward", "Mean reward of the rollouts, before any penalty."),
    Metric("rollout/reward/std", "reward", "Standard deviation of the rewards over the rollouts."),
    Metric("rollout/length/mean", "tokens", "Mean length of the completions, stop token included."),
    Metric("rollout/length/max", "tokens", "Longest completion."),
    Metric("rollout/truncated_fraction", "share", "Completions that ended at the length limit."),
    Metric(
        "rollout/zero_advantage_fraction",
        "share",
        "Groups whose advantages are all zero: they have no gradient and need no backward pass.",
    ),
    Metric("rollout/reward_timeouts", "rollouts", "Gradings that ran out of time or memory; their reward is 0."),
    Metric("rollout/unparsed_answers", "rollouts", "Boxed answers that the grader could not parse; their reward is 0."),
    Metric(
        "rollout/groups_dropped",
        "groups",
        "Groups that dynamic sampling replaced because their rewards were all equal.",
    ),
    Metric(
        "rollout/groups_surplus",
        "groups",
        "Groups with different rewards that dynamic sampling sampled after the step was full.",
    ),
    ENGINE_RESTARTS,
    *SUPPORT,
    Metric("rollout/kept/reward/mean", "reward", "Mean reward of the rollouts that the step trains on."),
    Metric(
        "rollout/kept/reward/std",
        "reward",
        "Standard deviation of the rewards of the rollouts that the step trains on.",
    ),
    Metric(
        "rollout/kept/length/mean",
        "tokens",
        "Mean length of the completions that the step trains on, stop token included.",
    ),
    Metric("rollout/kept/length/max", "tokens", "Longest completion that the step trains on."),
    Metric("rollout/kept/truncated_fraction", "share", "Share of these completions that ended at the length limit."),
    Metric(
        "rollout/kept/zero_advantage_fraction",
        "share",
        "Groups that the step trains on whose advantages are all zero; with dynamic sampling, groups that fill it up.",
    ),
    Metric("rollout/masked_fraction", "share", "Rollouts that `algorithm.mask_truncated` leaves without a loss."),
)

CATALOGUE: dict[str, Metric] = {
    metric.name: metric
    for area in (
        *(_MISMATCH, EXPERTS, LORA, STALENESS, _BUDGET, _OPTIM, _POLICY, REGULARISATION, _ROLLOUT, TURNS, TIME, SYSTEM),
    )
    for metric in area
}
"""Every metric by name."""

_AREAS = {
    "mismatch": "Trainer (pi) against engine (mu) at equal weights, before any update; log_ratio is log pi - log mu.",
    "experts": "Routing of a mixture of experts: choices of trainer and engine compared, and the balance of load.",
    "staleness": "Trainer before the update (q) against trainer at the weights that sampled (p); log_ratio is log q/p.",
    "budget": "Effective sample size that the mismatch leaves at a given length: predicted from tokens, and observed.",
    "optim": "The optimizer, and the health of half-precision gradients.",
    "policy": "The policy and its loss, over the tokens that the step trains on.",
    "rollout": "Completions of the engine; with dynamic sampling, the step trains on fewer of them: `rollout/kept/`.",
    "evaluation": MEANING,
    "time": "Time of each part of a step. Differs between a run and its repetition.",
    "system": "Speed and memory. Differs between a run and its repetition.",
}


def render() -> str:
    """Render the catalogue as a Markdown page."""
    lines = [
        "# Metrics",
        "",
        "Generated by `python -m betterhalf.metrics.catalogue > docs/metrics.md`; edit `metrics/catalogue.py` instead.",
        "",
        "`metrics.jsonl` holds one flat JSON object for each step: `step`, and the names below. Bands are published",
        "alarm thresholds, or our choice where the source says so. A value outside its band is a reason to look",
        "closer, not a verdict.",
    ]
    for area, meaning in _AREAS.items():
        lines += ["", f"## {area}", "", meaning, "", "| metric | unit | meaning | healthy | source of the band |"]
        lines += ["|---|---|---|---|---|"]
        listed = (*CATALOGUE.values(), *TEMPLATES)
        lines += [_row(metric) for metric in listed if metric.name.startswith(f"{area}/")]
    return "\n".join(lines)


def _row(metric: Metric) -> str:
    return f"| `{metric.name}` | {metric.unit} | {metric.meaning} | {_band(metric.band)} | {metric.source} |"


def _band(band: Band | None) -> str:
    match band:
        case None | (None, None):
            return ""
        case (None, upper):
            return f"at most {upper:g}"
        case (lower, None):
            return f"at least {lower:g}"
        case (lower, upper):
            return f"{lower:g} to {upper:g}"


if __name__ == "__main__":
    print(render())
