"""The sections `[cluster]` and `[pipeline]`: processes of a run, and the overlap of sampling and learning."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from betterhalf.config.section import Section
from betterhalf.types import BackendName, PlacementName, TransferChoice
from betterhalf.words import counted

_ADDRESS = re.compile(r"auto|(ray://)?[\w.-]+:\d{1,5}|(ray://)?\[[0-9a-fA-F:]+\]:\d{1,5}")
_LARGEST_PORT = 65535


class TrainerRanksConfig(Section):
    """Resources of one rank of the trainer."""

    cpus: int = Field(1, ge=1)
    """CPUs that Ray reserves for each rank."""
    gpus: float = Field(0.0, ge=0, le=1)
    """Share of a GPU for each rank: 1, or less if several processes share the GPU. 0 runs it on CPUs."""
    threads: int | None = Field(None, ge=1)
    """Number of threads of each rank; by default `cpus`. Another number changes the order of sums, and so the last
    bits."""
    offload_optimizer: bool = False
    """Keep masters, gradients and the optimizer's states in host memory and step there; slower, and smaller on the GPU
    by 16 bytes for each parameter of the shard."""


class EngineActorsConfig(Section):
    """Resources of one engine."""

    cpus: int = Field(1, ge=1)
    """CPUs that Ray reserves for each engine."""
    gpus: float = Field(0.0, ge=0)
    """GPUs of each engine: a whole number, or a share below 1. 0 runs it on CPUs."""
    threads: int | None = Field(None, ge=1)
    """Number of threads of each engine; by default `cpus`."""

    @field_validator("gpus")
    @classmethod
    def _whole_or_share(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(
                f"cluster.engine.gpus = {gpus:g} must be a whole number, or a share below 1: several GPUs cannot be "
                f"shared. Set cluster.engine.gpus={int(gpus)}."
            )
        return gpus


class ClusterConfig(Section):
    """Processes of the run. Every other section means the same for every cluster."""

    backend: BackendName = "local"
    """`local`: one trainer in this process, and one engine beside it. `ray`: ranks and engines are Ray actors (extra
    `ray`)."""
    address: str | None = None
    """Ray cluster to join: `HOST:PORT`, or `auto` for the one of this host. By default the run starts a local one, and
    stops it at its end."""
    trainers: int = Field(1, ge=1)
    """Number of ranks of the trainer, over which weights are sharded."""
    engines: int = Field(1, ge=1)
    """Number of rollout engines; each holds all weights."""
    placement: PlacementName = "separate"
    """`separate`: engines have CPUs and GPUs of their own. `colocated`: engine i shares those of rank i; the engines
    sleep while the ranks work."""
    transfer: TransferChoice = "auto"
    """Path of the weights from the ranks to the engines. `nccl`: rank 0 broadcasts from GPU to GPU. `ipc`: colocated
    vLLM engines read the memory of their rank's GPU. `object_store`: through host memory, on any devices. `auto`: the
    first of these that the placement allows. A sync that fails goes through the object store."""
    trainer: TrainerRanksConfig = TrainerRanksConfig()
    engine: EngineActorsConfig = EngineActorsConfig()
    max_restarts: int = Field(3, ge=0)
    """Maximum number of times in one step that an engine is replaced, or that the ranks are started again from the last
    checkpoint; the run fails at the next crash."""
    start_seconds: float = Field(600.0, gt=0)
    """Time limit for joining the cluster, placing all processes and loading the model, in seconds."""
    call_seconds: float = Field(1800.0, gt=0)
    """Time limit for one request to a rank or an engine, in seconds. A process that exceeds it is treated as dead."""
    collective_seconds: float = Field(300.0, gt=0)
    """Time limit for one collective operation of the ranks, in seconds; a broadcast of the weights has half of it."""
    shared_folder: bool = True
    """The run folder is the same folder on every host, checked before the start. `false`: shards of a checkpoint are
    sent to the controller, which writes them."""

    @field_validator("address")
    @classmethod
    def _address_reads(cls, address: str | None) -> str | None:
        if address is None:
            return None
        port = address.rpartition(":")[2]
        if not _ADDRESS.fullmatch(address) or (port.isdecimal() and not 1 <= int(port) <= _LARGEST_PORT):
            raise ValueError(
                f'cluster.address = "{address}" is not an address. Give HOST:PORT, such as 10.0.0.1:6379, or auto, '
                "or leave it out to start a local Ray."
            )
        if address.startswith("ray://"):
            raise ValueError(
                f'cluster.address = "{address}" is a Ray Client address, which cannot share memory with the run. '
                "Start betterhalf on a host of the cluster, and set cluster.address=auto."
            )
        return address

    @model_validator(mode="after")
    def _local_is_one_process(self) -> Self:
        if self.backend == "local":
            self._refuse_of_ray()
        return self

    def _refuse_of_ray(self) -> None:
        """Refuse settings that only Ray can apply: silently ignored, they would look applied."""
        for key, info in type(self).model_fields.items():
            if key != "backend" and getattr(self, key) != info.default:
                raise ValueError(
                    f"cluster.{key} needs cluster.backend=ray: with cluster.backend=local, trainer and engine run in "
                    "one process. Set cluster.backend=ray, or leave it out."
                )

    @model_validator(mode="after")
    def _colocation_fits(self) -> Self:
        if self.placement != "colocated":
            return self
        if self.engines > self.trainers:
            raise ValueError(
                f"cluster.placement=colocated puts each engine on the devices of one rank, and cluster.engines="
                f"{self.engines} exceeds cluster.trainers={self.trainers}. Lower cluster.engines, or set "
                "cluster.placement=separate."
            )
        if (self.trainer.gpus > 0) != (self.engine.gpus > 0):
            raise ValueError(
                f"cluster.placement=colocated shares devices, but cluster.trainer.gpus={self.trainer.gpus:g} and "
                f"cluster.engine.gpus={self.engine.gpus:g}. Set both above 0 or both to 0, or set "
                "cluster.placement=separate."
            )
        if self.engine.gpus > 0 and self.trainer.gpus + self.engine.gpus > 1:
            raise ValueError(
                f"cluster.placement=colocated shares one GPU, but cluster.trainer.gpus={self.trainer.gpus:g} and "
                f"cluster.engine.gpus={self.engine.gpus:g} add up to more than 1. Set 0.5 and 0.5."
            )
        return self

    @model_validator(mode="after")
    def _limits_are_ordered(self) -> Self:
        if self.collective_seconds >= self.call_seconds:
            raise ValueError(
                f"cluster.collective_seconds={self.collective_seconds:g} must be below cluster.call_seconds="
                f"{self.call_seconds:g}, so that a rank names the operation that hangs before it is ended. Lower "
                "cluster.collective_seconds."
            )
        return self

    @property
    def processes(self) -> str:
        """Number of ranks and of engines, in words."""
        return f"{counted(self.trainers, 'rank')} and {counted(self.engines, 'engine')}"

    @property
    def described(self) -> str | None:
        """Backend, processes and placement in words; None for one process."""
        return None if self.backend == "local" else f"{self.backend}: {self.processes}, {self.placement}"

    @property
    def trainer_threads(self) -> int:
        """Number of threads of each rank."""
        return self.trainer.threads or self.trainer.cpus

    @property
    def engine_threads(self) -> int:
        """Number of threads of each engine."""
        return self.engine.threads or self.engine.cpus

    @property
    def needed_cpus(self) -> int:
        """CPUs that all processes reserve together."""
        if self.placement == "colocated":
            return self.trainers * max(self.trainer.cpus, self.engine.cpus)
        return self.trainers * self.trainer.cpus + self.engines * self.engine.cpus

    @property
    def needed_gpus(self) -> float:
        """GPUs that all processes reserve together; colocated ones reserve shares of the same GPU."""
        return self.trainers * self.trainer.gpus + self.engines * self.engine.gpus


class PipelineConfig(Section):
    """Overlap of sampling and learning."""

    max_staleness: int = Field(0, ge=0, le=1)
    """Number of steps by which sampling may be ahead of learning. 0: each step samples with the newest weights. 1:
    step k+1 is sampled while step k is trained on; the update between them is measured as `staleness/*`."""
