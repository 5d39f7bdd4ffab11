"""Path of the weights from the ranks to the engines, chosen by placement, devices and type of engine."""

from __future__ import annotations

from collections.abc import Callable

from betterhalf.config.cluster import ClusterConfig
from betterhalf.config.engine import EngineConfig
from betterhalf.types import TransferName

PATHS: dict[TransferName, str] = {
    "nccl": "NCCL broadcast from rank 0",
    "ipc": "CUDA IPC from the rank on the same GPU",
    "object_store": "object store",
}
"""Paths in words, for plans, contracts and notes."""

_Obstacle = Callable[[ClusterConfig, EngineConfig], str | None]
"""(cluster, engine) -> reason why a path cannot be taken, with the fix; None if it can."""


def chosen_transfer(cluster: ClusterConfig, engine: EngineConfig) -> TransferName:
    """Return the path that `cluster.transfer` names, or for `auto` the first without an obstacle."""
    if cluster.transfer != "auto":
        return cluster.transfer
    return next(name for name, obstacle in _OBSTACLES.items() if obstacle(cluster, engine) is None)


def transfer_refusal(cluster: ClusterConfig, engine: EngineConfig) -> str | None:
    """Return the reason why the path that `cluster.transfer` names cannot be taken, with the fix; None if it can."""
    if cluster.transfer == "auto" or cluster.backend == "local":
        return None
    reason = _OBSTACLES[cluster.transfer](cluster, engine)
    return None if reason is None else f"cluster.transfer={cluster.transfer} {reason}, or set cluster.transfer=auto."


def _no_gpus(cluster: ClusterConfig) -> str | None:
    if cluster.trainer.gpus > 0 and cluster.engine.gpus > 0:
        return None
    return (
        f"moves weights between GPUs, but cluster.trainer.gpus={cluster.trainer.gpus:g} and cluster.engine.gpus="
        f"{cluster.engine.gpus:g}. Give ranks and engines GPUs"
    )


def _nccl_obstacle(cluster: ClusterConfig, _engine: EngineConfig) -> str | None:
    if cluster.placement == "colocated":
        return (
            "needs a GPU for each process, and cluster.placement=colocated shares them. Set cluster.placement=separate"
        )
    if (missing := _no_gpus(cluster)) is not None:
        return missing
    if cluster.trainer.gpus < 1 or cluster.engine.gpus < 1:
        return (
            f"needs a whole GPU for each process, but cluster.trainer.gpus={cluster.trainer.gpus:g} and "
            f"cluster.engine.gpus={cluster.engine.gpus:g}. Set both to 1 or more"
        )
    return None


def _ipc_obstacle(cluster: ClusterConfig, engine: EngineConfig) -> str | None:
    if cluster.placement != "colocated":
        return "shares the memory of one GPU, but cluster.placement=separate. Set cluster.placement=colocated"
    if (missing := _no_gpus(cluster)) is not None:
        return missing
    if not engine.takes_handles:
        return f"needs a vLLM engine on one GPU, and engine.type={engine.type} is not one. Set engine=vllm"
    return None


_OBSTACLES: dict[TransferName, _Obstacle] = {
    "nccl": _nccl_obstacle,
    "ipc": _ipc_obstacle,
    "object_store": lambda _cluster, _engine: None,
}
"""Paths in the order in which `auto` tries them."""
