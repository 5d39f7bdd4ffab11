"""Builder of the trainer, on the model's own weights or on weights that a run has trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from betterhalf.config.schema import RunConfig
from betterhalf.distributed.group import GroupCollective
from betterhalf.distributed.world import ONE_RANK
from betterhalf.models.adapter_start import AdaptedSource, starting_values
from betterhalf.models.adapters import add_adapters
from betterhalf.models.loading import LoadedModel, SkeletonModel
from betterhalf.models.row_source import RowSource, Zeros
from betterhalf.precision.roles import Precision
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.training.weights.replicated import ReplicatedWeights
from betterhalf.training.weights.sharded import sharded_over
from betterhalf.training.weights.store import StoreFactory


class Trained(RowSource, Protocol):
    """Weights that a run has trained and that replace the model's own: whole, or the rows of a rank."""

    @property
    def policy_version(self) -> int:
        """Number of applied updates."""
        ...

    def copy_into(self, module: Any) -> None:
        """Replace the parameters of a transformers module."""
        ...


LoadTrained = Callable[[], Trained]
"""Function that loads trained weights in the process that needs them; it can be pickled."""


def policy_trainer(
    model: LoadedModel | SkeletonModel,
    config: RunConfig,
    precision: Precision,
    *,
    trained: LoadTrained | None,
    keep_reference: bool,
    ranks: GroupCollective | None = None,
    restores: bool = False,
) -> PolicyTrainer:
    """Build the trainer on the model's weights, or on those that `trained` loads in their place.

    Args:
        model: loaded model for a trainer that holds all weights; skeleton for one of `ranks`.
        config: configuration of the run.
        precision: formats of the run, and the device of this process.
        trained: loads weights that replace the model's own.
        keep_reference: True to keep a reference policy.
        ranks: ranks over which the weights of a skeleton are sharded; None if this process holds all weights.
        restores: True if a checkpoint replaces all weights before any is used. Ranks then read the model's own only
            for what the checkpoint does not hold: the starting policy as a reference, and the base of adapters.

    Raises:
        CheckpointError: the trained weights are of another model.
    """
    lora = config.lora if trained is None else config.lora.without_start()
    add_adapters(model.module, lora, config.seed)
    policy = None if trained is None else trained()
    store: StoreFactory = ReplicatedWeights
    if isinstance(model, SkeletonModel):
        assert ranks is not None, "only ranks read the weights of a skeleton"
        source: RowSource = policy or (Zeros() if restores and not keep_reference else model.weights)
        if lora.active:
            source = AdaptedSource(model.weights, starting_values(lora, config.seed), policy)
        store = sharded_over(ranks, source, offload=config.cluster.trainer.offload_optimizer)
    elif policy is not None:
        policy.copy_into(model.module)
    return PolicyTrainer(
        model,
        config=config,
        precision=precision,
        policy_version=0 if policy is None else policy.policy_version,
        collective=ranks or ONE_RANK,
        store=store,
        # A run that only samples with trained weights has no use for a reference.
        keep_reference=keep_reference and trained is None,
    )
