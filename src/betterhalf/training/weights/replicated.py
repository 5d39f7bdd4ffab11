"""FP32 master weights beside the half weights that compute.

The module computes on parameters in the compute dtype; the optimizer holds FP32 masters. A parameter's half gradient
is rounded once, by the backward pass of one micro-batch, and immediately added to the master's FP32 gradient; a sum
in half over micro-batches would lose the small ones. With an FP32 compute dtype, masters and parameters are the same
tensors.

Parameters of FP32 islands are FP32 tensors, so that their gradients are FP32. Their values are still rounded to the
compute dtype: the weights sent to the engine, and every digest, are the same as without islands.

Parameters are cast by name. Casting the module would round rope's inverse frequencies too, which alone raises the
mismatch a hundredfold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from betterhalf.kernels import fused
from betterhalf.precision.emulation import to_format
from betterhalf.precision.formats import is_emulated
from betterhalf.precision.islands import Islands
from betterhalf.training.weights.store import require_parameters
from betterhalf.types import DtypeName

_CACHED = 2**19
"""Number of gradient entries added at a time on a CPU: 2 MiB in FP32."""


class ReplicatedWeights:
    """All masters of one module in this process; implements `WeightStore`."""

    def __init__(self, module: nn.Module, compute_dtype: DtypeName, islands: Islands | None = None) -> None:
        """Keep the module's FP32 parameters as masters, and convert those that compute to `compute_dtype`.

        Args:
            module: its parameters are FP32, on their final device.
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
                self.masters[name] = parameter
            else:
                self.masters[name] = nn.Parameter(parameter.detach().clone())
                rounded = to_format(parameter.data, compute_dtype)
                parameter.data = rounded.float() if islands and islands.hold(name) else rounded
                parameter.register_post_accumulate_grad_hook(self._collector(name))  # type: ignore[no-untyped-call]
        self.zero_grad()

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        # Without `self`: a hook that refers to its own parameter is a cycle through C++, which is never collected.
        master, collected = self.masters[name], self._collected

        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None and master.grad is not None
            if parameter.grad.is_sparse:
                _add_rows(master.grad, parameter.grad, empty=name not in collected)
            else:
                _add(master.grad, parameter.grad, empty=name not in collected)
            collected.add(name)
            parameter.grad = None

        return collect

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, FP32 master)."""
        yield from self.masters.items()

    def second_use(self, parameter: nn.Parameter) -> Tensor:
        """Return a leaf on the storage of `parameter` whose gradient is collected separately.

        For a parameter used twice (an embedding tied to the head), autograd would add the half gradients in half,
        before they can be widened; and it would allocate memory to add the embedding's sparse gradient to the head's
        dense one.
        """
        if self.shared:
            alias = nn.Parameter(parameter.detach())
            alias.grad = parameter.grad
            return alias
        (name,) = [name for name, own in self._compute.items() if own is parameter]
        alias = nn.Parameter(parameter.detach())
        alias.register_post_accumulate_grad_hook(self._collector(name))  # type: ignore[no-untyped-call]
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
            for name, parameter in self._compute.items():
                master = self.masters[name]
                casts = self._casts and parameter.dtype != master.dtype
                # `copy_` counts as a change of the parameter, which a kernel's writes would not.
                parameter.copy_(master if casts else to_format(master, self._compute_dtype))

    @torch.no_grad()
    def on_the_wire(self, wire_dtype: DtypeName) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, master rounded once to the wire dtype), one tensor at a time."""
        for name, master in self.masters.items():
            yield name, to_format(master.detach(), wire_dtype)

    def computing(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, computing parameter, in the compute dtype); that cast is exact for FP32 islands too."""
        for name, parameter in self._compute.items():
            yield name, to_format(parameter.detach(), self._compute_dtype)

    @torch.no_grad()
    def exchange(self, held: Mapping[str, Tensor]) -> None:
        """See `WeightStore.exchange`; with an FP32 compute dtype the masters are the parameters and change too."""
        for name, computing in self.computing():
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


def _add(total: Tensor, half: Tensor, *, empty: bool) -> None:
    """Add a gradient to the FP32 `total`; with `empty`, the content of `total` is stale and is overwritten."""
    if fused(half) and half.is_contiguous() and total.is_contiguous():
        # Imported only on a GPU, because it needs Triton.
        from betterhalf.kernels import gradients

        gradients.accumulate(total, half, empty=empty)
        return
    if empty:
        total.copy_(half)
        return
    # torch widens the whole operand first; a part at a time, the result stays in the CPU's cache.
    rows = max(1, _CACHED * total.shape[0] // max(1, total.numel())) if total.is_cpu else total.shape[0]
    for part, share in zip(torch.split(total, rows), torch.split(half, rows), strict=True):
        part.add_(share)


def _add_rows(total: Tensor, sparse: Tensor, *, empty: bool) -> None:
    """Add a sparse gradient to the FP32 `total`; with `empty`, the content of `total` is stale and is discarded."""
    if empty:
        total.zero_()
    rows = sparse.coalesce()
    total.index_add_(0, rows.indices()[0], rows.values().float())
