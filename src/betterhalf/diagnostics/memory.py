"""Memory and traffic of a run, computed from the sizes of its model without allocating a tensor."""

from __future__ import annotations

from dataclasses import dataclass

from betterhalf.config.schema import RunConfig
from betterhalf.config.transfer import PATHS
from betterhalf.diagnostics.engine_memory import engine_items
from betterhalf.diagnostics.sizes import Machine, MemoryItem, ModelSizes, StepSizes, item_size
from betterhalf.diagnostics.trainer_memory import host_items, rank_items

LIBRARIES = MemoryItem(name="libraries", num_bytes=350 * 2**20, formula="measured: Python, torch and transformers")
"""Memory of a process before it loads a model."""

CONTEXT = MemoryItem(name="CUDA context", num_bytes=700 * 2**20, formula="assumed: kernels and cuBLAS workspaces")
"""Memory that a process takes on a GPU before it allocates a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPlan:
    """Memory of one kind of process."""

    kind: str
    """`rank`, `engine`, or `run` for both in one process."""
    count: int
    items: tuple[MemoryItem, ...]
    """Items on its GPU, or in host memory for a run on CPUs."""
    host_items: tuple[MemoryItem, ...] = ()
    """Items in host memory, for a process that computes on a GPU."""

    @property
    def total_bytes(self) -> int:
        """Peak in bytes: the sum of the items. The start needs less: no gradients and no optimizer states yet."""
        return sum(item.num_bytes for item in self.items)

    @property
    def host_bytes(self) -> int:
        """Peak host memory in bytes: the sum of the items there."""
        return sum(item.num_bytes for item in self.host_items)

    @property
    def lasting_bytes(self) -> int:
        """Sum of the items that are held between passes and calls."""
        return sum(item.num_bytes for item in self.items if item.lasts)


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """Memory of one kind of device, a GPU or the host, at its peak."""

    name: str
    count: int
    total_bytes: int
    limit_bytes: int | None
    """Memory of the device; None if it is unknown."""

    @property
    def fits(self) -> bool:
        """True if the device is large enough, or of unknown size."""
        return self.limit_bytes is None or self.total_bytes <= self.limit_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that move between processes."""

    path: str
    """Path of the weights to the engines, in words."""
    sync_bytes: int
    """Weights of one sync after the first, over all engines: with LoRA, those that can change."""
    pass_bytes: int
    """Sent by each rank in one forward-backward pass: gathered weights and reduced gradients."""
    optimizer_step_bytes: int
    """Sent by each rank in all passes of one optimizer step, plus the head, which is gathered and reduced once."""
    store_bytes: int
    """Peak content of the object store: the newest weights, and the version before them until it is replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Memory and traffic of a run on its cluster."""

    processes: tuple[ProcessPlan, ...]
    devices: tuple[DevicePlan, ...]
    traffic: Traffic

    @property
    def fits(self) -> bool:
        """True if every device is large enough, or of unknown size."""
        return all(device.fits for device in self.devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything that the memory of a run depends on."""

    config: RunConfig
    sizes: ModelSizes
    step: StepSizes
    machine: Machine
    keeps_reference: bool = False
    """True if the algorithm scores with a reference policy."""
    reads_rows: bool = True
    """False if the model's files cannot be read in parts, so that rank 0 of several loads them whole."""


def plan_memory(setting: Setting) -> Plan:
    """Return memory and traffic of a run, by arithmetic alone: no device is used, and nothing is measured."""
    processes = _processes(setting)
    return Plan(processes=processes, devices=_devices(setting, processes), traffic=_traffic(setting))


def _processes(setting: Setting) -> tuple[ProcessPlan, ...]:
    config, machine, cluster = setting.config, setting.machine, setting.config.cluster
    start = CONTEXT if machine.gpu else LIBRARIES
    ranks = rank_items(config, setting.sizes, setting.step, machine, keeps_reference=setting.keeps_reference)
    engines = engine_items(config, setting.sizes, setting.step, machine)
    host = host_items(config, setting.sizes, machine, reads_rows=setting.reads_rows)
    if cluster.backend == "local" and config.engine.in_process:
        return (ProcessPlan(kind="run", count=1, items=(start, *ranks, *engines), host_items=host),)
    return (
        ProcessPlan(
            kind="rank",
            count=cluster.trainers,
            items=(start, *ranks),
            host_items=host,
        ),
        ProcessPlan(kind="engine", count=cluster.engines * config.engine.devices, items=(start, *engines)),
    )


def _devices(setting: Setting, processes: tuple[ProcessPlan, ...]) -> tuple[DevicePlan, ...]:
    limit, cluster = setting.machine.memory_bytes, setting.config.cluster
    if not setting.machine.gpu:
        total = sum(process.count * process.total_bytes for process in processes)
        if cluster.backend == "ray":
            total += LIBRARIES.num_bytes + _traffic(setting).store_bytes
        return (DevicePlan(name="host, all processes", count=1, total_bytes=total, limit_bytes=limit),)
    if len(processes) == 1:
        return (DevicePlan(name="GPU", count=1, total_bytes=processes[0].total_bytes, limit_bytes=limit),)
    rank, engine = processes
    if cluster.backend == "ray" and cluster.placement == "separate":
        return tuple(
            DevicePlan(name=f"GPU of {kind}", count=one.count, total_bytes=one.total_bytes, limit_bytes=limit)
            for kind, one in (("a rank", rank), ("an engine", engine))
        )
    shared = DevicePlan(
        name="GPU of a rank and an engine",
        count=engine.count,
        total_bytes=_together(setting.config, rank, engine),
        limit_bytes=limit,
    )
    if rank.count <= engine.count:
        return (shared,)
    alone = DevicePlan(
        name="GPU of a rank", count=rank.count - engine.count, total_bytes=rank.total_bytes, limit_bytes=limit
    )
    return shared, alone


def _together(config: RunConfig, rank: ProcessPlan, engine: ProcessPlan) -> int:
    """Return the peak of a GPU that a rank and an engine share: they take turns, and vLLM sleeps in the rank's turn."""
    resting = CONTEXT.num_bytes if config.engine.frees_device else engine.lasting_bytes
    return max(rank.total_bytes + resting, rank.lasting_bytes + engine.total_bytes)


def _traffic(setting: Setting) -> Traffic:
    config, sizes = setting.config, setting.sizes
    roles, ranks = config.precision.roles(), config.cluster.trainers
    wire = item_size(roles.wire_dtype) * sizes.parameters
    b, head, layers = item_size(roles.compute_dtype), sizes.embedding, sizes.parameters - sizes.embedding
    if sizes.adapters:
        return _traffic_of_adapters(setting, wire)
    # A GPU gathers each layer in the forward and in the backward pass; on a CPU it stays gathered between updates.
    each, once = (2 * b + 4, 0) if setting.machine.gpu else (4, b)
    one_pass = each * layers * (ranks - 1) // ranks
    whole_step = setting.step.train_passes * one_pass + (once * layers + (b + 4) * head) * (ranks - 1) // ranks
    return Traffic(
        path=_path(config),
        sync_bytes=wire * config.cluster.engines,
        pass_bytes=one_pass,
        optimizer_step_bytes=whole_step,
        store_bytes=_stored_versions(config) * wire,
    )


def _traffic_of_adapters(setting: Setting, wire: int) -> Traffic:
    """Return the traffic of a run that trains adapters: only their gradients are reduced.

    Args:
        setting: setting of the run.
        wire: bytes of all weights on the wire.
    """
    config, sizes, ranks = setting.config, setting.sizes, setting.config.cluster.trainers
    roles = config.precision.roles()
    b, layers = item_size(roles.compute_dtype), sizes.parameters - sizes.embedding + sizes.adapters
    # A GPU gathers each layer in the forward and in the backward pass; on a CPU it stays gathered between updates.
    each, once = (2 * b * layers, 0) if setting.machine.gpu else (0, b * layers)
    one_pass = (each + 4 * sizes.adapters) * (ranks - 1) // ranks
    resent = item_size(roles.wire_dtype) * (sizes.resent or sizes.parameters)
    sent = config.cluster.backend == "ray" and config.transfer != "object_store"
    if sent:
        resent = wire  # a broadcast always sends all weights
    return Traffic(
        path=_path(config),
        sync_bytes=resent * config.cluster.engines,
        pass_bytes=one_pass,
        optimizer_step_bytes=setting.step.train_passes * one_pass + once * (ranks - 1) // ranks,
        store_bytes=wire + 2 * resent
        if config.cluster.backend == "ray" and not sent
        else _stored_versions(config) * wire,
    )


def _path(config: RunConfig) -> str:
    """Return the path of the weights in words."""
    if config.cluster.backend == "ray":
        return PATHS[config.transfer]
    return "in the process of the run" if config.engine.in_process else "to a child process on the same device"


def _stored_versions(config: RunConfig) -> int:
    """Return the largest number of versions of the weights in the object store.

    Weights that are sent directly are stored only for an engine that is replaced, or if sampling overlaps learning.
    """
    if config.cluster.backend == "local":
        return 0
    return 1 if config.transfer != "object_store" and not config.pipeline.max_staleness else 2
