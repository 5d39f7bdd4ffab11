"""Adapters are merged in FP32 and rounded once, and updates that rounding loses are counted."""

from __future__ import annotations

import pytest
import torch

from betterhalf.precision.formats import torch_dtype
from betterhalf.precision.merge import MergeCount, merge_rows


def test_small_products_are_lost_and_counted() -> None:
    """Numbers near 1 are 2^-7 apart in BF16: a quarter of that is lost, three quarters round up, 0 is no change."""
    base = torch.ones(1, 4, dtype=torch_dtype("bf16"))
    down, up = torch.tensor([[0.0, 0.25, 0.75, 2.0]]), torch.tensor([[2.0**-7]])
    merged, count = merge_rows(base, down, up, 1.0, "bf16")
    assert merged.tolist() == [[1.0, 1.0, 1 + 2**-7, 1 + 2**-6]]
    assert count.tolist() == [3, 1]


def test_the_sum_is_rounded_once() -> None:
    """1 + (2^-11 + 2^-24) rounds up in FP16; the product alone rounds to 2^-11, and 1 + 2^-11, a tie, rounds down."""
    base, down, up = torch.ones(1, 1).half(), torch.tensor([[2.0**-11 + 2.0**-23]]), torch.ones(1, 1)
    assert merge_rows(base, down, up, 1.0, "fp16")[0].item() == 1 + 2.0**-10
    assert (base + down.half()).item() == 1.0


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32", "e8m4"])
def test_the_merged_weight_is_the_nearest_number_of_the_format(name: str) -> None:
    torch.manual_seed(0)
    base = merge_rows(torch.randn(8, 12), torch.zeros(2, 12), torch.zeros(8, 2), 1.0, name)[0]  # type: ignore[arg-type]
    down, up = torch.randn(2, 12), torch.randn(8, 2) * 0.01
    merged, _ = merge_rows(base, down, up, 0.5, name)  # type: ignore[arg-type]
    exact = base.double() + 0.5 * up.double() @ down.double()
    again = merge_rows(exact.float(), torch.zeros(2, 12), torch.zeros(8, 2), 1.0, name)[0]  # type: ignore[arg-type]
    assert (merged.double() - exact).abs().sum() <= (again.double() - exact).abs().sum() * (1 + 1e-5) + 1e-6


def test_the_lost_share_is_none_without_a_change() -> None:
    assert MergeCount(changed=0, lost=0).lost_fraction is None
    assert MergeCount(changed=8, lost=2).lost_fraction == 0.25
