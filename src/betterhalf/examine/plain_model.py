"""Passes of a transformers model as it is: any decoder, in FP32, one sequence at a time.

The census uses it for a model whose sequences cannot be packed. Attention, mixers and head are those of transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from betterhalf.algorithms.policy_loss import policy_loss
from betterhalf.algorithms.presets import Algorithm
from betterhalf.batches import Denominators, LossInputs, MicroBatch
from betterhalf.errors import InputError
from betterhalf.examine.subject import Subject
from betterhalf.models.files import first_line
from betterhalf.precision.loss_scaler import build_loss_scaler
from betterhalf.training.trainer import TokenScores
from betterhalf.training.weights.replicated import ReplicatedWeights


class PlainModel:
    """FP32 copy of a model with the passes of a trainer that a census needs; packs hold one sequence each."""

    def __init__(self, subject: Subject) -> None:
        """Copy the subject's module."""
        self.config, self._name = subject.config, subject.model.name
        self.module = copy.deepcopy(subject.model.module)
        self.weights = self.outgoing = ReplicatedWeights(self.module, "fp32")
        self.scaler = build_loss_scaler(self.config.precision.loss_scale, "fp32")

    @torch.no_grad()
    def measure(self, packs: Sequence[MicroBatch]) -> list[TokenScores]:
        """Return logprobs and entropies of the completion tokens of each pack."""
        return [TokenScores(logprobs_C=scores[0], entropies_C=scores[1]) for scores in map(self._scores, packs)]

    def forward_backward(self, packs: Sequence[MicroBatch], algorithm: Algorithm, denominators: Denominators) -> None:
        """Add the gradients of the packs' loss to those of the weights, as `Trainer.forward_backward` does."""
        for pack in packs:
            logprobs_C, entropies_C = self._scores(pack)
            inputs = LossInputs.of(pack, logprobs_C, current_entropies_C=entropies_C)
            output = policy_loss(algorithm, inputs, denominators)
            with self._own_code():
                self.scaler.scale_loss(output.loss).backward()  # type: ignore[no-untyped-call]

    def _scores(self, pack: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return logprobs and entropies of the completion tokens, float32 [C] each, with a graph."""
        assert len(pack.segments) == 1, "a plain model reads one sequence at a time"
        with self._own_code():
            logits_TV = self.module(input_ids=pack.token_ids_T.unsqueeze(0), use_cache=False).logits[0]
        scaled_CV = logits_TV[pack.loss_rows_C].float() / self.config.sampling.temperature
        logprobs_CV = scaled_CV.log_softmax(-1)
        entropies_C = -(logprobs_CV.exp() * logprobs_CV).sum(-1)
        return -functional.cross_entropy(scaled_CV, pack.target_ids_C, reduction="none"), entropies_C

    @contextmanager
    def _own_code(self) -> Iterator[None]:
        """Turn any exception of the model's code into an InputError: that of some architectures needs more packages."""
        try:
            yield
        except Exception as error:  # code of any architecture, which can raise anything
            raise InputError(
                f"model {self._name!r} cannot be examined: its own code in transformers fails in FP32 on this device "
                f"({type(error).__name__}: {first_line(error)}); install the packages that it asks for, or use a model "
                "that transformers runs here"
            ) from error
