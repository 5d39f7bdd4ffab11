"""Attention by tiles: float64's results, the gradients of blocks, and bits that depend on one sequence alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from betterhalf.errors import InputError
from betterhalf.models import tiled_attention as module
from betterhalf.models.blocked_attention import ScoreRule, blocked_attention
from betterhalf.models.tiled_attention import KEYS, by_tile, decode_tiles, tiled_attention

LENGTH, SCALE = 150, 0.3
WINDOWS = [None, 1, 7, 64, 70, 1000]
HEADS = [(4, 4, 8), (4, 2, 16), (6, 2, 6), (9, 3, 64), (10, 1, 16)]


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    module.block_sizes.cache_clear()
    yield
    module.block_sizes.cache_clear()


def problem(heads: tuple[int, int, int], count: int = 3, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, dim = heads
    generator = torch.Generator().manual_seed(dim)
    return tuple(  # type: ignore[return-value]
        torch.randn(count, length, number, dim, generator=generator).transpose(1, 2) for number in (queries, keys, keys)
    )


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, cap: float | None = None) -> Tensor:
    return tiled_attention(q, k, v, ScoreRule(scale=SCALE, window=window, cap=cap))


@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
def test_results_equal_float64(heads: tuple[int, int, int], window: int | None, cap: float | None) -> None:
    q, k, v = problem(heads)
    group, distance = heads[0] // heads[1], torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    wide_k, wide_v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ wide_k.transpose(2, 3) * SCALE
    scores = scores if cap is None else cap * (scores / cap).tanh()
    hidden = (distance < 0) | (distance >= (window or LENGTH))
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ wide_v
    torch.testing.assert_close(attend(q, k, v, window, cap).double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
def test_gradients_equal_those_of_blocked_attention(
    heads: tuple[int, int, int], window: int | None, cap: float | None
) -> None:
    upstream, found = torch.randn_like(problem(heads)[0]), []
    for function in (tiled_attention, blocked_attention):
        operands = [x.clone().requires_grad_() for x in problem(heads)]
        (function(*operands, ScoreRule(scale=SCALE, window=window, cap=cap)) * upstream).sum().backward()
        found.append([x.grad for x in operands])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
def test_a_query_has_the_same_bits_in_a_prompt_after_a_prefix_and_alone(
    heads: tuple[int, int, int], window: int | None
) -> None:
    q, k, v = problem(heads)
    whole = attend(q, k, v, window)
    assert torch.equal(attend(q[1:2], k[1:2], v[1:2], window), whole[1:2])
    for start, stop in ((0, 1), (0, 63), (5, 6), (20, 65), (64, 150), (149, 150)):
        part = attend(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], window)
        assert torch.equal(part, whole[:, :, start:stop])


@pytest.mark.parametrize(
    ("heads", "window", "threads", "cap"),
    [
        *((heads, window, 1, None) for heads in HEADS for window in WINDOWS),
        *(((9, 3, 64), 70, 2, None), ((4, 4, 8), None, 2, None), ((4, 2, 16), 7, 1, 0.5)),
    ],
)
def test_a_decode_step_has_the_bits_of_the_prompt(
    heads: tuple[int, int, int], window: int | None, threads: int, cap: float | None
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, k, v = problem(heads)
        whole, lengths = attend(q, k, v, window, cap), torch.tensor([149, 3, 64])
        cache = [torch.randn(3, heads[1], 4 * KEYS, heads[2]) for _ in range(2)]
        for held, x in zip(cache, (k, v), strict=True):
            held[:, :, :LENGTH] = x
        for attended in (3 * KEYS, 4 * KEYS):
            places = torch.arange(attended)
            hidden = (places > lengths[:, None]) | (places <= lengths[:, None] - (window or 1000))
            mask = by_tile(hidden.repeat_interleave(heads[1], 0))
            rows = torch.stack([q[n, :, length] for n, length in enumerate(lengths.tolist())])
            folded = (rows * SCALE).reshape(3 * heads[1], -1, heads[2])
            found = decode_tiles(folded, *(x.flatten(0, 1)[:, :attended] for x in cache), mask, cap)
            wanted = torch.stack([whole[n, :, length] for n, length in enumerate(lengths.tolist())])
            assert torch.equal(found.reshape(3, -1, heads[2]), wanted)
    finally:
        torch.set_num_threads(before)


def test_a_processor_whose_rows_depend_on_each_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = module.batched_product

    def product(left: Tensor, right: Tensor) -> Tensor:
        return honest(left, right) * (1 + 2.0**-20 * (left.shape[0] == 1))

    monkeypatch.setattr(module, "batched_product", product)
    with pytest.raises(InputError, match=r"engine\.rounding=exact .* heads of dimension 16; set engine\.rounding=ali"):
        attend(*problem((4, 2, 16)), None)


def test_large_blocks_with_other_bits_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = module.batched_product

    def product(left: Tensor, right: Tensor) -> Tensor:
        return honest(left, right) * (1 + 2.0**-20 * (left.shape[1] == 64))

    monkeypatch.setattr(module, "batched_product", product)
    assert module.block_sizes(16, 1) == (8,)
    q, k, v = problem((4, 2, 16))
    assert torch.equal(attend(q, k, v, None)[:, :, 70:71], attend(q[:, :, 70:71], k[:, :, :71], v[:, :, :71], None))
