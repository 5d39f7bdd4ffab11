"""Hooks that show every value of a module's forward and backward passes without changing a bit.

These are the output of each module, inputs that are not the output of another module, and gradients.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from betterhalf.diagnostics.numerics import Kind

See = Callable[[str, Kind, Tensor], None]
"""Called with (module name, kind, value) for every value, in the order of computation."""

_LAYER = re.compile(r"\.layers\.\d+$")
_RECENT = 8
"""Number of recent outputs with which an input is compared; several modules, such as the projections of queries and
values, read the same output."""


@contextmanager
def observe_module(module: nn.Module, see: See) -> Iterator[None]:
    """Call `see` with the values of every leaf module and decoder layer, in the order of computation.

    The hooks only read, so numbers stay the same bit for bit. FP32 gradients of weights are the exception: with a hook
    they are computed first and added afterwards, not added in place (`precision.products.direct_sum`). Leaf modules
    without parameters, such as activations, are included; `nn.Identity` is not. Values that are not floating-point
    tensors, such as token ids or rope's pair of tables, are left out.
    """
    observer = _Observer(see)
    handles = [handle for name, part in module.named_modules() for handle in observer.hooks(name, part)]
    handles += observer.parameter_hooks(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Observer:
    """Hooks that call `see`."""

    def __init__(self, see: See) -> None:
        self._see = see
        self._recent: deque[Tensor] = deque(maxlen=_RECENT)

    def hooks(self, name: str, part: nn.Module) -> list[RemovableHandle]:
        """Install the hooks of one module; containers other than decoder layers get none."""
        if _LAYER.search(name):
            return [part.register_forward_hook(partial(self._after, name))]
        if name == "" or any(part.children()) or isinstance(part, nn.Identity):
            return []
        # Prepended, to see the half input before an FP32 island's own hook widens it.
        before = part.register_forward_pre_hook(partial(self._before, name), prepend=True)
        return [before, part.register_forward_hook(partial(self._after, name))]

    def parameter_hooks(self, module: nn.Module) -> list[RemovableHandle]:
        """Install hooks that see each parameter's gradient of every backward pass."""
        named = [(name.rpartition(".")[0], p) for name, p in module.named_parameters() if p.requires_grad]
        return [_on_gradient(p, partial(self._gradient, owner, "gradient")) for owner, p in named]

    def _before(self, name: str, part: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Any = inputs[0] if inputs else None
        if _is_floating(x) and not any(_same_values(x, seen) for seen in self._recent):
            self._see(name, "input", x.detach())

    def _after(self, name: str, part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not _is_floating(output):
            return
        # Detached: an output whose hook refers to the output itself would keep the whole graph alive.
        self._recent.append(output.detach())
        self._see(name, "forward", output.detach())
        if output.requires_grad:
            _on_gradient(output, partial(self._gradient, name, "backward"))

    def _gradient(self, name: str, kind: Kind, gradient: Tensor) -> None:
        # An embedding's gradient is sparse; a census also counts the zeros of its other rows.
        self._see(name, kind, gradient.detach().to_dense() if gradient.is_sparse else gradient.detach())


def _on_gradient(x: Tensor, see: Callable[[Tensor], None]) -> RemovableHandle:
    handle: RemovableHandle = x.register_hook(see)  # type: ignore[no-untyped-call]
    return handle


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0


def _same_values(x: Tensor, seen: Tensor) -> bool:
    """Return whether `x` and `seen` are the same memory, perhaps in different shapes."""
    return x.data_ptr() == seen.data_ptr() and x.numel() == seen.numel()
