"""Watch a module compute: every output, every input that is no output, every gradient, without changing a bit."""

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
"""Told of every value as it is computed: (module, kind, value)."""

_LAYER = re.compile(r"\.layers\.\d+$")
_RECENT = 8
"""Outputs remembered to tell whether an input is one of them; siblings such as queries and values share an input."""


@contextmanager
def watched(module: nn.Module, see: See) -> Iterator[None]:
    """Show `see` what every leaf module and decoder layer computes, in the order of computation, forward and backward.

    Numbers stay the same bit for bit, since hooks only look, but for FP32 gradients of weights, which are made before
    they are added up so that there is something to see (`precision.products.direct_sum`). Leaves without parameters are
    included (activations); what is no floating tensor, such as token ids or rope's pair of tables, is not.
    """
    watcher = _Watcher(see)
    handles = [handle for name, part in module.named_modules() for handle in watcher.hooks(name, part)]
    handles += watcher.parameter_hooks(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watcher:
    """Hooks that call `see`."""

    def __init__(self, see: See) -> None:
        self._see = see
        self._recent: deque[Tensor] = deque(maxlen=_RECENT)

    def hooks(self, name: str, part: nn.Module) -> list[RemovableHandle]:
        """Hooks on one module: none on containers other than decoder layers."""
        if _LAYER.search(name):
            return [part.register_forward_hook(partial(self._after, name))]
        if name == "" or any(part.children()):
            return []
        # First of all: an FP32 island's own hook widens the input, which is held in half until then.
        before = part.register_forward_pre_hook(partial(self._before, name), prepend=True)
        return [before, part.register_forward_hook(partial(self._after, name))]

    def parameter_hooks(self, module: nn.Module) -> list[RemovableHandle]:
        """Hooks on the gradient that each backward pass brings to a parameter."""
        named = [(name.rpartition(".")[0], p) for name, p in module.named_parameters() if p.requires_grad]
        return [_on_gradient(p, partial(self._gradient, owner, "gradient")) for owner, p in named]

    def _before(self, name: str, part: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Any = inputs[0] if inputs else None
        if _is_floating(x) and not any(_same_values(x, seen) for seen in self._recent):
            self._see(name, "input", x.detach())

    def _after(self, name: str, part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not _is_floating(output):
            return
        # Detached: an output whose hook leads back to itself would keep the whole graph for ever.
        self._recent.append(output.detach())
        self._see(name, "forward", output.detach())
        if output.requires_grad:
            _on_gradient(output, partial(self._gradient, name, "backward"))

    def _gradient(self, name: str, kind: Kind, gradient: Tensor) -> None:
        # An embedding's is sparse: its other rows are zeros, which a census counts too.
        self._see(name, kind, gradient.detach().to_dense() if gradient.is_sparse else gradient.detach())


def _on_gradient(x: Tensor, see: Callable[[Tensor], None]) -> RemovableHandle:
    handle: RemovableHandle = x.register_hook(see)  # type: ignore[no-untyped-call]
    return handle


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0


def _same_values(x: Tensor, seen: Tensor) -> bool:
    """Whether `x` is `seen`, perhaps in another shape."""
    return x.data_ptr() == seen.data_ptr() and x.numel() == seen.numel()
