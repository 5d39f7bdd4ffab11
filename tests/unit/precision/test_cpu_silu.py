"""SiLU in FP32, rounded once: values, gradients, and bits that do not depend on an element's place."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from betterhalf.precision.cpu_silu import CpuSilu, silu, use_cpu_silu


def values(count: int = 4001) -> torch.Tensor:
    return 6 * torch.randn(count, generator=torch.Generator().manual_seed(0))


def test_silu_equals_float64() -> None:
    x = torch.cat((values(), torch.tensor([0.0, -200.0, 200.0])))
    torch.testing.assert_close(silu(x).double(), F.silu(x.double()), rtol=3e-7, atol=1e-30)


def test_an_element_has_the_same_bits_at_every_place() -> None:
    x = values()
    whole = silu(x)
    for part in (slice(0, 1), slice(3, 10), slice(1, 18), slice(7, 4001)):
        assert torch.equal(silu(x[part]), whole[part])
    assert torch.equal(silu(x[:4000].view(50, 80)[:, 3:50]), whole[:4000].view(50, 80)[:, 3:50])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_module_rounds_once_and_has_torchs_gradient(dtype: torch.dtype) -> None:
    x = values().to(dtype).requires_grad_()
    other = x.detach().clone().requires_grad_()
    out = CpuSilu()(x)
    assert torch.equal(out, silu(x.detach()).to(dtype))
    out.sum().backward()
    F.silu(other).sum().backward()
    assert x.grad is not None and other.grad is not None and torch.equal(x.grad, other.grad)


def test_only_silu_is_replaced() -> None:
    module = nn.Sequential(nn.SiLU(), nn.GELU(), nn.Sequential(nn.SiLU()))
    assert use_cpu_silu(module) == 2
    assert isinstance(module[0], CpuSilu) and isinstance(module[1], nn.GELU) and isinstance(module[2][0], CpuSilu)
