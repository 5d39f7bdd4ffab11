"""Send the trainer's weights to the engine, and check that they arrived and are used."""

from __future__ import annotations

from dataclasses import dataclass

from betterhalf.metrics.console import show_note
from betterhalf.precision.contract import Contract, compare, enforce, verify_sync
from betterhalf.rollout.build import capabilities
from betterhalf.runs.assembly import Parts
from betterhalf.runs.recovery import restarts_of, retry_on_engine_death
from betterhalf.runs.score_check import check_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstSync:
    """Result of the first weight sync of a process."""

    contract: Contract
    """Formats, facts and weights of both sides, as they run."""
    policy_version: int
    """Version of the weights that the engine now holds."""


def first_sync(parts: Parts) -> FirstSync:
    """Run `sync_weights`, and enforce the contract on the formats, facts and weights that both sides report.

    Raises:
        ContractError: the two sides differ in precision and `precision.allow_difference` is false.
        EngineNumericsError: the engine's hidden states or logprobs are not finite.
        NumericsError: the trainer's forward pass gives NaN or infinity.
        WeightSyncError, EngineDiedError: as in `sync_weights`.
    """
    return retry_on_engine_death(lambda: _first(parts), parts.engine.restart, restarts_of(parts.config))


def sync_weights(parts: Parts) -> None:
    """Send the FP32 masters to the engine, rounded once to the wire dtype, and check that it holds and uses them.

    Weights that are the same in every version, such as the base of LoRA adapters, are sent once to each engine.
    Digests are compared for every tensor, and logprobs for a fixed prompt if the engine can score. An engine that
    crashed since it was last used is restarted.

    Raises:
        WeightSyncError: the engine holds other tensors than were sent, or does not compute with them.
        EngineDiedError: the engine crashed more often than it may be restarted.
        EngineNumericsError: the engine's logprobs are not finite.
    """
    whole = False

    def restart() -> None:
        nonlocal whole
        parts.engine.restart()
        whole = True

    retry_on_engine_death(lambda: _sync(parts, whole=whole), restart, restarts_of(parts.config))


def merge_metrics(parts: Parts) -> dict[str, float | None]:
    """Return the share of updates that rounding lost in the weights that the engine holds; None before the first.

    The result is empty without adapters, and if the engine gets them unmerged.
    """
    count = parts.trainer.merge_count() if parts.config.lora.active else None
    return {} if count is None else {"mismatch/lost_update_fraction": count.lost_fraction}


def revive(parts: Parts) -> None:
    """Restart the engine after a crash, and sync the current weights.

    Raises:
        EngineDiedError: it crashed again.
    """
    parts.engine.restart()
    _sync(parts, whole=True)


def _first(parts: Parts) -> FirstSync:
    # The contract is checked before the scores, because it says more about a difference.
    version = _send(parts, whole=True)
    # The engine reports first: it names a weight that is not finite, which the trainer does not.
    held = parts.engine.report()
    contract = compare(parts.trainer.report(), held, allow_difference=parts.config.precision.allow_difference)
    enforce(contract)
    if not capabilities(parts.config).scores:
        show_note(_ONLY_DIGESTS.format(parts.config.engine.type), mode=parts.config.logging.console)
    _compare_scores(parts)
    return FirstSync(contract=contract, policy_version=version)


_ONLY_DIGESTS = (
    "note: engine.type={} does not score given tokens, so a weight sync is verified by the digests of the weights alone"
)


def _sync(parts: Parts, *, whole: bool) -> None:
    _send(parts, whole=whole)
    _compare_scores(parts)


def _compare_scores(parts: Parts) -> None:
    """Run `check_scores` if the engine can score."""
    if capabilities(parts.config).scores:
        check_scores(parts.trainer, parts.engine, parts.model, parts.precision)


def _send(parts: Parts, *, whole: bool) -> int:
    """Send the weights, compare the digest of each tensor as sent and as held, and return their version.

    Set `whole` unless the engine holds those of an earlier version.
    """
    trainer, engine = parts.trainer, parts.engine
    engine.wake()
    weights = trainer.weight_stream()
    changed = None if whole else weights.changed()
    if changed is None:
        engine.load_weights(weights, policy_version=weights.policy_version)
    else:
        engine.load_weights(changed, policy_version=weights.policy_version, partial=True)
    verify_sync((changed or weights).digests(), engine.digests())
    return weights.policy_version
