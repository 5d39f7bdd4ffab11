"""Score the same tokens on both sides: the only check that detects weights that arrived but are not used.

An engine may hold the right tensors and multiply by stale copies of them, or read stale keys and values. Digests do not
show that; logprobs do.
"""

from __future__ import annotations

import math

import torch

from betterhalf.errors import WeightSyncError
from betterhalf.models.description import ModelFacts
from betterhalf.precision.roles import Precision
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.rollout.requests import score_tolerance
from betterhalf.training.pack import pack_sequence
from betterhalf.training.trainer import Trainer

_TOKENS = 32


def tolerance(precision: Precision, mean_logprob: float) -> float:
    """Return the mean absolute difference of trainer and engine logprobs that rounding may cause, in nats."""
    return score_tolerance((precision.roles.compute_dtype, precision.roles.rollout_dtype), mean_logprob)


def score_difference(trainer: Trainer, engine: RolloutEngine, model: ModelFacts) -> tuple[float, float]:
    """Return the mean absolute difference of trainer and engine logprobs, and the trainer's mean logprob, in nats.

    Both are taken over a fixed prompt at temperature 1.
    """
    vocab_size = int(model.hf_config.vocab_size)
    token_ids = fixed_tokens(vocab_size, min(_TOKENS, model.context_length))
    behavior = torch.tensor(engine.score([token_ids])[0], dtype=torch.float64)
    (scores,) = trainer.measure([pack_sequence(token_ids)], temperature=1.0)
    logprobs = scores.logprobs_C.double()
    return float((logprobs - behavior).abs().mean()), float(logprobs.mean())


def check_scores(trainer: Trainer, engine: RolloutEngine, model: ModelFacts, precision: Precision) -> None:
    """Refuse an engine whose logprobs differ from the trainer's by more than rounding.

    If the trainer's own logprobs are not finite, nothing is checked: the measurement of the step reports that.

    Raises:
        WeightSyncError: the mean difference exceeds `tolerance`.
        EngineNumericsError: the engine's logprobs are not finite.
    """
    difference, mean_logprob = score_difference(trainer, engine, model)
    if not math.isfinite(mean_logprob):
        return
    allowed = tolerance(precision, mean_logprob)
    if not difference <= allowed:
        raise WeightSyncError(
            f"after the weight sync the logprobs of engine and trainer differ by {difference:.3g} nats per token "
            f"(rounding causes at most {allowed:.3g}), although both hold the same weights: the engine computes with "
            "stale copies or a stale cache, or its model differs; use engine=native, and report this with the model's "
            "name"
        )


def fixed_tokens(vocab_size: int, count: int) -> tuple[int, ...]:
    """Return `count` token ids, the same in every call, scattered over the vocabulary."""
    return tuple((1009 * (i + 1) * (i + 2) // 2) % vocab_size for i in range(count))
