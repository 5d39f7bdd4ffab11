"""Emulated formats: every rounding bit for bit, and each operation of the trainer against float64 arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from betterhalf.precision import emulation
from betterhalf.precision.cpu_embedding import CpuEmbedding
from betterhalf.precision.cpu_linear import CpuLinear
from betterhalf.precision.emulation import emulation_facts, rounding_results, to_format
from betterhalf.precision.formats import EMULATED, held_format, is_on_grid, narrowest_format, round_to_format
from betterhalf.types import DtypeName

BF16, FP32 = torch.bfloat16, torch.float32
EVERY_BF16 = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)


@pytest.fixture(params=["kernel", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Round by the compiled kernel, or by torch operations."""
    if request.param == "torch":
        monkeypatch.setattr(emulation, "_kernels", lambda: None)
    elif emulation._kernels() is None:
        pytest.skip("there is no C compiler")
    return str(request.param)


def twice(x: Tensor, name: DtypeName) -> Tensor:
    """Return float64 numbers rounded to BF16 and then to the format, both by the float64 definition of rounding."""
    return round_to_format(round_to_format(x.double(), "bf16"), name)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Assert equality, signs of zeros included; any NaN equals any other."""
    found, expected = found.double(), expected.double()
    same = (found == expected) & (found.signbit() == expected.signbit()) | (found.isnan() & expected.isnan())
    assert same.all(), f"{found[~same][:5]} instead of {expected[~same][:5]}"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- rounding


@pytest.mark.parametrize("name", EMULATED)
def test_every_bf16_number_rounds_to_nearest_even(name: DtypeName, way: str) -> None:
    assert_same(to_format(EVERY_BF16, name), round_to_format(EVERY_BF16.double(), name))


@pytest.mark.parametrize("name", EMULATED)
@pytest.mark.parametrize("container", [BF16, FP32])
def test_fp32_bit_patterns_round_to_bf16_and_then_to_the_grid(
    name: DtypeName, container: torch.dtype, way: str
) -> None:
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(1))
    x = bits.to(torch.int32).view(FP32)
    found = to_format(x, name, container)
    assert found.dtype == container
    assert_same(found, twice(x, name))


@pytest.mark.parametrize("container", [BF16, FP32])
def test_special_numbers(container: torch.dtype, way: str) -> None:
    largest = 1.75 * 2.0**127  # of e8m2; halfway to 2^128 is 1.875 * 2^127, a BF16 number
    x = torch.tensor(
        [1.875 * 2.0**127, 1.8671875 * 2.0**127, -1.9 * 2.0**127, 2.0**-129, 2.0**-128, -0.0, 1.125, 1.375]
    )
    expected = torch.tensor([torch.inf, largest, -torch.inf, 0.0, 2.0**-128, -0.0, 1.0, 1.5])
    assert_same(to_format(x, "e8m2", container), expected)


def test_a_number_just_above_a_tie_is_rounded_twice(way: str) -> None:
    """1.125 + 2^-12 is nearer to 1.25, but BF16 holds 1.125, a tie, which goes to the even 1."""
    x = torch.tensor([1.125 + 2.0**-12])
    assert to_format(x, "e8m2").item() == 1.0
    assert round_to_format(x, "e8m2").item() == 1.25


@pytest.mark.parametrize("container", [BF16, FP32])
def test_rounding_leaves_its_argument_alone_whatever_its_strides(container: torch.dtype, way: str) -> None:
    x = normal(6, 4, 5, dtype=container)
    for view in (x, x.transpose(0, 2), x[:, 1:3], x[:0], x[0, 0, 0]):
        before = view.clone()
        found = to_format(view, "e8m3", container)
        assert torch.equal(view, before)
        assert_same(found, twice(before, "e8m3"))


def test_hardware_formats_are_torch_s_casts() -> None:
    x = normal(50)
    assert torch.equal(to_format(x, "fp16"), x.half())
    assert torch.equal(to_format(x, "bf16", FP32), x.bfloat16().float())
    assert to_format(x, "fp32") is x


# -- recognition


@pytest.mark.parametrize("name", EMULATED)
def test_the_emulated_format_of_values_is_recognised(name: DtypeName) -> None:
    x = normal(80)
    for container in (BF16, FP32):
        assert narrowest_format(to_format(x, name, container)) == name
    assert narrowest_format(x.bfloat16()) == "bf16"
    held = to_format(x, name)
    assert held_format(held, name) == name and held_format(held.float(), name) == "fp32"
    assert held_format(x.bfloat16(), name) == "bf16"
    held[3] = 1 + 2.0**-7
    assert not is_on_grid(held, name) and narrowest_format(held) == "bf16"


def test_twenty_three_values_are_too_few_to_tell_an_emulated_format() -> None:
    assert narrowest_format(torch.ones(23, dtype=BF16)) == "bf16"


def test_the_contract_says_emulated() -> None:
    assert emulation_facts("fp16", "bf16") == {}
    (words,) = emulation_facts("e8m3", "e8m3").values()
    assert words.startswith("e8m3: bf16 rounded once more, by")


# -- operations under the trainer's mode


def of_grid(*shape: int, seed: int, scale: int = 2) -> Tensor:
    """Return small multiples of 1/4: numbers of e8m3 whose products have exact FP32 sums in any order."""
    whole = torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(seed))
    return (whole.float() / 2**scale).to(BF16)


def run(module: Callable[..., Tensor], *inputs: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Return the result and the gradient of each input, computed under the trainer's mode."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with rounding_results("e8m3"):
        out = module(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("kind", [CpuLinear, lambda layer: layer])
def test_linear_layers(kind: Callable[[nn.Linear], nn.Module], way: str) -> None:
    layer = nn.Linear(24, 40)
    layer.weight.data, layer.bias.data = of_grid(40, 24, seed=1), of_grid(40, seed=2)
    x, upstream = of_grid(17, 24, seed=3), of_grid(17, 40, seed=4)
    module = kind(layer)
    x.requires_grad_()
    with rounding_results("e8m3"):
        out = module(x)
        grad_x, grad_weight, grad_bias = torch.autograd.grad(out, (x, layer.weight, layer.bias), upstream)
    wide_x, wide_weight, wide_up = x.double(), layer.weight.double(), upstream.double()
    product = wide_x @ wide_weight.T
    # A plain BF16 layer adds the bias inside the product, before it rounds.
    assert_same(out, twice(product + layer.bias.double(), "e8m3"))
    assert_same(grad_x, twice(wide_up @ wide_weight, "e8m3"))
    assert_same(grad_weight, twice(wide_up.T @ wide_x, "e8m3"))
    assert_same(grad_bias, twice(wide_up.sum(0), "e8m3"))
    assert not torch.equal(out.double(), product + layer.bias.double())


def test_embedding_and_its_sparse_gradient(way: str) -> None:
    table = nn.Embedding(5, 8)
    table.weight.data = of_grid(5, 8, seed=1)
    ids, upstream = torch.tensor([3, 0, 3, 3, 1] * 6), of_grid(30, 8, seed=2)
    module = CpuEmbedding(table)
    with rounding_results("e8m3"):
        out = module(ids)
        (grad,) = torch.autograd.grad(out, table.weight, upstream)
    assert torch.equal(out, table.weight[ids])
    expected = torch.zeros(5, 8, dtype=torch.float64).index_add_(0, ids, upstream.double())
    assert grad.is_sparse
    assert_same(grad.to_dense() + 0, twice(expected, "e8m3"))


def test_products_and_sums_of_activations(way: str) -> None:
    a, b, upstream = (to_format(normal(40, 48, seed=k), "e8m3") for k in range(3))
    wide_a, wide_b, wide_up = a.double(), b.double(), upstream.double()
    out, grad_a, grad_b = run(torch.mul, a, b, upstream=upstream)
    assert_same(out, twice(wide_a * wide_b, "e8m3"))
    assert_same(grad_a, twice(wide_up * wide_b, "e8m3"))
    assert_same(grad_b, twice(wide_up * wide_a, "e8m3"))
    out, grad_a, _ = run(torch.add, a, b, upstream=upstream)
    assert_same(out, twice(wide_a + wide_b, "e8m3"))
    assert torch.equal(grad_a, upstream)


def near(found: Tensor, exact: Tensor) -> None:
    """Assert that `found` is `exact` rounded twice, except for a few values that FP32 puts across a tie."""
    assert is_on_grid(found, "e8m3")
    different = found.double() != twice(exact, "e8m3")
    assert different.double().mean() < 1e-3
    assert ((found.double() - exact).abs() <= 2.0**-4 * 1.07 * exact.abs() + 1e-30).all()


def test_silu_and_its_gradient(way: str) -> None:
    x, upstream = (to_format(normal(60, 64, seed=k), "e8m3") for k in range(2))
    out, grad = run(F.silu, x, upstream=upstream)
    wide, sigmoid = x.double(), x.double().sigmoid()
    near(out, wide * sigmoid)
    near(grad, upstream.double() * (sigmoid * (1 + wide * (1 - sigmoid))))


def test_norm_is_rounded_before_and_after_its_weight(way: str) -> None:
    norm = LlamaRMSNorm(64, eps=1e-5)
    norm.weight.data = to_format(normal(64, seed=1) + 1, "e8m3")
    x = to_format(3 * normal(50, 64), "e8m3")
    with rounding_results("e8m3"), torch.no_grad():
        found = norm(x)
    wide = x.double()
    normed = twice(wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5), "e8m3")
    near(found, norm.weight.double() * normed)


def test_rope_rounds_tables_both_products_and_their_sum(way: str) -> None:
    q, k = (to_format(normal(1, 2, 9, 8, seed=s), "e8m3") for s in range(2))
    angles = torch.arange(9)[:, None] * 0.1 ** torch.arange(4).repeat(2)
    with rounding_results("e8m3"), torch.no_grad():
        cos, sin = angles.cos().to(BF16).unsqueeze(0), angles.sin().to(BF16).unsqueeze(0)
        found, _ = apply_rotary_pos_emb(q, k, cos, sin)
    wide = q.double()
    swapped = torch.cat((-wide[..., 4:], wide[..., :4]), -1)
    c, s = twice(angles.cos(), "e8m3"), twice(angles.sin(), "e8m3")
    assert_same(cos[0], c)
    assert_same(found + 0.0, twice(twice(wide * c, "e8m3") + twice(swapped * s, "e8m3"), "e8m3") + 0.0)


# -- the mode


def test_fp32_results_views_and_copies_are_left_alone(way: str) -> None:
    x = normal(8, 8, dtype=BF16)
    with rounding_results("e8m2"):
        assert torch.equal(x.t(), x.T) and torch.equal(x[2:].clone(), x[2:])
        assert torch.equal(x.float() * 3, 3 * x.float())
    assert not is_on_grid(x, "e8m2")


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.add_(1.0),
        lambda x: x.t().add_(1.0).t(),
        lambda x: x[:, ::2].mul_(1.1),
        lambda x: torch.add(x, 1.0, out=torch.empty_like(x)),
        lambda x: x.copy_(normal(8, 8, seed=4)),
        lambda x: x.float().to(BF16),
        lambda x: (x + 1).t() * 3,
        lambda x: torch.aminmax(x * 3).max,
        lambda x: (x * 3).to_sparse() * 1.1,
    ],
)
def test_results_of_every_kind_are_rounded(compute: Callable[[Tensor], Any], way: str) -> None:
    x = normal(8, 8, dtype=BF16)
    with rounding_results("e8m2"):
        out = compute(x)
    assert is_on_grid(out.to_dense() if out.is_sparse else out, "e8m2")


def test_hardware_formats_have_no_mode() -> None:
    with rounding_results("bf16"):
        assert not is_on_grid(normal(8, 8).to(BF16), "e8m6")


def test_the_mode_saves_rounded_values_for_the_backward_pass(way: str) -> None:
    x = torch.full((1,), 1.3, dtype=BF16, requires_grad=True)
    with rounding_results("e8m2"):
        y = x * 1.0
        (y * y).backward()
    assert y.item() == 1.25
    assert x.grad is not None and x.grad.item() == 2.5
