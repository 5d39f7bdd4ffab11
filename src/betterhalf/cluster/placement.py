"""Placement of all processes of a run: resources and threads of each, and the bundles that Ray reserves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from betterhalf.config.schema import ClusterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Resources reserved for one process."""

    bundle: int
    """Index of its bundle in the run's placement group; colocated processes share one."""
    cpus: float
    """CPUs that the process takes from the bundle; 0 for an engine that shares those of a rank."""
    gpus: float
    """GPUs that the process takes from the bundle; a fraction if it shares one."""
    threads: int
    """Value of OMP_NUM_THREADS; always set, because Ray would otherwise derive it from `cpus`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Slots of all processes of a run."""

    ranks: tuple[Slot, ...]
    engines: tuple[Slot, ...]
    bundles: tuple[Mapping[str, float], ...]
    """Resources of each bundle, as Ray names them."""

    def totals(self) -> dict[str, float]:
        """Return the sum of each resource, `CPU` and `GPU`, over all bundles."""
        return {kind: round(sum(bundle.get(kind, 0.0) for bundle in self.bundles), 4) for kind in ("CPU", "GPU")}


def placement_of(cluster: ClusterConfig) -> Placement:
    """Return the slots of a configuration.

    Separate processes have one bundle each. With `colocated`, engine i is in the bundle of rank i and shares its GPU.
    """
    shared = cluster.placement == "colocated"
    rank, engine = cluster.trainer, cluster.engine
    ranks = tuple(
        Slot(bundle=index, cpus=rank.cpus, gpus=rank.gpus, threads=cluster.trainer_threads)
        for index in range(cluster.trainers)
    )
    engines = tuple(
        Slot(
            bundle=index if shared else cluster.trainers + index,
            cpus=0.0 if shared else engine.cpus,
            gpus=engine.gpus,
            threads=cluster.engine_threads,
        )
        for index in range(cluster.engines)
    )
    if not shared:
        bundles = tuple(_bundle(slot.cpus, slot.gpus) for slot in (*ranks, *engines))
    else:
        cpus = max(rank.cpus, engine.cpus)
        bundles = tuple(
            _bundle(cpus, rank.gpus + (engine.gpus if index < cluster.engines else 0.0))
            for index in range(cluster.trainers)
        )
    return Placement(ranks=ranks, engines=engines, bundles=bundles)


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
