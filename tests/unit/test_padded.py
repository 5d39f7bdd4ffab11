"""Padded tensors give the packed ones, and a mask that does not fit is refused with the fix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from betterhalf.errors import InputError, PrecisionWarning
from betterhalf.padded import TokenLayout, token_layout, wide

NAN = float("nan")


def layout(mask: list[list[int]], dtype: torch.dtype = torch.bool) -> TokenLayout:
    mask_BL = torch.tensor(mask, dtype=dtype)
    return token_layout(torch.zeros(mask_BL.shape), mask=mask_BL)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int8, torch.float32])
def test_a_mask_picks_the_tokens_of_each_row_in_order(dtype: torch.dtype) -> None:
    # left-padded, right-padded, with a hole, empty
    found = layout([[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]], dtype)
    values = torch.tensor(
        [[NAN, NAN, 1.0, 2.0], [3.0, 4.0, 5.0, NAN], [6.0, NAN, NAN, 7.0], [NAN, NAN, NAN, NAN]], dtype=torch.float64
    )
    assert found.take(values, "x").tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert found.sequence_index_C.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert (found.num_sequences, found.longest) == (4, 4)


def test_gradients_reach_the_tokens_and_nothing_else() -> None:
    found = layout([[0, 1], [1, 0]])
    values = torch.tensor([[NAN, 2.0], [3.0, NAN]], requires_grad=True)
    found.take(values, "x").square().sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0, 4.0], [6.0, 0.0]]


def test_a_sequence_index_counts_sequences_without_tokens() -> None:
    found = token_layout(torch.zeros(3), sequence_index=torch.tensor([0, 2, 2], dtype=torch.int32), num_sequences=4)
    assert (found.num_sequences, found.longest, found.sequence_index_C.dtype) == (4, 2, torch.int64)
    assert token_layout(torch.zeros(3), sequence_index=torch.tensor([0, 2, 2])).num_sequences == 3


def test_rows_take_one_value_for_each_sequence_in_three_shapes() -> None:
    found = layout([[0, 1, 1], [1, 0, 0], [0, 0, 0]])
    one = torch.tensor([0.5, -2.0, 9.0])
    assert found.rows(one, "a").tolist() == [0.5, -2.0, 9.0]
    assert found.rows(one[:, None], "a").tolist() == [0.5, -2.0, 9.0]
    spread = torch.tensor([[0.0, 0.5, 0.5], [-2.0, 7.0, 7.0], [1.0, 1.0, 1.0]])
    assert found.rows(spread, "a").tolist() == [0.5, -2.0, 0.0]


def test_values_that_differ_within_a_completion_are_refused() -> None:
    with pytest.raises(InputError, match="advantages differs between the tokens of a completion.*shape \\(2,\\)"):
        layout([[1, 1], [1, 0]]).rows(torch.tensor([[0.5, 0.4], [1.0, 1.0]]), "advantages")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "pass one of mask and sequence_index"),
        ({"mask": torch.ones(2, 3), "sequence_index": torch.zeros(6)}, "pass one of mask and sequence_index"),
        ({"mask": torch.ones(6)}, "mask has the shape \\(6\\). It must be \\[batch, length\\]"),
        ({"mask": torch.full((2, 3), 2)}, "mask has values besides 0 and 1"),
        ({"mask": [[1, 1, 1]]}, "mask is list. Pass a tensor"),
        ({"mask": torch.ones(2, 3), "num_sequences": 2}, "num_sequences belongs to sequence_index"),
        ({"sequence_index": torch.zeros(6)}, "sequence_index is torch.float32"),
        ({"sequence_index": torch.zeros(2, 3, dtype=torch.int64)}, "must be integers of the shape \\[tokens\\]"),
        ({"sequence_index": torch.tensor([0, -1])}, "outside 0 to 0"),
        ({"sequence_index": torch.tensor([0, 3]), "num_sequences": 3}, "outside 0 to 2"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(arguments: dict[str, Tensor], words: str) -> None:
    with pytest.raises(InputError, match=words):
        token_layout(torch.zeros(2, 3), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [{"mask": torch.ones(1, 2)}, {"sequence_index": torch.tensor([0, 0])}])
def test_logprobs_that_are_no_tensor_are_refused(tokens: dict[str, Tensor]) -> None:
    with pytest.raises(InputError, match="logprobs is list. Pass a tensor"):
        token_layout([-0.5, -1.0], **tokens)  # type: ignore[arg-type]


def test_tensors_of_another_shape_or_kind_are_refused() -> None:
    found = layout([[1, 1, 0]])
    with pytest.raises(InputError, match="x has the shape \\(1, 2\\) and mask \\(1, 3\\)"):
        found.take(torch.zeros(1, 2), "x")
    with pytest.raises(InputError, match="x is torch.int64. It must be floating point"):
        found.take(torch.zeros(1, 3, dtype=torch.int64), "x")
    packed = token_layout(torch.zeros(2), sequence_index=torch.tensor([0, 0]))
    with pytest.raises(InputError, match="x has the shape \\(3\\) and sequence_index \\(2\\)"):
        packed.take(torch.zeros(3), "x")


def test_half_logprobs_are_widened_with_a_warning() -> None:
    with pytest.warns(PrecisionWarning, match="x is torch.bfloat16, which rounds logprobs below -1 by 4e-03 and more"):
        assert wide(torch.zeros(2, dtype=torch.bfloat16), "x").dtype == torch.float32
    assert wide(torch.zeros(2, dtype=torch.float64), "x").dtype == torch.float64
