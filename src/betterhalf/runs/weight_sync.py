"""Send the trainer's weights to the engine, and prove that they arrived and are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from betterhalf.precision.contract import Contract, compare, enforce, tensor_digest, verify_sync
from betterhalf.runs.assembly import Parts
from betterhalf.runs.recovery import restarts_of, retry_on_engine_death
from betterhalf.runs.score_check import check_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstSync:
    """Result of the first sync of a process."""

    contract: Contract
    """Formats, facts and weights of both sides, as they run."""
    policy_version: int
    """Version of the weights that the engine now holds."""


def first_sync(parts: Parts) -> FirstSync:
    """Run `sync_weights`, and enforce the contract: formats, facts and weights as both sides find them by running.

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


def _first(parts: Parts) -> FirstSync:
    # The contract before the scores: it says more of a difference than they do.
    version = _send(parts)
    # The engine first: where numbers are not finite it names the weight, which the trainer does not.
    held = parts.engine.report()
    contract = compare(parts.trainer.report(), held, allow_difference=parts.config.precision.allow_difference)
    enforce(contract)
    check_scores(parts)
    return FirstSync(contract=contract, policy_version=version)


def _sync(parts: Parts) -> None:
    _send(parts)
    check_scores(parts)


def _send(parts: Parts) -> int:
    """Send the weights, compare digests of each tensor as it leaves and as it is held, and return their version."""
    trainer, engine = parts.trainer, parts.engine
    engine.wake()
    sent: dict[str, str] = {}
    wire = trainer.wire_weights()
    tensors = _noting(wire.tensors, parts.precision.rollout_dtype, sent)
    engine.load_weights(tensors, policy_version=wire.policy_version)
    verify_sync(sent, engine.digests())
    return wire.policy_version


def _noting(
    weights: Iterable[tuple[str, Tensor]], rollout_dtype: torch.dtype, digests: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """The weights as they pass, their digests in the rollout dtype put into `digests`."""
    for name, tensor in weights:
        digests[name] = tensor_digest(tensor.to(rollout_dtype))
        yield name, tensor
