"""Sums over sequences: their values, the same bits in every run, and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.algorithms.policy_loss import policy_loss
from betterhalf.algorithms.presets import PRESETS, resolve_algorithm
from betterhalf.batches import Denominators, LossInputs
from betterhalf.config.schema import AlgorithmConfig


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def one_by_one(values_C: Tensor, index_C: Tensor, num_sequences: int) -> list[float]:
    """Add in Python, in the order of the tokens and in the precision of the values."""
    sums = [torch.zeros((), dtype=values_C.dtype) for _ in range(num_sequences)]
    for value, sequence in zip(values_C, index_C.tolist(), strict=True):
        sums[sequence] = sums[sequence] + value
    return [float(total) for total in sums]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.int32])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("count", [0, 1, 700])
def test_values_are_added_in_their_order_bit_for_bit(
    dtype: torch.dtype, in_order: bool, count: int, deterministic: None
) -> None:
    generator = torch.Generator().manual_seed(count)
    index_C = 2 * torch.randint(0, 5, (count,), generator=generator)
    index_C = index_C.sort().values if in_order else index_C
    values_C = (100 * torch.randn(count, generator=generator)).to(dtype)
    found_S = ops.segment_sum(values_C, index_C, 11)
    assert found_S.dtype == dtype and found_S.tolist() == one_by_one(values_C, index_C, 11)
    assert torch.equal(found_S, torch.zeros(11, dtype=dtype).index_add(0, index_C, values_C))


def test_sums_are_exact_in_float64() -> None:
    values_C = torch.tensor([1e16, 1.0, -1e16, 0.5, 0.25], dtype=torch.float64)
    found = ops.segment_sum(values_C, torch.tensor([0, 1, 0, 1, 1]), 3)
    assert found.tolist() == [0.0, 1.75, 0.0]


def test_large_counts_stay_exact() -> None:
    count = 2**40 + 1
    assert ops.segment_sum(torch.tensor([count, 2**52]), torch.tensor([0, 0]), 1).item() == count + 2**52


def test_the_mean_of_a_sequence_without_values_is_zero() -> None:
    assert ops.segment_mean(torch.tensor([1.0, 3.0]), torch.tensor([1, 1]), 3).tolist() == [0.0, 2.0, 0.0]


def test_gradients_are_those_of_a_sum(deterministic: None) -> None:
    values_C = torch.randn(6, dtype=torch.float64, requires_grad=True)
    index_C = torch.tensor([2, 0, 2, 2, 0, 3])
    assert torch.autograd.gradcheck(lambda values: ops.segment_sum(values, index_C, 5), (values_C,))
    ops.segment_sum(values_C, index_C, 5).backward(torch.arange(5.0, dtype=torch.float64))
    assert values_C.grad is not None and values_C.grad.tolist() == [2, 0, 2, 2, 0, 3]


LEFT_TO_CHANCE = {
    *("IndexAddBackward0", "ScatterAddBackward0", "IndexPutBackward0", "ScatterReduceBackward0"),
    *("GatherBackward0", "IndexSelectBackward0", "RepeatInterleaveBackward0", "CumsumBackward0", "IndexBackward0"),
}
"""Nodes of a graph whose forward or backward pass adds in no fixed order, from the list of
`torch.use_deterministic_algorithms`: on a GPU, and `IndexBackward0` on a CPU."""


def nodes(function: torch.autograd.graph.Node | None) -> Iterator[str]:
    """Return the names of all nodes that a backward pass runs."""
    if function is not None:
        yield function.name()
        for other, _ in function.next_functions:
            yield from nodes(other)


def test_the_walk_over_a_graph_sees_what_it_looks_for() -> None:
    values = torch.ones(4, requires_grad=True)
    old = torch.zeros(2).index_add(0, torch.tensor([0, 1, 1, 0]), values)[torch.tensor([0, 1, 1])].sum()
    assert LEFT_TO_CHANCE & set(nodes(old.grad_fn)) == {"IndexAddBackward0", "IndexBackward0"}
    new = ops.segment_mean(values, torch.tensor([0, 1, 1, 0]), 2).sum()
    assert not LEFT_TO_CHANCE & set(nodes(new.grad_fn))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_loss_is_differentiated_in_a_fixed_order(preset: str, deterministic: None) -> None:
    algorithm = resolve_algorithm(AlgorithmConfig.model_validate({"preset": preset}))
    current_C = torch.randn(40, requires_grad=True)
    out = policy_loss(
        algorithm,
        LossInputs(
            current_logprobs_C=current_C,
            proximal_logprobs_C=current_C.detach() + 0.01 * torch.randn(40),
            behavior_logprobs_C=current_C.detach() + 0.01 * torch.randn(40),
            advantages_S=torch.randn(4),
            sequence_index_C=torch.arange(4).repeat_interleave(10),
        ),
        Denominators(sequences=4, tokens=40, max_tokens=10),
    )
    assert not LEFT_TO_CHANCE & set(nodes(out.loss.grad_fn))
    out.loss.backward()  # type: ignore[no-untyped-call]
    assert current_C.grad is not None and current_C.grad.isfinite().all()


def test_the_sum_of_one_long_row_does_not_depend_on_the_threads_or_other_rows() -> None:
    x = torch.rand(3, 2**16, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(ops.row_sums(x)[:1], ops.row_sums(x[:1]))
        assert torch.equal(ops.row_sums(x)[1], ops.row_sums(x[1]))
    finally:
        torch.set_num_threads(before)
