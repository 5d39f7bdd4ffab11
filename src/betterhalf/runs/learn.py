"""Training on train batches: for each, gradients of its packs, then one optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from betterhalf.algorithms.denominators import train_denominators
from betterhalf.algorithms.loss_stats import LossStats
from betterhalf.algorithms.presets import Algorithm
from betterhalf.batches import StepBatch, TrainBatch
from betterhalf.training.trainer import OptimReport, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """Result of one train batch."""

    stats: LossStats
    """Loss and counts, summed over the micro-batches."""
    report: OptimReport


def learn(trainer: Trainer, algorithm: Algorithm, batch: StepBatch, train_batch: TrainBatch, rate: float) -> Learned:
    """Accumulate the gradients of one train batch, then take its optimizer step.

    Args:
        trainer: holder of the weights.
        algorithm: the loss.
        batch: packs of the step, with the proximal and reference logprobs that the algorithm reads.
        train_batch: one of its train batches.
        rate: learning rate of the optimizer step.
    """
    denominators = train_denominators(algorithm, batch.chosen(train_batch.countable), train_batch.denominators)
    stats = trainer.forward_backward(batch.chosen(train_batch.micro_batches), algorithm, denominators)
    return Learned(stats=stats, report=trainer.optim_step(rate))


def learn_all(trainer: Trainer, algorithm: Algorithm, passes: Iterable[StepBatch], rate: float) -> list[Learned]:
    """Train on every train batch of each pass over a step's rollouts, in order; see `learn`.

    Args:
        trainer: holder of the weights.
        algorithm: the loss.
        passes: the batch of each pass, from `runs.epochs`.
        rate: learning rate of the optimizer steps.
    """
    return [learn(trainer, algorithm, one, train_batch, rate) for one in passes for train_batch in one.train_batches]
