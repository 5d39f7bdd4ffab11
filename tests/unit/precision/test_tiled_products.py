"""Products by tiles: FP32 sums, and rows whose bits depend on themselves alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from betterhalf.errors import InputError
from betterhalf.precision import tiled_products
from betterhalf.precision.products import packed
from betterhalf.precision.tiled_products import block_sizes, tiled_product

SHAPES = [(7, 5), (48, 32), (64, 3000)]


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    block_sizes.cache_clear()
    yield
    block_sizes.cache_clear()


def problem(columns: int, width: int, rows: int = 700) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(columns)
    return torch.randn(rows, width, generator=generator), torch.randn(columns, width, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 700])
def test_products_equal_float64(shape: tuple[int, int], rows: int) -> None:
    x, weight = problem(*shape, rows=rows)
    found, exact = tiled_product(x, packed(weight)), x.double() @ weight.double().t()
    assert found.shape == exact.shape and found.is_contiguous()
    bound = shape[1] * 2.0**-24 * (x.double().abs() @ weight.double().abs().t())
    assert ((found - exact).abs() <= bound).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_alone_and_among_any_others(shape: tuple[int, int], threads: int) -> None:
    x, weight = problem(*shape)
    right, before = packed(weight), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole, order = tiled_product(x, right), torch.randperm(700, generator=torch.Generator().manual_seed(1))
        assert torch.equal(tiled_product(x[order], right), whole[order])
        for part in (slice(0, 1), slice(0, 2), slice(5, 38), slice(100, 650)):
            assert torch.equal(tiled_product(x[part], right), whole[part])
        assert torch.equal(tiled_product(x.t().contiguous().t(), right), whole)
    finally:
        torch.set_num_threads(before)


def test_blocks_with_other_bits_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = tiled_products.product

    def product(left: Tensor, right: Tensor) -> Tensor:
        return honest(left, right) * (1 + 2.0**-20 * (left.shape[0] == 512))

    monkeypatch.setattr(tiled_products, "product", product)
    assert block_sizes(48, 32, 1) == (2048, 128, 32)


@pytest.mark.parametrize("fault", ["place", "neighbours"])
def test_a_processor_whose_rows_depend_on_each_other_is_refused(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = tiled_products.product

    def product(left: Tensor, right: Tensor) -> Tensor:
        out = honest(left, right)
        if fault == "place":
            out[:4] *= 1 + 2.0**-20
        return out if fault == "place" or bool(left[-1].any()) else out * (1 + 2.0**-20)

    monkeypatch.setattr(tiled_products, "product", product)
    with pytest.raises(InputError, match=r"engine\.rounding=exact .* 48 x 32; set engine\.rounding=aligned"):
        block_sizes(48, 32, 1)
