"""Send the trainer's weights to the engine, and prove that they arrived and are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from betterhalf.precision.contract import Contract, compare, enforce, tensor_digest, verify_sync
from betterhalf.runs.assembly import Parts
from betterhalf.runs.recovery import restarts_of, retry_on_engine_death
from betterhalf.runs.score_check import check_scores


def first_sync(parts: Parts) -> Contract:
    """`sync_weights`, then the contract: formats, facts and weights as both sides find them by running.

    Raises:
        ContractError: the two sides differ in precision and `precision.allow_difference` is false.
        WeightSyncError, EngineDiedError: as `sync_weights`.
    """
    return retry_on_engine_death(lambda: _first(parts), parts.engine.restart, restarts_of(parts.config))


def sync_weights(parts: Parts) -> None:
    """Master FP32 -> wire dtype, one rounding -> engine; then compare what it holds, and how both sides score.

    An engine that has died since it was last used is started again.

    Raises:
        WeightSyncError: the engine holds other tensors than were sent, or does not compute with them.
        EngineDiedError: the engine dies again and again.
    """
    retry_on_engine_death(lambda: _sync(parts), parts.engine.restart, restarts_of(parts.config))


def revive(parts: Parts) -> None:
    """Start a died engine again, with the current weights, verified.

    Raises:
        EngineDiedError: it dies meanwhile.
    """
    parts.engine.restart()
    _sync(parts)


def _first(parts: Parts) -> Contract:
    """The contract before the scores: it says more of a difference than they do."""
    _send(parts)
    # The engine first: where numbers are not finite it names the weight, which the trainer does not.
    held = parts.engine.report()
    contract = compare(parts.trainer.report(), held, allow_difference=parts.config.precision.allow_difference)
    enforce(contract)
    check_scores(parts)
    return contract


def _sync(parts: Parts) -> None:
    _send(parts)
    check_scores(parts)


def _send(parts: Parts) -> None:
    """Weights to the engine; digests are taken of each tensor as it leaves, and of each as it is held."""
    trainer, engine = parts.trainer, parts.engine
    engine.wake()
    sent: dict[str, str] = {}
    wire = _noting(trainer.wire_weights(), parts.precision.rollout_dtype, sent)
    engine.load_weights(wire, policy_version=trainer.policy_version)
    verify_sync(sent, engine.digests())


def _noting(
    weights: Iterable[tuple[str, Tensor]], rollout_dtype: torch.dtype, digests: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """The weights as they pass, their digests in the rollout dtype put into `digests`."""
    for name, tensor in weights:
        digests[name] = tensor_digest(tensor.to(rollout_dtype))
        yield name, tensor
