"""Check of a forward pass: every product with a parameter is made by a layer that has a precision rule.

`coverage.require_covered` reads a model's structure; this finds what structure does not show, such as `torch.matmul`,
`einsum`, `bmm` or a grouped product of a covered layer's weight, or of a copy of it, outside that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addbmm", "aten::linear", "aten::matmul"),
    *("aten::mv", "aten::addmv", "aten::dot", "aten::vdot", "aten::ger", "aten::addr", "aten::inner"),
    *("aten::einsum", "aten::convolution", "aten::bilinear", "aten::_trilinear"),
    *("aten::_grouped_mm", "aten::_scaled_mm", "aten::_scaled_grouped_mm", "aten::_int_mm"),
    *("mkldnn::_linear_pointwise", "aten::mkldnn_linear"),
    *("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"),
}
"""Dispatcher names of the operations that multiply and add."""

_PLAIN = {"aten", "prim", "prims", "mkldnn", "c10d", "_c10d_functional", "fsdp", "profiler"}
"""Namespaces in which no other operation is a product; any operation of another namespace counts as one."""


def half_products(run: Callable[[], object]) -> list[Tensor]:
    """Return the half operands of all products that `run` makes."""
    seen = _Operands()
    with torch.no_grad(), seen:
        run()
    return seen.operands


def uncovered_products(module: nn.Module, covered: Callable[[nn.Module], bool], run: Callable[[], object]) -> list[str]:
    """Return the parameters that are multiplied outside covered layers, sorted by name.

    Args:
        module: model; its parameters may be gathered during the pass.
        covered: returns True for a layer whose products follow a precision rule.
        run: performs a forward pass of `module`.
    """
    watch = _Watch(module, covered)
    with torch.no_grad(), watch.hooked(), watch:
        run()
    return sorted(watch.found)


def _is_product(func: Any) -> bool:
    name = func.name().partition(".")[0]
    return name in _PRODUCTS or name.partition("::")[0] not in _PLAIN


class _Operands(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the half operands of every product."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operands: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_product(func):
            self.operands += [x for x in _tensors(args, kwargs) if x.itemsize < 4]
        return func(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow parameters, their views and their copies to the products that read them."""

    def __init__(self, module: nn.Module, covered: Callable[[nn.Module], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()
        """Names of parameters that are multiplied outside covered layers."""
        self._covered = covered
        self._depth = 0
        """Number of covered layers that are running, one inside another."""
        self._paths = {part: path for path, part in module.named_modules()}
        self._names: dict[int, str] = {}
        """Address of a storage object -> name of the parameter whose values it holds."""
        self._alive: list[Any] = []
        """These storages, kept alive: the address of a freed one could be used again."""
        self._follow(module, "")

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Return a context in which calls of modules are seen."""
        hooks = (register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, part: nn.Module, _args: Any) -> None:
        # FSDP2 gathers parameters in the hook of the layer around them.
        if part in self._paths:
            self._follow(part, self._paths[part])
            self._depth += self._covered(part)

    def _leave(self, part: nn.Module, _args: Any, _out: Any) -> None:
        if part in self._paths:
            self._depth -= self._covered(part)

    def _follow(self, part: nn.Module, path: str) -> None:
        for name, parameter in part.named_parameters():
            if type(parameter) is nn.Parameter:
                self._note(parameter, f"{path}.{name}" if path else name)

    def _note(self, tensor: Tensor, name: str) -> None:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            self._names.setdefault(storage._cdata, name)
            self._alive.append(storage)

    def _name(self, tensor: Tensor) -> str | None:
        return self._names.get(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._depth:
            names = [self._name(x) for x in _tensors(args, kwargs)]
            read = {name for name in names if name is not None}
            if read and _is_product(func):
                self.found |= read
            elif len(read) == 1 and None not in names:
                # A copy: numbers that come from this parameter alone.
                for tensor in _tensors((out,), None):
                    self._note(tensor, min(read))
        return out


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """Return the floating-point tensors among some arguments, also in lists."""
    flat = torch.utils._pytree.tree_leaves((args, kwargs or {}))
    return [x for x in flat if isinstance(x, Tensor) and x.is_floating_point()]
