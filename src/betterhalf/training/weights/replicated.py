"""FP32 master weights beside the half weights that compute.

The module computes on parameters in the compute dtype; the optimizer holds FP32 masters. A parameter's half gradient
is rounded once, by the backward pass of one micro-batch, and immediately added to the master's FP32 gradient; a sum
in half over micro-batches would lose the small ones. With an FP32 compute dtype, masters and parameters are the same
tensors.

Parameters of FP32 islands are FP32 tensors, so that their gradients are FP32. Their values are still rounded to the
compute dtype: the weights sent to the engine, and every digest, are the same as without islands.

Parameters are cast by name. Casting the module would round rope's inverse frequencies too, which alone raises the
mismatch a hundredfold.

Parameters that need no gradient are frozen, such as the base of LoRA adapters: they compute, and have no master.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from betterhalf.distributed.shard_range import ShardRange
from betterhalf.models.expert_names import unfused
from betterhalf.precision.emulation import to_format
from betterhalf.precision.formats import is_emulated
from betterhalf.precision.islands import Islands
from betterhalf.training.weights.store import require_parameters
from betterhalf.training.weights.sums import collect_into
from betterhalf.types import DtypeName


class ReplicatedWeights:
    """All masters of one module in this process; implements `WeightStore`."""

    def __init__(self, module: nn.Module, compute_dtype: DtypeName, islands: Islands | None = None) -> None:
        """Keep the module's trained FP32 parameters as masters, and convert those that compute to `compute_dtype`.

        Args:
            module: its parameters are FP32, on their final device; those without `requires_grad` are frozen.
            compute_dtype: format of forward and backward.
            islands: modules whose parameters hold values of `compute_dtype` in FP32 tensors; none by default.
        """
        self._compute = dict(module.named_parameters())
        self._compute_dtype = compute_dtype
        self._casts = not is_emulated(compute_dtype)
        """True if `copy_` alone rounds to the compute dtype."""
        self.shared = compute_dtype == "fp32"
        self.masters: dict[str, nn.Parameter] = {}
        self._collected: set[str] = set()
        """Names of masters that received a gradient since `zero_grad`; the gradient tensors of the others are stale."""
        for name, parameter in self._compute.items():
            assert parameter.dtype == torch.float32, f"{name} is not FP32 before casting"
            if self.shared:
                if parameter.requires_grad:
                    self.masters[name] = parameter
                continue
            if parameter.requires_grad:
                self.masters[name] = nn.Parameter(parameter.detach().clone())
            rounded = to_format(parameter.data, compute_dtype)
            parameter.data = rounded.float() if islands and islands.hold(name) else rounded
            if parameter.requires_grad:
                collect_into(_gradient_of(self.masters[name]), parameter, name, self._collected)
        self.zero_grad()

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, FP32 master)."""
        yield from self.masters.items()

    def second_use(self, parameter: nn.Parameter) -> Tensor:
        """Return a leaf on the storage of `parameter` whose gradient is collected separately.

        For a parameter used twice (an embedding tied to the head), autograd would add the half gradients in half,
        before they can be widened; and it would allocate memory to add the embedding's sparse gradient to the head's
        dense one. A frozen parameter has no gradient, and is returned itself.
        """
        if not parameter.requires_grad:
            return parameter
        if self.shared:
            alias = nn.Parameter(parameter.detach())
            alias.grad = parameter.grad
            return alias
        (name,) = [name for name, own in self._compute.items() if own is parameter]
        alias = nn.Parameter(parameter.detach())
        collect_into(_gradient_of(self.masters[name]), alias, name, self._collected)
        return alias

    def zero_grad(self) -> None:
        """Discard every gradient. The tensors are allocated once; the next gradient overwrites their content."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            elif self.shared:
                master.grad.zero_()
        self._collected.clear()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, accumulated FP32 gradient), in the module's order."""
        for name, master in self.masters.items():
            assert master.grad is not None
            if not self.shared and name not in self._collected:
                # No gradient since the last optimizer step, because this one has no micro-batch.
                master.grad.zero_()
                self._collected.add(name)
            yield name, master.grad

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters to the parameters that compute, rounded once to the compute dtype."""
        if not self.shared:
            for name, master in self.masters.items():
                parameter = self._compute[name]
                casts = self._casts and parameter.dtype != master.dtype
                # `copy_` counts as a change of the parameter, which a kernel's writes would not.
                parameter.copy_(master if casts else to_format(master, self._compute_dtype))

    @torch.no_grad()
    def on_the_wire(self, wire_dtype: DtypeName) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, master or frozen parameter rounded once to the wire dtype), one tensor at a time."""
        for name in self._compute:
            yield from unfused([(name, to_format(self.local(name), wire_dtype))])

    def local(self, name: str) -> Tensor:
        """Return the FP32 master of a parameter; of a frozen parameter, its values in the compute dtype."""
        return self.masters.get(name, self._compute[name]).detach()

    def from_rows(self, name: str, rows: Tensor) -> Tensor:
        """Return `rows`, which are whole already."""
        return rows

    def add_over_ranks(self, counts: Tensor) -> Tensor:
        """Return `counts`: there is one process."""
        return counts

    def computing(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, computing parameter, in the compute dtype); that cast is exact for FP32 islands too."""
        for name, parameter in self._compute.items():
            yield name, to_format(parameter.detach(), self._compute_dtype)

    def computing_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a parameter's tensor while the module computes."""
        return self._compute[name].dtype

    def held(self) -> dict[str, Tensor]:
        """Return copies of the trained parameters in the compute dtype, for `exchange`."""
        return {name: computing.clone() for name, computing in self._trained()}

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, computing) for name, computing in self.computing() if name in self.masters)

    def whole(self, held: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of `held`, which are whole already."""
        yield from held.items()

    def ranges(self) -> dict[str, ShardRange]:
        """Return no rows: every tensor is whole."""
        return {}

    @torch.no_grad()
    def exchange(self, held: Mapping[str, Tensor]) -> None:
        """See `WeightStore.exchange`; with an FP32 compute dtype the masters are the parameters and change too."""
        for name, computing in self._trained():
            own = computing.clone()
            # `copy_` counts as a change of the parameter, by which widened copies are refreshed.
            self._compute[name].copy_(held[name])
            held[name].copy_(own)

    def state(self) -> dict[str, Tensor]:
        """Return the masters by name, detached; they share memory with the store."""
        return {name: master.detach() for name, master in self.masters.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Replace the masters' values and publish them; see `WeightStore.load`."""
        require_parameters(self.masters.items(), tensors, source)
        for name, master in self.masters.items():
            master.copy_(tensors[name])
        self.publish()


def _gradient_of(master: nn.Parameter) -> Callable[[], Tensor]:
    def gradient() -> Tensor:
        assert master.grad is not None
        return master.grad

    return gradient
