"""Staleness: the change of the trainer's logprobs since the weights that sampled a step.

With `pipeline.max_staleness = 1`, step k+1 is sampled by version v and trained on at version w >= v. For each token

    behavior -> trainer at v     mismatch: the same weights, computed twice
    trainer at v -> trainer at w     staleness: the updates in between, computed by one program

and the two log-ratios add up to log pi - log mu at the weights that the step updates. Without updates in between
staleness is exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.diagnostics.logprob_gap import ess_fraction, k3
from betterhalf.errors import NumericsError


def staleness_metrics(
    newest_C: Tensor, sampled_C: Tensor, sequence_index_C: Tensor, num_sequences: int, versions: int
) -> dict[str, float]:
    """Return the `staleness/*` metrics of a step; the metrics catalogue documents them.

    Args:
        newest_C: float32 [C], trainer logprobs at the weights before the update, in nats.
        sampled_C: float32 [C], trainer logprobs at the weights that sampled, in nats.
        sequence_index_C: int64 [C], which sequence each token belongs to; sequences without tokens do not count.
        num_sequences: S.
        versions: number of applied updates between the two.

    Returns:
        `staleness/versions`, `staleness/{k1,k3}/mean`, `staleness/log_ratio/{mean,std,max_abs}`,
        `staleness/sequence_log_ratio/std` and `staleness/ess_fraction`. With p the policy that sampled and q the
        newest one, log_ratio is log q - log p, and k1 and k3 estimate KL(p || q).

    Raises:
        NumericsError: a logprob is not finite.
        ValueError: there are no tokens.
    """
    if newest_C.numel() == 0:
        raise ValueError("there are no tokens to measure the staleness on; pass those of at least one completion.")
    for which, logprobs_C in (("newest", newest_C), ("sampling", sampled_C)):
        if bad := int((~logprobs_C.isfinite()).sum()):
            raise NumericsError(
                f"{bad} of {logprobs_C.numel()} trainer logprobs at the {which} weights are not finite; look for "
                "overflow in the forward pass, or train with precision=fp32."
            )
    d_C = ops.log_ratio(newest_C.detach().double(), sampled_C.detach().double())
    present_S = ops.segment_sum(torch.ones_like(d_C), sequence_index_C, num_sequences) > 0
    d_S = ops.segment_sum(d_C, sequence_index_C, num_sequences)[present_S]
    return {
        "staleness/versions": float(versions),
        "staleness/k1/mean": 0.0 - float(d_C.mean()),
        "staleness/k3/mean": float(k3(d_C).mean()),
        "staleness/log_ratio/mean": float(d_C.mean()),
        "staleness/log_ratio/std": float(d_C.std(correction=0)),
        "staleness/log_ratio/max_abs": float(d_C.abs().max()),
        "staleness/sequence_log_ratio/std": float(d_S.std(correction=0)),
        "staleness/ess_fraction": ess_fraction(d_S),
    }
