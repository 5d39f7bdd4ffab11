"""Send the trainer's weights to the engine, and prove that they arrived."""

from __future__ import annotations

from betterhalf.precision.contract import Contract, compare, enforce, verify_sync, weights_digests
from betterhalf.runs.assembly import Parts


def sync_weights(parts: Parts) -> Contract:
    """Master FP32 -> wire dtype, one rounding -> engine; then compare what both sides hold.

    Returns:
        The contract as both sides report it now.

    Raises:
        WeightSyncError: the engine holds other tensors than were sent.
        ContractError: the two sides differ in precision and `precision.allow_difference` is false.
    """
    trainer, engine = parts.trainer, parts.engine
    engine.load_weights(trainer.wire_weights(), policy_version=trainer.policy_version)
    held = engine.report()
    rollout_dtype = parts.policy.rollout_dtype
    verify_sync(weights_digests((name, sent.to(rollout_dtype)) for name, sent in trainer.wire_weights()), held.digests)
    contract = compare(trainer.report(), held, allow_difference=parts.config.precision.allow_difference)
    enforce(contract)
    return contract
