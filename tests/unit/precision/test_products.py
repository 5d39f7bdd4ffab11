"""Products by each library against float64."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from betterhalf.precision import products
from betterhalf.precision.products import (
    add_batched_product,
    add_product,
    batched_product,
    direct_sum,
    packed,
    product,
    product_into,
    unpacked,
)

SHAPES = [(1, 1, 1), (7, 24, 5), (64, 576, 40), (4, 1024, 300), (32, 48, 2048), (200, 17, 9)]


@pytest.fixture(params=["onednn", "mkl", "without"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Use oneDNN for everything, for packed weights only, or for nothing, whatever the CPU vendor."""
    if request.param == "without":
        monkeypatch.setattr(products, "_onednn", lambda: False)
    elif not products._onednn():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(products, "_plain_by_onednn", lambda: request.param == "onednn")
    yield request.param


@pytest.mark.parametrize(
    ("onednn", "mkl", "processor", "expected"),
    [
        (True, True, "AMD EPYC 9R14", True),
        (True, True, "Intel Xeon", False),
        (True, False, "Intel Core i5", True),
        (False, True, "AMD EPYC 9R14", False),
        (True, True, "", True),
    ],
)
def test_the_processor_chooses_the_library(
    onednn: bool, mkl: bool, processor: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(products, "_onednn", lambda: onednn)
    monkeypatch.setattr(torch._C, "has_mkl", mkl)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": processor} if processor else {})
    assert products._plain_by_onednn.__wrapped__() == expected


def operands(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows * 10_007 + inputs)
    return tuple(torch.randn(*shape).to(dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))  # type: ignore[return-value]


def assert_close(got: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
    """Assert that `got` is the product within the error of FP32 sums and one rounding to its dtype."""
    exact, magnitude = left.double() @ right.double().t(), left.double().abs() @ right.double().abs().t()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    allowed = (left.shape[-1] + 1) * 2.0**-24 * magnitude + torch.finfo(got.dtype).eps * exact.abs()
    assert ((got.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_float64_but_for_rounding(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    left, right, bias = operands(*shape, dtype)
    for weight in (right, packed(right)):
        assert_close(product(left, weight), left, right)
        assert_close(product(left, weight, bias), left, right, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_and_sliced_operands_are_multiplied(dtype: torch.dtype) -> None:
    left, right, _ = operands(33, 64, 40, dtype)
    assert_close(product(left, right.t().contiguous().t()), left, right)
    assert_close(product(left.t().contiguous().t(), right), left, right)
    assert_close(product(left[::2], right[8:20]), left[::2], right[8:20])
    assert product(left.t().contiguous().t(), right).is_contiguous()


def test_operands_with_gaps_between_rows_are_not_hundreds_of_times_slower() -> None:
    left, right, _ = operands(256, 64, 512, torch.float32)
    gaps = torch.randn(512, 192)[:, :64]

    def seconds(weight: Tensor) -> float:
        product(left, weight)
        start = time.perf_counter()
        for _ in range(5):
            product(left, weight)
        return time.perf_counter() - start

    assert min(seconds(gaps) for _ in range(3)) < 20 * max(seconds(right) for _ in range(3)) + 1e-3


def test_a_packed_weight_serves_any_number_of_rows_and_unpacks_to_itself() -> None:
    _, right, _ = operands(1, 96, 50, torch.float32)
    weight = packed(right)
    assert torch.equal(unpacked(weight), right)
    for rows in (1, 2, 31, 32, 33, 129):
        left = torch.randn(rows, 96)
        assert_close(product(left, weight), left, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_format_that_the_processor_lacks_is_not_packed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_onednn_takes", lambda wanted: wanted == torch.float32)
    left, right, bias = operands(33, 64, 40, dtype)
    assert packed(right) is right
    assert_close(product(left, packed(right), bias), left, right, bias)


def test_no_rows_give_no_rows() -> None:
    _, right, bias = operands(1, 8, 5, torch.float32)
    assert product(torch.empty(0, 8), packed(right), bias).shape == (0, 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_stay_non_finite(bad: float) -> None:
    left, right, _ = operands(4, 8, 5, torch.float32)
    left[2, 3] = bad
    finite = product(left, packed(right)).isfinite().all(1)
    assert finite.tolist() == [True, True, False, True]


def test_the_same_product_gives_the_same_bits() -> None:
    left, right, _ = operands(37, 300, 111, torch.float32)
    assert torch.equal(product(left, right), product(left.clone(), right.clone()))
    assert torch.equal(product(left, packed(right)), product(left.clone(), packed(right)))


def test_without_the_library_a_weight_is_left_alone(library: str) -> None:
    _, right, _ = operands(1, 8, 5, torch.float32)
    assert (packed(right) is right) == (library == "without")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 64, 40), (128, 64, 300), (200, 17, 9)])
def test_batched_products_equal_float64_but_for_rounding(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """FP32 operands keep all their bits, although the setting that selects oneDNN allows it to drop some."""
    sides = [operands(*shape, dtype)[:2] for _ in range(2)]
    left, right = (torch.stack(x) for x in zip(*sides, strict=True))
    got = batched_product(left, right.transpose(1, 2))
    assert got.dtype == dtype
    for result, (a, b) in zip(got, sides, strict=True):
        assert_close(result, a, b)
    gaps = torch.cat((left, left), 2)[..., : left.shape[2]], torch.cat((right, right), 1)[:, : right.shape[1]]
    assert_close(batched_product(gaps[0], gaps[1].transpose(1, 2))[0], *sides[0])
    assert_close(
        batched_product(left.transpose(1, 2).contiguous().transpose(1, 2), right.transpose(1, 2))[0], *sides[0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_products_are_added_to_a_part_of_a_larger_tensor(dtype: torch.dtype) -> None:
    left, right = torch.randn(3, 64, 40).to(dtype), torch.randn(3, 64, 24).to(dtype)
    total = torch.randn(3, 90, 24)
    expected, shares = total.double(), left.double().transpose(1, 2) @ right.double()
    expected[:2, 10:50] += shares[:2]
    add_batched_product(total[:2, 10:50], left[:2].transpose(1, 2), right[:2])
    error = (total.double() - expected).abs()
    assert (error <= 65 * 2.0**-24 * 64 + torch.finfo(dtype).eps * expected.abs().max()).all()
    assert not error[2].any() and not error[:2, :10].any() and not error[:2, 50:].any()


def test_batched_products_leave_torch_s_settings_alone() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    batched_product(torch.ones(2, 3, 4), torch.ones(2, 4, 5))
    with pytest.raises(RuntimeError):
        batched_product(torch.ones(2, 3, 4), torch.ones(2, 5, 5))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_where_the_processor_has_tiles_batches_stay_with_torch_s_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles oneDNN would round the operands to BF16."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not products._exact_batches.__wrapped__()


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_written_to_existing_memory(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_CACHED", 1)
    monkeypatch.setattr(products, "_FEWEST_COLUMNS", 7)
    left, right, _ = operands(*shape, torch.float32)
    out = torch.full((left.shape[0], right.shape[0]), torch.nan)
    product_into(out, left, right)
    assert_close(out, left, right)


@pytest.mark.parametrize("by_onednn", [False, True])
@pytest.mark.parametrize("shape", [(7, 33, 5), (64, 300, 41)])
def test_products_are_added_to_a_part_of_a_sum(
    shape: tuple[int, int, int], by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_onednn and not products._onednn():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(products, "_plain_by_onednn", lambda: by_onednn)
    rows, terms, columns = shape
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(terms, rows, generator=generator).t(),
        torch.randn(terms, columns, generator=generator).t(),
    )
    total = torch.ones(rows + 3, columns)
    add_product(total[2:-1], left, right)
    torch.testing.assert_close(total[2:-1].double(), 1 + left.double() @ right.double().t(), rtol=1e-5, atol=1e-5)
    assert (total[:2] == 1).all() and (total[-1] == 1).all()


def test_a_backward_pass_may_add_to_an_fp32_gradient_without_hooks() -> None:
    leaf = torch.nn.Parameter(torch.zeros(2, 2))
    assert direct_sum(leaf) is None
    leaf.grad = torch.zeros(2, 2)
    assert direct_sum(leaf) is leaf.grad
    for register in (leaf.register_hook, leaf.register_post_accumulate_grad_hook):
        handle = register(lambda _: None)
        assert direct_sum(leaf) is None
        handle.remove()
        assert direct_sum(leaf) is leaf.grad
    half = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    half.grad = torch.zeros(2, dtype=torch.float16)
    assert direct_sum(half) is None


def test_two_threads_leave_the_setting_of_the_process_as_it_was() -> None:
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, inside, left = settings.fp32_precision, threading.Event(), threading.Event()

    def second() -> None:
        inside.wait(5)
        with products._onednn_gets_batches():
            left.wait(5)

    thread = threading.Thread(target=second)
    thread.start()
    with products._onednn_gets_batches():
        assert settings.fp32_precision != before
        inside.set()
        thread.join(0.2)
    left.set()
    thread.join(5)
    assert settings.fp32_precision == before
