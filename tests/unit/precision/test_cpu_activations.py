"""SiLU and GELU in FP32, rounded once: values, gradients, and bits that do not depend on an element's place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import GELUTanh

from betterhalf.precision.cpu_activations import CpuGeluTanh, CpuSilu, gelu_tanh, silu, use_cpu_activations


def values(count: int = 4001) -> torch.Tensor:
    return 6 * torch.randn(count, generator=torch.Generator().manual_seed(0))


KINDS = {
    "silu": (silu, CpuSilu, F.silu),
    "gelu": (gelu_tanh, CpuGeluTanh, partial(F.gelu, approximate="tanh")),
}
Kind = tuple[Callable[[torch.Tensor], torch.Tensor], type[nn.Module], Callable[[torch.Tensor], torch.Tensor]]
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@kinds
def test_an_activation_equals_float64(kind: Kind) -> None:
    ours, _, theirs = kind
    x = torch.cat((values(), torch.tensor([0.0, -200.0, 200.0])))
    torch.testing.assert_close(ours(x).double(), theirs(x.double()), rtol=3e-6, atol=1e-7)


@kinds
def test_an_element_has_the_same_bits_at_every_place(kind: Kind) -> None:
    ours, _, _ = kind
    x = values()
    whole = ours(x)
    for part in (slice(0, 1), slice(3, 10), slice(1, 18), slice(7, 4001)):
        assert torch.equal(ours(x[part]), whole[part])
    assert torch.equal(ours(x[:4000].view(50, 80)[:, 3:50]), whole[:4000].view(50, 80)[:, 3:50])


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_module_rounds_once_and_has_torchs_gradient(kind: Kind, dtype: torch.dtype) -> None:
    ours, module, theirs = kind
    x = values().to(dtype).requires_grad_()
    other = x.detach().clone().requires_grad_()
    out = module()(x)
    assert torch.equal(out, ours(x.detach()).to(dtype))
    out.sum().backward()
    theirs(other).sum().backward()
    assert x.grad is not None and other.grad is not None and torch.equal(x.grad, other.grad)


def test_only_silu_and_the_tanh_approximation_of_gelu_are_replaced() -> None:
    module = nn.Sequential(nn.SiLU(), nn.GELU(), nn.Sequential(nn.SiLU(), GELUTanh()))
    assert use_cpu_activations(module) == 3
    assert isinstance(module[0], CpuSilu) and isinstance(module[1], nn.GELU) and isinstance(module[2][0], CpuSilu)
    assert isinstance(module[2][1], CpuGeluTanh)
