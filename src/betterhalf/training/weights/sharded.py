"""FP32 master weights sharded by FSDP2, one shard on each rank.

`fully_shard` wraps each decoder layer, and then the decoder as the root: the trainer calls the decoder and never the
whole module, so a root above the decoder would skip the gradients of the embedding and of the final norm. Parameters
are gathered in the compute dtype (`MixedPrecisionPolicy(param_dtype=half, reduce_dtype=float32)`); gradients are
widened to FP32, summed over the ranks, and kept as FP32 shards. They are summed and not averaged, because the
denominators of the loss are global. gloo has no scaled sum, so the ranks use a plain sum
(`set_force_sum_reduction_for_comms`).

The head is used outside the decoder's `forward`: `WholeMatrix` keeps it, with an embedding tied to it, outside FSDP2.

An FP32 island is an FSDP2 unit of its own, gathered in FP32. Its shards hold values rounded to the compute dtype, with
which the engine computes; its masters are separate.

On a CPU, parameters stay gathered from the first pass with new weights to the last: `CpuLinear` keeps a whole FP32 copy
of each weight anyway, and each gather would make a new one. FSDP2 writes gathered parameters without incrementing their
version counter, often at the same address, so these copies are invalidated explicitly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from betterhalf.distributed.group import GroupCollective
from betterhalf.distributed.shard_range import ShardRange
from betterhalf.errors import InputError
from betterhalf.models.expert_names import unfused
from betterhalf.models.row_source import RowSource
from betterhalf.precision.cpu_embedding import CpuEmbedding
from betterhalf.precision.cpu_linear import CpuLinear
from betterhalf.precision.emulation import to_format
from betterhalf.precision.experts import Experts, Router
from betterhalf.precision.formats import is_emulated, torch_dtype
from betterhalf.precision.islands import Islands
from betterhalf.training.weights.rows import gather_rows, rows_of
from betterhalf.training.weights.store import StoreFactory, require_parameters
from betterhalf.training.weights.whole import WholeMatrix
from betterhalf.types import DtypeName


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """Rows of one FSDP2 parameter on this rank."""

    parameter: DTensor
    """Sharded parameter, as the module holds it between passes; receives the gradient."""
    local: Tensor
    """Its FP32 rows on this rank, whose values FSDP2 gathers."""
    master: nn.Parameter
    """FP32 master; it shares the memory of `local`, except for an FP32 island."""
    island: bool


class ShardedWeights:
    """One rank's shards of the masters; implements `WeightStore`, whose tensors are the local shards."""

    def __init__(
        self,
        module: Any,
        compute_dtype: DtypeName,
        islands: Islands,
        *,
        ranks: GroupCollective,
        source: RowSource,
        offload: bool,
    ) -> None:
        """Shard the module over the ranks, and read the rows of this rank; no rank ever holds the whole.

        Args:
            module: FP32 parameters on the meta device, buffers on the device of the ranks; the same on every rank.
            compute_dtype: format of forward and backward; not an emulated one.
            islands: modules whose parameters are gathered in FP32, with values of `compute_dtype`.
            ranks: all ranks of the trainer.
            source: values of all parameters.
            offload: keep the shards, and with them the optimizer's states, in host memory.

        Raises:
            InputError: there are more ranks than rows in the largest parameter.
        """
        assert not is_emulated(compute_dtype), f"FSDP2 cannot gather {compute_dtype}"
        self._compute_dtype, self._dtype = compute_dtype, torch_dtype(compute_dtype)
        self._islands = islands
        self._device, self._world_size = ranks.device, ranks.membership.world_size
        whole = dict(module.named_parameters())
        assert all(parameter.is_meta for parameter in whole.values()), "the module has storage already"
        _require_rows(whole, self._world_size)
        self._rows = {
            name: rows_of(tuple(parameter.shape), ranks.membership.rank, self._world_size)
            for name, parameter in whole.items()
        }
        trained = {name for name, parameter in whole.items() if parameter.requires_grad}
        _narrow(whole, self._dtype)
        offload = offload and self._device.type != "cpu"
        self._head = self._take_head(module, whole, offload=offload)
        self._units = _sharded_units(module, self._head.leaf, self._dtype, islands, ranks, offload=offload)
        _allocate(module, torch.device("cpu") if offload else self._device)
        sharded = {name: each for name, each in module.named_parameters() if each is not self._head.leaf}
        local = {name: _local(each) for name, each in sharded.items()}
        _fill(local | {self._head.name: self._head.master}, source, self._rows)
        self._shards = {
            name: _shard(each, local[name], island=islands.hold(name))
            for name, each in sharded.items()
            if name in trained
        }
        self._masters = {
            name: self._head.master if name == self._head.name else self._shards[name].master
            for name in whole
            if name in trained
        }
        self._frozen = {name: rows for name, rows in local.items() if name not in trained}
        if self._head.name not in trained:
            self._frozen[self._head.name] = self._head.master.detach().to(self._dtype)
        self._widening = [part for part in module.modules() if isinstance(part, CpuLinear | Experts | Router)]
        self._aside: dict[str, Tensor] | None = None
        """Contents of the shards while other weights compute; see `exchange`."""
        self.publish()

    def _take_head(self, module: Any, whole: Mapping[str, nn.Parameter], *, offload: bool) -> WholeMatrix:
        """Keep the head, and an embedding tied to it, out of FSDP2, and return its matrix."""
        head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
        (name,) = [name for name, parameter in whole.items() if parameter is head.weight]
        matrix = WholeMatrix(
            name,
            self._dtype,
            self._rows[name],
            world_size=self._world_size,
            device=self._device,
            offload=offload,
            trained=head.weight.requires_grad,
        )
        if embedding.weight is head.weight:
            embedding.weight = matrix.leaf
        elif isinstance(embedding, CpuEmbedding):
            embedding.sparse = False  # FSDP2 reduces dense gradients
        head.weight = matrix.leaf
        return matrix

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, local FP32 shard); see `WeightStore.trainable`."""
        yield from self._masters.items()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, local FP32 shard of the gradient, summed over all ranks); a shard may be empty. Collective."""
        for name in self._masters:
            yield name, self._head.reduce() if name == self._head.name else _gradient(self._shards[name])

    def zero_grad(self) -> None:
        """Discard every gradient."""
        if self._head.name in self._masters:
            self._head.zero_grad()
        for shard in self._shards.values():
            shard.parameter.grad = None
            shard.master.grad = None

    def second_use(self, parameter: nn.Parameter) -> Tensor:
        """Return a leaf on the whole head; its half gradients are added in FP32 and reduced by `gradients`."""
        assert parameter is self._head.leaf, "only the head is used twice"
        return self._head.second_use()

    @torch.no_grad()
    def publish(self) -> None:
        """Gather the head, and drop gathered parameters, so that the next pass gathers the new masters."""
        for shard in self._shards.values():
            if shard.island:
                shard.local.copy_(to_format(shard.master, self._compute_dtype))
        self._renew(self._head.master)

    def _renew(self, head: Tensor) -> None:
        """Make the next pass use the current values of the shards and of `head`, this rank's rows of it; collective."""
        for unit in self._units:
            unit.reshard()
        for layer in self._widening:
            layer.forget()
        self._head.gather(head)

    @torch.no_grad()
    def on_the_wire(self, wire_dtype: DtypeName) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole master rounded once to `wire_dtype`), one at a time, on every rank; collective.

        Rows are rounded before they are gathered, which gives the same bits as rounding the gathered master.
        """
        for name in self._rows:
            yield from unfused([(name, self._whole(name, to_format(self.local(name), wire_dtype)))])

    def local(self, name: str) -> Tensor:
        """Return the rows of this rank: of the FP32 master, or of a frozen parameter in the compute dtype."""
        return self._masters[name].detach() if name in self._masters else self._frozen[name]

    def from_rows(self, name: str, rows: Tensor) -> Tensor:
        """Return the whole tensor, given every rank's rows; collective."""
        return self._whole(name, rows)

    def add_over_ranks(self, counts: Tensor) -> Tensor:
        """Return the sum of the counts of all ranks; collective."""
        total = counts.to(self._device)
        dist.all_reduce(total)
        return total

    @torch.no_grad()
    def computing(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole parameter in the compute dtype), one at a time, on every rank."""
        for name in self._rows:
            if name == self._head.name:
                yield name, self._head.leaf.detach()
            else:
                rows = self._shards[name].local if name in self._shards else self._frozen[name]
                yield name, self._whole(name, rows.to(self._dtype))

    def _whole(self, name: str, local: Tensor) -> Tensor:
        return gather_rows(local, self._rows[name], self._world_size, self._device)

    def computing_dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a parameter is gathered."""
        return torch.float32 if self._islands.hold(name) else self._dtype

    def _sources(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, FP32 rows of this rank that the module computes with, after rounding)."""
        for name in self._masters:
            yield name, self._head.master.detach() if name == self._head.name else self._shards[name].local

    @torch.no_grad()
    def held(self) -> dict[str, Tensor]:
        """Return copies of the local shards in the compute dtype, for a reference policy or an earlier version."""
        return {name: local.to(self._dtype, copy=True) for name, local in self._sources()}

    def whole(self, held: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) for each tensor of a result of `held`, one at a time, on every rank."""
        for name, local in held.items():
            yield name, self._whole(name, local)

    @torch.no_grad()
    def exchange(self, held: Mapping[str, Tensor]) -> None:
        """Swap the shards for half shards that `held` returned; see `WeightStore.exchange`.

        Widening a half shard to FP32 is exact, and FSDP2 rounds it back to the same bits when it gathers it. The
        masters are set aside, never rounded.
        """
        sources, aside = dict(self._sources()), self._aside
        self._aside = {name: local.clone() for name, local in sources.items()} if aside is None else None
        for name, local in sources.items():
            own = local.to(self._dtype)
            local.copy_(held[name] if aside is None else aside[name])
            held[name].copy_(own)
        self._renew(self._head.master)

    def ranges(self) -> dict[str, ShardRange]:
        """Return name -> the rows that this rank holds, for a checkpoint."""
        return {name: self._rows[name] for name in self._masters}

    def state(self) -> dict[str, Tensor]:
        """Return the local FP32 shards by name; they share memory with the store."""
        return {name: master.detach() for name, master in self._masters.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Replace the local shards, given the rows of `ranges`; see `WeightStore.load`."""
        require_parameters(self._masters.items(), tensors, source)
        for name, master in self._masters.items():
            master.copy_(tensors[name])
        self.publish()


def sharded_over(ranks: GroupCollective, source: RowSource, *, offload: bool = False) -> StoreFactory:
    """Return the factory of a rank's store, for `PolicyTrainer(store=...)` with a skeleton."""
    return partial(ShardedWeights, ranks=ranks, source=source, offload=offload)


def _require_rows(parameters: Mapping[str, nn.Parameter], world_size: int) -> None:
    most = max(parameter.shape[0] for parameter in parameters.values())
    if world_size > most:
        raise InputError(
            f"cluster.trainers={world_size} exceeds the {most} rows of the model's largest parameter, so some ranks "
            f"would hold no weights. Set cluster.trainers={most} or less."
        )


def _sharded_units(
    module: Any, head: nn.Parameter, dtype: torch.dtype, islands: Islands, ranks: GroupCollective, *, offload: bool
) -> list[FSDPModule]:
    """Apply FSDP2 to the islands, the layers and the decoder, in place, and return them."""
    on_cpu, decoder = ranks.device.type == "cpu", module.get_decoder()
    shard = partial(
        fully_shard,
        mesh=DeviceMesh.from_group(dist.distributed_c10d._get_default_group(), ranks.device.type),
        offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
        ignored_params={head},
    )
    half, wide = (
        # Inputs keep their format: rope's tables are FP32.
        MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for kind in (dtype, torch.float32)
    )
    layers = list(decoder.layers)
    inner = [part for name in islands.names if (part := module.get_submodule(name)) not in layers]
    whole = [part for name in islands.names if (part := module.get_submodule(name)) in layers]
    for part in inner:
        shard(part, mp_policy=wide, reshard_after_forward=not on_cpu)
    for layer in layers:
        shard(layer, mp_policy=wide if layer in whole else half, reshard_after_forward=not on_cpu)
    shard(decoder, mp_policy=half, reshard_after_forward=False)
    units = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        if on_cpu:
            unit.set_reshard_after_backward(False, recurse=False)
    return units


def _narrow(parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
    """Give frozen parameters, which have no storage yet, the compute dtype: that of their shards."""
    for parameter in parameters.values():
        if not parameter.requires_grad:
            parameter.data = torch.empty_like(parameter, dtype=dtype)


def _allocate(module: nn.Module, device: torch.device) -> None:
    """Allocate the shards of this rank on the device, uninitialised."""
    # `to_empty` would also discard the content of the head and of the buffers.
    module._apply(  # type: ignore[no-untyped-call]
        lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor
    )


@torch.no_grad()
def _fill(local: Mapping[str, Tensor], source: RowSource, wanted: Mapping[str, ShardRange]) -> None:
    """Copy the rows of this rank into its shards, which are FP32, or in the compute dtype for frozen parameters."""
    filled = set()
    for name, rows in source.rows(wanted):
        local[name].copy_(rows)
        filled.add(name)
    assert filled == local.keys(), "the source does not hold exactly the model's parameters"


def _local(parameter: nn.Parameter) -> Tensor:
    """Return the rows of this rank, which share the parameter's memory."""
    assert isinstance(parameter, DTensor), "FSDP2 did not shard a parameter"
    return parameter.to_local().detach()


@torch.no_grad()
def _shard(parameter: nn.Parameter, local: Tensor, *, island: bool) -> _Shard:
    assert isinstance(parameter, DTensor)
    return _Shard(
        parameter=parameter,
        local=local,
        master=nn.Parameter(local.clone() if island else local),
        island=island,
    )


def _gradient(shard: _Shard) -> Tensor:
    """Return this rank's rows of the reduced gradient; zeros if no pass ran since the last optimizer step."""
    total = shard.parameter.grad
    if total is None:
        shard.master.grad = torch.zeros_like(shard.master)
    else:
        assert isinstance(total, DTensor)
        shard.master.grad = total.to_local()
    return shard.master.grad
