"""CPU linear layers against float64 arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from betterhalf.config.schema import PrecisionConfig
from betterhalf.precision.cpu_linear import CpuLinear, Widened, cpu_linear, use_cpu_linear, widened_linear
from betterhalf.precision.islands import Islands
from betterhalf.precision.products import has_native_matmul
from betterhalf.precision.roles import build_precision

HALVES = [torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1), (7, 24, 5), (64, 576, 40), (4, 1024, 300), (32, 48, 2048), (200, 17, 9)]


def neighbours(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the spacing of half numbers at float64 values: one unit in the last place."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent)


def assert_rounded(got: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
    """Assert that `got` is left @ right + bias within one unit in the last place plus the error of FP32 sums."""
    exact, magnitude = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    terms = left.shape[-1]
    if bias is not None:
        exact, magnitude, terms = exact + bias.double(), magnitude + bias.double().abs(), terms + 1
    allowed = neighbours(exact, got.dtype) + terms * 2.0**-24 * magnitude
    excess = (got.double() - exact).abs() - allowed
    assert excess.max() <= 0, f"worst excess {excess.max().item()}"


def operands(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(rows * 10_007 + inputs)
    x = torch.randn(rows, inputs).to(dtype).requires_grad_()
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype).requires_grad_()
    bias = torch.randn(outputs).to(dtype).requires_grad_()
    return x, weight, bias, torch.randn(rows, outputs).to(dtype)


def half_module(*args: int, dtype: torch.dtype, bias: bool = True) -> CpuLinear:
    linear = nn.Linear(*args, bias=bias)
    for parameter in linear.parameters():
        parameter.data = parameter.data.to(dtype)
    return CpuLinear(linear)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_float64_within_one_unit_in_the_last_place(
    dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    x, weight, bias, _ = operands(*shape, dtype)
    out = cpu_linear(x, weight, bias, weight.float(), bias.float())
    assert out.dtype == dtype
    assert_rounded(out, x, weight.t(), bias)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_float64_within_one_unit_in_the_last_place(
    dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    x, weight, bias, grad = operands(*shape, dtype)
    cpu_linear(x, weight, bias, weight.float(), bias.float()).backward(grad)
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    assert {x.grad.dtype, weight.grad.dtype, bias.grad.dtype} == {dtype}
    assert_rounded(x.grad, grad, weight)
    assert_rounded(weight.grad, grad.t(), x)
    assert_rounded(bias.grad.unsqueeze(0), torch.ones(1, shape[0], dtype=dtype), grad)


@pytest.mark.parametrize("dtype", HALVES)
def test_cancelling_sums_stay_within_the_bound_of_fp32_addition(dtype: torch.dtype) -> None:
    left = torch.randn(8, 512).to(dtype)
    x = torch.cat([left, -left], dim=1)
    weight = torch.rand(6, 512).to(dtype)
    weight = torch.cat([weight, weight], dim=1)
    weight[:, 0] += 0.25
    assert_rounded(widened_linear(x, weight.float(), None, dtype), x, weight.t())


def test_sums_do_not_stall_where_half_sums_would() -> None:
    ones, weight = torch.ones(1, 4096, dtype=torch.float16), torch.ones(1, 4096)
    assert widened_linear(ones, weight, None, torch.float16).item() == 4096.0
    assert half_sum(ones) == 2048.0


def half_sum(values: Tensor) -> float:
    """Add the values sequentially in FP16, which stops at 2048, where the spacing is 2."""
    total = torch.zeros((), dtype=torch.float16)
    for value in values.flatten():
        total = total + value
    return total.item()


@pytest.mark.parametrize(("total", "rounded"), [(2049.0, 2048.0), (2051.0, 2052.0), (2053.0, 2052.0)])
def test_fp16_results_round_ties_to_even(total: float, rounded: float) -> None:
    x = torch.tensor([[2048.0, 1.0]], dtype=torch.float16)
    weight = torch.tensor([[1.0, total - 2048.0]])
    assert widened_linear(x, weight, None, torch.float16).item() == rounded


def test_fp16_results_overflow_to_infinity_only_from_65520() -> None:
    x = torch.tensor([[65504.0, 1.0]], dtype=torch.float16)
    weight = torch.tensor([[1.0, 15.0], [1.0, 16.0], [-1.0, -16.0]])
    assert widened_linear(x, weight, None, torch.float16).tolist() == [[65504.0, float("inf"), float("-inf")]]


def test_a_sum_beyond_half_range_on_the_way_does_not_overflow() -> None:
    x = torch.full((1, 4), 60000.0, dtype=torch.float16)
    assert widened_linear(x, torch.tensor([[1.0, 1.0, -1.0, -0.5]]), None, torch.float16).item() == 30000.0


def test_subnormal_results_are_kept_and_the_smallest_tie_goes_to_zero() -> None:
    x = torch.tensor([[2.0**-12]], dtype=torch.float16)
    weight = torch.tensor([[2.0**-12], [3 * 2.0**-13], [2.0**-13], [1.5 * 2.0**-13]])
    in_units_of_2_to_minus_24 = widened_linear(x, weight, None, torch.float16).double() * 2.0**24
    assert in_units_of_2_to_minus_24.tolist() == [[1.0, 2.0, 0.0, 1.0]]


def test_subnormal_operands_are_not_flushed() -> None:
    x = torch.tensor([[2.0**-24]], dtype=torch.float16)
    assert widened_linear(x, torch.tensor([[1024.0]]), None, torch.float16).item() == 2.0**-14


def test_gradients_overflow_to_infinity_and_are_not_clamped() -> None:
    weight = torch.full((1, 1), 2.0, dtype=torch.float16, requires_grad=True)
    x = torch.full((1, 1), 1.0, dtype=torch.float16, requires_grad=True)
    cpu_linear(x, weight, None, weight.detach().float(), None).backward(
        torch.full((1, 1), 40000.0, dtype=torch.float16)
    )
    assert x.grad is not None and x.grad.item() == float("inf")
    assert weight.grad is not None and weight.grad.item() == 40000.0


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_leading_dimensions_only_reshape(leading: tuple[int, ...]) -> None:
    module = half_module(8, 5, dtype=torch.float16)
    x = torch.randn(*leading, 8).half().requires_grad_()
    out = module(x)
    assert out.shape == (*leading, 5)
    assert torch.equal(out.reshape(-1, 5), module(x.reshape(-1, 8)))
    out.backward(torch.ones_like(out))
    assert x.grad is not None and x.grad.shape == x.shape
    column_sums = module.weight.detach().float().sum(0).half()
    assert torch.equal(x.grad, column_sums.expand_as(x))


def test_strided_inputs_and_gradients_give_the_same_numbers() -> None:
    module = half_module(8, 5, dtype=torch.float16)
    x, grad = torch.randn(8, 6).half().t().requires_grad_(), torch.randn(5, 6).half().t()
    plain = x.detach().contiguous().requires_grad_()
    module(x).backward(grad)
    strided, module.weight.grad = module.weight.grad, None
    module(plain).backward(grad.contiguous())
    assert torch.equal(strided, module.weight.grad)
    assert x.grad is not None and plain.grad is not None and torch.equal(x.grad, plain.grad)


def test_inputs_already_widened_give_the_same_result() -> None:
    x, weight, _, _ = operands(5, 64, 40, torch.bfloat16)
    wide = weight.detach().float()
    same = [widened_linear(value, wide, None, torch.bfloat16) for value in (x.detach(), x.detach().float())]
    assert torch.equal(same[0], same[1])


def test_fp32_results_are_left_unrounded() -> None:
    x, weight, _, _ = operands(5, 64, 40, torch.float16)
    out = widened_linear(x.detach(), weight.detach().float(), None, torch.float32)
    exact = x.detach().double() @ weight.detach().double().t()
    assert (out - exact).abs().max() < 1e-5 and not torch.equal(out, out.half().float())


def test_gradients_that_are_not_needed_are_not_computed() -> None:
    module = half_module(8, 5, dtype=torch.float16)
    module.weight.requires_grad_(False)
    assert module.bias is not None
    module.bias.requires_grad_(False)
    x = torch.randn(3, 8).half().requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None and module.weight.grad is None and module.bias.grad is None
    module.weight.requires_grad_(True)
    module(x.detach()).sum().backward()
    assert module.weight.grad is not None


def test_the_state_dict_and_the_parameters_are_those_of_the_linear_layer() -> None:
    linear = nn.Linear(4, 3)
    module = CpuLinear(linear)
    assert module.weight is linear.weight and module.bias is linear.bias
    assert list(module.state_dict()) == list(linear.state_dict())


def test_the_widened_copy_is_kept_until_an_in_place_update() -> None:
    module = half_module(4, 3, dtype=torch.float16)
    first = module.weight_wide()
    address = first.data_ptr()
    module(torch.randn(2, 4).half())
    assert module.weight_wide() is first
    with torch.no_grad():
        module.weight.mul_(2)
    assert torch.equal(module.weight_wide(), module.weight.float())
    assert module.weight_wide().data_ptr() == address


def test_the_bias_is_refreshed_as_well() -> None:
    module = half_module(4, 3, dtype=torch.float16)
    zero = torch.zeros(1, 4).half()
    assert module.bias is not None and torch.equal(module(zero)[0], module.bias)
    with torch.no_grad():
        module.bias.add_(1)
    assert torch.equal(module(zero)[0], module.bias)


def test_replacing_the_data_or_the_parameter_is_detected() -> None:
    module = half_module(4, 3, dtype=torch.float16)
    module.weight_wide()
    for _ in range(3):
        module.weight.data = torch.randn(3, 4).half()
        assert torch.equal(module.weight_wide(), module.weight.float())
    module.weight = nn.Parameter(torch.randn(3, 4).half())
    assert torch.equal(module.weight_wide(), module.weight.float())


def test_an_update_in_inference_mode_is_detected() -> None:
    weight = torch.ones(2, 2).half()
    wide = Widened(weight)
    wide()
    with torch.inference_mode():
        weight.add_(1)
    assert wide().eq(2).all()


def test_a_first_pass_in_inference_mode_does_not_spoil_training() -> None:
    module = half_module(4, 3, dtype=torch.float16)
    with torch.inference_mode():
        module(torch.randn(2, 4).half())
    module(torch.randn(2, 4).half()).sum().backward()
    assert module.weight.grad is not None


def test_a_weight_changed_between_forward_and_backward_is_an_error_once_widened_again() -> None:
    module = half_module(4, 3, dtype=torch.float16)
    x = torch.randn(2, 4).half().requires_grad_()
    out = module(x)
    with torch.no_grad():
        module.weight.mul_(2)
    module.weight_wide()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_deep_copy_follows_its_own_weight() -> None:
    module = half_module(4, 3, dtype=torch.float16)
    module.weight_wide()
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.weight.mul_(2)
    assert torch.equal(twin.weight_wide(), 2 * module.weight_wide())


def swap(module: nn.Module, **settings: str) -> int:
    return use_cpu_linear(module, build_precision(PrecisionConfig(**settings), torch.device("cpu")))  # type: ignore[arg-type]


def half_stack(dtype: torch.dtype) -> nn.Sequential:
    shared = nn.Linear(4, 4)
    stack = nn.Sequential(shared, nn.Sequential(nn.Linear(4, 4, bias=False), shared), nn.LayerNorm(4))
    for parameter in stack.parameters():
        parameter.data = parameter.data.to(dtype)
    return stack


def test_every_linear_layer_of_the_compute_dtype_is_replaced_once() -> None:
    stack = half_stack(torch.float16)
    names, x = list(stack.state_dict()), torch.randn(2, 4).half()
    before = stack(x)
    assert swap(stack, preset="fp16") == 2
    assert list(stack.state_dict()) == names
    assert stack[0] is stack[1][1] and isinstance(stack[1][0], CpuLinear)
    torch.testing.assert_close(stack(x), before, atol=4e-3, rtol=4e-3)
    assert swap(stack, preset="fp16") == 0


@pytest.mark.parametrize(
    ("dtype", "settings", "count"),
    [
        (torch.bfloat16, {"preset": "bf16"}, 0 if has_native_matmul(torch.bfloat16) else 2),
        (torch.bfloat16, {"preset": "bf16", "half_matmul": "fp32_sums"}, 2),
        (torch.float16, {"preset": "fp16", "half_matmul": "native"}, 0),
        (torch.float32, {"preset": "fp32"}, 2),
        # FP32 masters, which are rounded when they are gathered
        (torch.float32, {"preset": "fp16"}, 2),
    ],
)
def test_layers_are_replaced_only_where_the_precision_asks_for_fp32_sums(
    dtype: torch.dtype, settings: dict[str, str], count: int
) -> None:
    assert swap(half_stack(dtype), **settings) == count


def test_a_dtype_mismatch_is_refused() -> None:
    with pytest.raises(AssertionError, match="input is torch.float32"):
        half_module(4, 3, dtype=torch.float16)(torch.randn(2, 4))


@pytest.mark.parametrize("hooked", [False, True])
def test_fp32_gradients_add_up_over_passes_with_and_without_a_hook(hooked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = CpuLinear(nn.Linear(24, 5))
    layer.weight.grad, seen = torch.zeros_like(layer.weight), []
    if hooked:
        layer.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    expected = torch.zeros(5, 24, dtype=torch.float64)
    for _ in range(3):
        x, upstream = torch.randn(7, 24, generator=generator), torch.randn(7, 5, generator=generator)
        (layer(x) * upstream).sum().backward()
        expected += upstream.double().t() @ x.double()
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == (3 if hooked else 0)


def test_a_write_that_moves_no_version_counter_is_seen_after_forget() -> None:
    layer = half_module(4, 3, dtype=torch.float16)
    layer.weight_wide(), layer.bias_wide()
    for tensor in (layer.weight, layer.bias):
        assert tensor is not None
        # as FSDP2 writes a gathered weight
        with torch.autograd._unsafe_preserve_version_counter(tensor), torch.no_grad():
            tensor.fill_(2.0)
    assert not torch.equal(layer.weight_wide(), layer.weight.float()), "forget() would not be needed"
    layer.forget()
    assert torch.equal(layer.weight_wide(), torch.full((3, 4), 2.0))
    assert torch.equal(layer.bias_wide(), torch.full((3,), 2.0))  # type: ignore[arg-type]


def test_layers_of_islands_are_left_alone_unless_rows_must_be_independent() -> None:
    islands = Islands(names=("1",), layers=())
    precision = build_precision(PrecisionConfig(preset="fp16"), torch.device("cpu"))
    stack = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    assert use_cpu_linear(stack, precision, islands) == 1
    assert isinstance(stack[0], CpuLinear) and type(stack[1][0]) is nn.Linear
    assert use_cpu_linear(stack, precision) == 1
