"""Effect of the mismatch on learning: the policy gradient of one batch in each precision, without a training step.

It answers two questions. How far is a half trainer's gradient from the FP32 trainer's on the same tokens? How far do
the sequence importance weights between a matched trainer and engine rotate a gradient? Every gradient is that of
`PolicyTrainer.forward_backward`, accumulated in FP32 over the micro-batches that training would use.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.algorithms.advantage import group_advantages
from betterhalf.algorithms.presets import PRESETS, Algorithm
from betterhalf.batches import StepBatch
from betterhalf.config.schema import LossScaleConfig
from betterhalf.diagnostics.gradient_gap import gradient_gap, weight_spread
from betterhalf.errors import InputError
from betterhalf.examine.scoring import in_one_batch
from betterhalf.examine.subject import Subject, trainer_in
from betterhalf.precision.loss_scaler import build_loss_scaler
from betterhalf.process import collect_garbage
from betterhalf.setup.decoding import completion_texts
from betterhalf.tasks.rewards import check_rewards
from betterhalf.training.pack import pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, DtypeName, PresetName, Prompt, Rollout

Groups = Sequence[tuple[Prompt, tuple[Completion, ...]]]
"""Prompts, each with its siblings."""

TRAINER_DTYPES: tuple[DtypeName, ...] = ("fp32", "fp16", "bf16")
"""Dtypes of the trainers to compare, the reference first; those of the rollouts follow."""

PLAIN: PresetName = "reinforce"
"""Algorithm without weights: log pi times advantage over a constant length."""
WEIGHTED: PresetName = "pg_seq_is"
"""Same algorithm with each sequence multiplied by its raw weight pi/mu."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """Attempt to accumulate a gradient; the master weights hold it, still multiplied by the loss scale."""

    scale: float
    """Loss scale of the last attempt."""
    halvings: int
    """Number of times that the scale was halved because the gradient was not finite."""
    finite: bool
    """True if the last gradient is finite."""


def measure_gradients(
    subject: Subject, rollouts: Mapping[DtypeName, Groups], *, advance: Callable[[str], None] = lambda stage: None
) -> dict[str, Any]:
    """Measure the section `gradient` of `probe.json`.

    Args:
        subject: model and settings; `probe.gradient_completions` is the number of completions in the batch.
        rollouts: completions by rollout dtype, sampled at the subject's weights. Trainers are compared on the tokens of
            fp32 if given, else of the first dtype; weights are measured on the tokens of each dtype.
        advance: called with the name of the next measurement before each gradient.

    Returns:
        `rows`: each trainer against the FP32 trainer, FP16 with the configured loss scale and without one. `weights`:
        for each rollout dtype, the matched trainer's gradient with weights against the one without. `advantages`:
        `rewards`, or `signs` if the rewards of some rollout dtype give no advantage at all and seeded signs +-1 are
        used for all. `completions`, `trained_completions`, `tokens` and `micro_batches`: sizes of the batch on which
        the trainers are compared.

    Raises:
        InputError: there are no rollouts.
        RewardError: a reward is not finite.
    """
    if not rollouts or not all(rollouts.values()):
        raise InputError("there are no completions for a gradient; sample at least one for each precision.")
    batches, kind = _batches(subject, rollouts)
    base: DtypeName = "fp32" if "fp32" in batches else next(iter(batches))
    comparison = _Comparison(subject=subject, batches=batches, base=base, advance=advance)
    for dtype in dict.fromkeys((*TRAINER_DTYPES, *rollouts)):
        comparison.add(dtype)
        # Parameters and their hooks refer to each other; the next trainer needs this one's memory.
        collect_garbage()
    return {
        "rows": comparison.rows,
        "weights": [comparison.weights[dtype] for dtype in rollouts],
        **_sizes(batches[base]),
        "advantages": kind,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Comparison:
    """Results so far. Only one trainer is in memory at a time; the first one's gradient is kept as the reference."""

    subject: Subject
    batches: Mapping[DtypeName, StepBatch]
    """Rollout dtype -> its one train batch."""
    base: DtypeName
    """Rollout dtype on whose tokens the trainers are compared."""
    advance: Callable[[str], None]
    """Called with the name of the next measurement."""
    reference: dict[str, Tensor] = field(default_factory=dict)
    """Parameter name -> unscaled gradient of the first trainer."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[DtypeName, dict[str, Any]] = field(default_factory=dict)

    def add(self, dtype: DtypeName) -> None:
        """Build one trainer, measure its gradients, and release it."""
        trainer = trainer_in(self.subject, dtype)
        configured = trainer.scaler.scale
        for scale in dict.fromkeys((configured, 1.0)):
            self.advance(f"gradient of the {dtype} trainer, loss scale {scale:g}")
            self._compare(trainer, dtype, scale)
        if dtype in self.batches:
            self.advance(f"importance weights of the {dtype} rollouts")
            self.weights[dtype] = self._weigh(trainer, dtype, configured)

    def _compare(self, trainer: PolicyTrainer, dtype: DtypeName, scale: float) -> None:
        attempt = _accumulate(trainer, PRESETS[PLAIN], self.batches[self.base], scale)
        if not self.reference:
            self.reference.update(_unscaled(trainer, attempt))
        gap = gradient_gap(trainer.weights.gradients(), self.reference, scale=attempt.scale)
        self.rows.append(
            {
                "train": dtype,
                "loss_scale": attempt.scale,
                **dataclasses.asdict(gap),
                "overflow": attempt.halvings > 0 or not attempt.finite,
                "initial_loss_scale": scale,
                "halvings": attempt.halvings,
            }
        )

    def _weigh(self, trainer: PolicyTrainer, dtype: DtypeName, scale: float) -> dict[str, Any]:
        """Compare the gradient with raw sequence weights with the one without, on the same trainer and tokens."""
        batch = self.batches[dtype]
        if dtype == self.base == TRAINER_DTYPES[0]:
            plain = self.reference
        else:
            plain = _unscaled(trainer, _accumulate(trainer, PRESETS[PLAIN], batch, scale))
        attempt = _accumulate(trainer, PRESETS[WEIGHTED], batch, scale)
        gap = gradient_gap(trainer.weights.gradients(), plain, scale=attempt.scale)
        return {
            "rollout": dtype,
            "relative_change": gap.relative_error,
            "cosine": gap.cosine,
            **dataclasses.asdict(weight_spread(_sequence_log_ratios(trainer, batch))),
        }


# -- gradients


def _accumulate(trainer: PolicyTrainer, algorithm: Algorithm, batch: StepBatch, scale: float) -> _Attempt:
    """Accumulate the batch's gradient in the masters; while it overflows, try again with half the loss scale.

    The scale does not fall below 1, where the half backward pass would lose more than without a loss scale.
    """
    halvings = 0
    while True:
        forward_finite, finite = _backward(trainer, algorithm, batch, scale)
        if finite or not forward_finite or scale < 2.0:
            return _Attempt(scale=scale, halvings=halvings, finite=finite)
        scale, halvings = scale / 2, halvings + 1


def _backward(trainer: PolicyTrainer, algorithm: Algorithm, batch: StepBatch, scale: float) -> tuple[bool, bool]:
    """Run one pass over the micro-batches; return whether the loss is finite, and whether loss and gradient are."""
    trainer.scaler = build_loss_scaler(LossScaleConfig(initial=scale), trainer.precision.roles.compute_dtype)
    trainer.weights.zero_grad()
    (train_batch,) = batch.train_batches
    for micro in batch.chosen(train_batch.micro_batches):
        if not bool(trainer.forward_backward([micro], algorithm, train_batch.denominators).loss.isfinite()):
            return False, False
    return True, all(bool(gradient.isfinite().all()) for _, gradient in trainer.weights.gradients())


def _unscaled(trainer: PolicyTrainer, attempt: _Attempt) -> dict[str, Tensor]:
    """Return a copy of the gradient, unscaled; the division is exact if the scale is a power of two, as by default."""
    return {name: gradient / attempt.scale for name, gradient in trainer.weights.gradients()}


@torch.no_grad()
def _sequence_log_ratios(trainer: PolicyTrainer, batch: StepBatch) -> Tensor:
    """Return log pi - log mu summed over each completion, float64 [S], including those with zero advantages."""
    sums = []
    for pack, scores in zip(batch.packs, trainer.measure(batch.packs), strict=True):
        log_ratio_C = ops.log_ratio(scores.logprobs_C.double(), pack.behavior_logprobs_C.double())
        sums.append(ops.segment_sum(log_ratio_C, pack.sequence_index_C, pack.num_sequences))
    return torch.cat(sums)


# -- the batch


def _batches(
    subject: Subject, rollouts: Mapping[DtypeName, Groups]
) -> tuple[dict[DtypeName, StepBatch], Literal["rewards", "signs"]]:
    """Return one train batch for each rollout dtype, and the source of their advantages."""
    graded = {dtype: _graded(subject, groups) for dtype, groups in rollouts.items()}
    advantages = {dtype: _reward_advantages(groups) for dtype, groups in graded.items()}
    kind: Literal["rewards", "signs"] = "rewards" if all(any(values) for values in advantages.values()) else "signs"
    if kind == "signs":
        advantages = {dtype: _signs(len(values), subject.config.seed) for dtype, values in advantages.items()}
    config = in_one_batch(subject.config)
    return {
        dtype: pack_step([r for group in groups for r in group], advantages[dtype], config, 0)
        for dtype, groups in graded.items()
    }, kind


def _graded(subject: Subject, groups: Groups) -> list[list[Rollout]]:
    """Return the first `probe.gradient_completions` completions with their rewards, grouped by prompt."""
    flat = [(number, prompt, c) for number, (prompt, siblings) in enumerate(groups) for c in siblings]
    flat = flat[: subject.config.probe.gradient_completions]
    texts = completion_texts(subject.model.tokenizer, [completion for _, _, completion in flat])
    rewards = subject.task.rewards([prompt for _, prompt, _ in flat], texts, [c.finish_reason for _, _, c in flat])
    rewards = check_rewards(rewards, len(flat))
    out: dict[int, list[Rollout]] = {}
    for (number, prompt, completion), text, reward in zip(flat, texts, rewards, strict=True):
        rollout = Rollout(prompt=prompt, completion=completion, text=text, reward=reward)
        out.setdefault(number, []).append(rollout)
    return list(out.values())


def _reward_advantages(groups: Sequence[Sequence[Rollout]]) -> list[float]:
    """Return reward minus the group's mean; 0 for a group of one, which has no baseline."""
    out: list[float] = []
    for group in groups:
        rewards = torch.tensor([[rollout.reward for rollout in group]])
        out += group_advantages(rewards, "group_mean")[0].tolist() if len(group) > 1 else [0.0]
    return out


def _signs(count: int, seed: int) -> list[float]:
    """Return advantages of +1 and -1 in a seeded order; for an odd count there is one more +1."""
    signs = [1.0 if index % 2 == 0 else -1.0 for index in range(count)]
    random.Random(f"signs-{seed}").shuffle(signs)
    return signs


def _sizes(step: StepBatch) -> dict[str, int]:
    (batch,) = step.train_batches
    return {
        "completions": int(batch.denominators.sequences),
        "trained_completions": sum(micro.num_sequences for micro in step.chosen(batch.micro_batches)),
        "tokens": int(batch.denominators.tokens),
        "micro_batches": len(batch.micro_batches),
    }
