"""Kernels over rows of FP32 logits, [B, V] with a large vocabulary V: they read each row once or twice, without a copy.

They score given tokens, compute the gradient of these logprobs, and draw tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
"""Logits that a program holds at once."""


# -- scores of given tokens


@triton.jit
def _scores(
    logits,
    token_ids,
    logprobs,
    normalisers,
    entropies,
    vocabulary,
    stride,
    temperature,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    # Online softmax in each lane: the sum of exp(x - peak), and of exp(x - peak) * (x - peak).
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf"))
        if SCALES:
            x = x / temperature
        higher = tl.maximum(peak, x)
        # A lane that has only seen -inf has a total of 0; its peak of -inf would make the sums NaN.
        shift = tl.where(total > 0, peak - higher, 0.0)
        here = tl.where(x == float("-inf"), 0.0, x - higher)
        shrink, weight = tl.exp(shift), tl.where(x == float("-inf"), 0.0, tl.exp(here))
        weighted = shrink * (weighted + total * shift) + weight * here
        total = total * shrink + weight
        peak = higher
    highest = tl.max(peak, 0)
    shift = tl.where(total > 0, peak - highest, 0.0)
    weighted = tl.exp(shift) * (weighted + total * shift)
    sum_of_exponentials = tl.sum(total * tl.exp(shift), 0)
    log_sum = tl.log(sum_of_exponentials)
    chosen = tl.load(logits + tl.load(token_ids + row))
    if SCALES:
        chosen = chosen / temperature
    tl.store(normalisers + row, log_sum + highest)
    tl.store(logprobs + row, chosen - (log_sum + highest))
    tl.store(entropies + row, log_sum - tl.sum(weighted, 0) / sum_of_exponentials)


def scores(logits: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Score one token of each row: return its logprob, the row's log-sum-exp, and the row's entropy.

    Args:
        logits: float32 [B, V], rows contiguous.
        token_ids: int64 [B].
        temperature: divides the logits.

    Returns:
        float32 [B] each, in nats.
    """
    logprobs, normalisers, entropies = logits.new_empty(3, logits.shape[0]).unbind()
    if logits.shape[0]:
        _scores[(logits.shape[0],)](
            logits,
            token_ids,
            logprobs,
            normalisers,
            entropies,
            logits.shape[1],
            logits.stride(0),
            temperature,
            SCALES=temperature != 1.0,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return logprobs, normalisers, entropies


# -- gradient of the scores


@triton.jit
def _grad_logits(
    logits,
    token_ids,
    normalisers,
    grads,
    out,
    columns,
    stride,
    temperature,
    SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(logits + row * stride + column, mask=inside, other=0.0)
    grad = tl.load(grads + row)
    if SCALES:
        x = x / temperature
        grad = grad / temperature
    result = -grad * tl.exp(x - tl.load(normalisers + row))
    result = tl.where(column == tl.load(token_ids + row), result + grad, result)
    tl.store(out + row * columns + column, result.to(out.dtype.element_ty), mask=inside)


def grad_logits(
    logits: Tensor, token_ids: Tensor, normalisers: Tensor, grads: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """Return the gradient of the logits: (onehot - softmax) * grad / temperature, rounded once.

    Args:
        logits: float32 [B, V], any part of the vocabulary, rows contiguous.
        token_ids: int64 [B], relative to the first of these logits; an id may be outside of them.
        normalisers: float32 [B], log-sum-exp over the whole vocabulary.
        grads: float32 [B], gradients of the tokens' logprobs.
        temperature: divides the logits.
        dtype: dtype of the result.

    Returns:
        [B, V].
    """
    rows, columns = logits.shape
    out = torch.empty(rows, columns, dtype=dtype, device=logits.device)
    if rows:
        _grad_logits[(rows, triton.cdiv(columns, _BLOCK))](
            logits,
            token_ids,
            normalisers,
            grads.contiguous(),
            out,
            columns,
            logits.stride(0),
            temperature,
            SCALES=temperature != 1.0,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return out


# -- drawing


@triton.jit
def _cells(
    logits,
    cells,
    peaks,
    broken,
    vocabulary,
    count,
    parts,
    temperature,
    SCALES: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    PART: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * PART + tl.arange(0, PART)
    inside = column < vocabulary
    x = tl.load(logits + row * vocabulary + column, mask=inside, other=float("-inf"))
    if SCALES:
        x = x / temperature
    # inf - inf is NaN, and NaN != 0.
    tl.store(broken + row * parts + part, tl.sum((inside & ((x - x) != 0.0)).to(tl.int32), 0))
    highest = tl.max(x, 0)
    tl.store(peaks + row * parts + part, highest)
    sums = tl.sum(tl.reshape(tl.exp(x - highest), (PART // NEIGHBOURS, NEIGHBOURS)), 1)
    cell = part * (PART // NEIGHBOURS) + tl.arange(0, PART // NEIGHBOURS)
    tl.store(cells + row * count + cell, sums, mask=cell < count)


@triton.jit
def _uniform(key, position, GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Return the same number as `rollout.sampler.uniforms`; unsigned integers give logical shifts."""
    x = key.to(tl.uint64, bitcast=True) + (position + 1).to(tl.uint64, bitcast=True) * GOLDEN
    x = (x ^ (x >> 30)) * FIRST
    x = (x ^ (x >> 27)) * SECOND
    x = x ^ (x >> 31)
    return ((x >> 12).to(tl.float64) + 0.5) * 0.0000000000000002220446049250313


@triton.jit
def _look_up(weights, uniform, FACTOR: tl.constexpr, COUNT, BLOCK: tl.constexpr):
    """Return the index at which the running sum of weights exceeds `uniform` times the total.

    The second result is the position within that weight, from 0 to 1.
    """
    wide = weights.to(tl.float64)
    shares = (wide * (FACTOR / tl.max(wide, 0))).to(tl.int64)
    running = tl.cumsum(shares, 0)
    total = tl.sum(shares, 0)
    exact = uniform * total.to(tl.float64)
    target = tl.minimum(exact.to(tl.int64), total - 1)
    index = tl.minimum(tl.sum((running <= target).to(tl.int32), 0), COUNT - 1)
    here = tl.arange(0, BLOCK) == index
    share, end = tl.sum(tl.where(here, shares, 0), 0), tl.sum(tl.where(here, running, 0), 0)
    within = (exact - (end - share).to(tl.float64)) / share.to(tl.float64)
    return index, tl.minimum(tl.maximum(within, 0.0), 1.0)


@triton.jit
def _draw(
    logits,
    cells,
    peaks,
    broken,
    keys,
    positions,
    token_ids,
    logprobs,
    finite,
    vocabulary,
    count,
    parts,
    temperature,
    GOLDEN: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    CELL_FACTOR: tl.constexpr,
    TOKEN_FACTOR: tl.constexpr,
    SCALES: tl.constexpr,
    CELLS_OF_PART: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p, k, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K), tl.arange(0, NEIGHBOURS)
    highest = tl.max(tl.load(peaks + row * parts + p, mask=p < parts, other=float("-inf")), 0)
    bad = tl.sum(tl.load(broken + row * parts + p, mask=p < parts, other=0), 0)
    # Each part was summed relative to its own largest logit.
    peak = tl.load(peaks + row * parts + k // CELLS_OF_PART, mask=k < count, other=float("-inf"))
    sums = tl.load(cells + row * count + k, mask=k < count, other=0.0) * tl.exp(peak - highest)
    uniform = _uniform(tl.load(keys + row), tl.load(positions + row), GOLDEN, FIRST, SECOND)
    cell, within = _look_up(sums, uniform, CELL_FACTOR, count, BLOCK_K)
    column = cell * NEIGHBOURS + n
    x = tl.load(logits + row * vocabulary + column, mask=column < vocabulary, other=float("-inf"))
    if SCALES:
        x = x / temperature
    index, _ = _look_up(tl.exp(x - highest), within, TOKEN_FACTOR, NEIGHBOURS, NEIGHBOURS)
    token_id = tl.minimum(cell * NEIGHBOURS + index, vocabulary - 1)
    chosen = tl.sum(tl.where(column == token_id, x, 0.0), 0)
    logprob = chosen - (tl.log(tl.sum(sums, 0)) + highest)
    tl.store(token_ids + row, token_id.to(tl.int64))
    tl.store(logprobs + row, logprob)
    tl.store(finite + row, (bad == 0) & ((logprob - logprob) == 0.0))


def draw(
    logits: Tensor, keys: Tensor, positions: Tensor, temperature: float, neighbours: int, mix: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token of each row by looking a uniform number up in the row's cumulative distribution.

    The look-up finds a cell of neighbouring tokens first, then a token within the cell.

    Args:
        logits: float32 [B, V], contiguous.
        keys: int64 [B], key of each row's stream of random numbers.
        positions: int64 [B], position in that stream.
        temperature: divides the logits.
        neighbours: number of tokens of a cell, a power of two up to 4096.
        mix: SplitMix64's increment and its two factors, which turn key and position into a uniform number.

    Returns:
        Token ids, int64 [B]; their logprobs, float32 [B]; and flags, bool [B], True if every logit of the row and the
        logprob are finite.
    """
    rows, vocabulary = logits.shape
    parts, count = triton.cdiv(vocabulary, _BLOCK), triton.cdiv(vocabulary, neighbours)
    cells, peaks = logits.new_empty(rows, count), logits.new_empty(rows, parts)
    broken = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    token_ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs, finite = logits.new_empty(rows), torch.empty(rows, dtype=torch.bool, device=logits.device)
    sizes = (vocabulary, count, parts, temperature)
    shared: dict[str, int] = {"SCALES": temperature != 1.0, "NEIGHBOURS": neighbours}
    _cells[(rows, parts)](logits, cells, peaks, broken, *sizes, **shared, PART=_BLOCK, num_warps=8)
    _draw[(rows,)](
        *(logits, cells, peaks, broken, keys, positions, token_ids, logprobs, finite),
        *sizes,
        **shared,
        **dict(zip(("GOLDEN", "FIRST", "SECOND"), mix, strict=True)),
        CELL_FACTOR=_factor(count),
        TOKEN_FACTOR=_factor(neighbours),
        CELLS_OF_PART=_BLOCK // neighbours,
        BLOCK_K=triton.next_power_of_2(count),
        BLOCK_P=triton.next_power_of_2(parts),
        num_warps=4,
    )
    return token_ids, logprobs, finite


def _factor(count: int) -> float:
    """Return the integer scale of the largest of `count` weights with which their sum stays within 62 bits."""
    return 2.0 ** (62 - count.bit_length())
