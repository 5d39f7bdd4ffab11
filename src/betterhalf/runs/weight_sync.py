"""Send the trainer's weights to the engine, and prove that they arrived and are used."""

from __future__ import annotations

from betterhalf.precision.contract import Contract, compare, enforce, verify_sync, weights_digests
from betterhalf.runs.assembly import Parts
from betterhalf.runs.recovery import restarts_of, surviving
from betterhalf.runs.score_check import check_scores


def sync_weights(parts: Parts) -> Contract:
    """Master FP32 -> wire dtype, one rounding -> engine; then compare what both sides hold, and how both score.

    An engine that has died since it was last used is started again.

    Returns:
        The contract as both sides report it now.

    Raises:
        WeightSyncError: the engine holds other tensors than were sent, or does not compute with them.
        ContractError: the two sides differ in precision and `precision.allow_difference` is false.
        EngineDiedError: the engine dies again and again.
    """
    return surviving(lambda: _sync(parts), parts.engine.restart, restarts_of(parts.config))


def revive(parts: Parts) -> Contract:
    """Start a died engine again, with the current weights, verified.

    Raises:
        EngineDiedError: it dies meanwhile.
    """
    parts.engine.restart()
    return _sync(parts)


def _sync(parts: Parts) -> Contract:
    trainer, engine = parts.trainer, parts.engine
    engine.wake()
    engine.load_weights(trainer.wire_weights(), policy_version=trainer.policy_version)
    held = engine.report()
    rollout_dtype = parts.policy.rollout_dtype
    verify_sync(weights_digests((name, sent.to(rollout_dtype)) for name, sent in trainer.wire_weights()), held.digests)
    contract = compare(trainer.report(), held, allow_difference=parts.config.precision.allow_difference)
    enforce(contract)
    check_scores(parts)
    return contract
