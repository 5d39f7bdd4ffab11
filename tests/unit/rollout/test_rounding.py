"""Every rounding point: `engine` rounds FP32 results once, `aligned` rounds as the transformers modules do in half."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers.activations import GELUTanh
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as rotate_in_fp32
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as rotate_a_part

from betterhalf.precision.formats import dtype_name
from betterhalf.rollout.native.rounding import Rounding

HALVES = [torch.float16, torch.bfloat16]
EPS = 1e-5


def make(mode, dtype, *, widened=True, kv_dtype=None):
    container = torch.float32 if widened else dtype
    kv_format = dtype_name(kv_dtype or dtype)
    return Rounding(mode=mode, format=dtype_name(dtype), container=container, kv_format=kv_format)


def half(*shape, dtype, seed=0, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def angles(rows, dim):
    return torch.arange(rows)[:, None].float() * (1e-4 ** (torch.arange(0, dim, 2) / dim))


def assert_within_one_ulp(found, exact, dtype):
    """Check that `found` is `exact` (float64) rounded to `dtype`, except for ties that FP32 may round the other way."""
    rounded = exact.to(dtype).double()
    found = found.double()
    assert torch.equal(found, found.to(dtype).double())
    assert (found == rounded).double().mean() > 0.999
    ulp = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    assert ((found - exact).abs() <= 0.5001 * ulp + 1e-6 * exact.abs()).all()


@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_aligned_norm_equals_the_transformers_module_bit_for_bit(dtype, widened):
    module = LlamaRMSNorm(64, eps=EPS)
    module.weight.data = half(64, dtype=dtype, seed=1) + 1
    x = half(50, 64, dtype=dtype, scale=3)
    rounding = make("aligned", dtype, widened=widened)
    found = rounding.rms_norm(x.to(rounding.container), module.weight.data.float(), EPS)
    assert found.dtype == rounding.container
    assert torch.equal(found.to(dtype), module(x).detach())


@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_engine_norm_is_rounded_once(dtype, widened):
    x, weight = half(50, 64, dtype=dtype, scale=3), half(64, dtype=dtype, seed=1) + 1
    rounding = make("engine", dtype, widened=widened)
    found = rounding.rms_norm(x.to(rounding.container), weight.float(), EPS)
    wide = x.double()
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()
    assert_within_one_ulp(found, exact, dtype)
    twice = make("aligned", dtype, widened=widened).rms_norm(x.to(rounding.container), weight.float(), EPS)
    assert not torch.equal(found, twice)


@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_aligned_rope_equals_transformers_bit_for_bit(dtype, widened):
    rounding = make("aligned", dtype, widened=widened)
    cos, sin = rounding.rope_table(angles(40, 32), 1.0)
    both = torch.cat((angles(40, 32),) * 2, -1)
    q, k = half(1, 4, 40, 32, dtype=dtype), half(1, 2, 40, 32, dtype=dtype, seed=1)
    expected, _ = apply_rotary_pos_emb(q, k, both.cos().to(dtype)[None], both.sin().to(dtype)[None])
    found = rounding.rope(q[0].transpose(0, 1).to(rounding.container), cos.unsqueeze(1), sin.unsqueeze(1))
    assert torch.equal(found.to(dtype).transpose(0, 1), expected[0])


@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_engine_rope_is_rounded_once(dtype, widened):
    rounding = make("engine", dtype, widened=widened)
    cos, sin = rounding.rope_table(angles(40, 32), 1.0)
    assert cos.dtype == sin.dtype == torch.float32
    x = half(40, 4, 32, dtype=dtype)
    found = rounding.rope(x.to(rounding.container), cos.unsqueeze(1), sin.unsqueeze(1))
    wide, cosine, sine = x.double(), angles(40, 32).cos().double()[:, None], angles(40, 32).sin().double()[:, None]
    first, second = wide[..., :16], wide[..., 16:]
    exact = torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
    rounded = exact.to(dtype).double()
    assert (found.double() == rounded).double().mean() > 0.995
    assert (found.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_aligned_gate_rounds_silu_before_the_product(dtype, widened):
    gate, up = half(30, 48, dtype=dtype, scale=2), half(30, 48, dtype=dtype, seed=1)
    rounding = make("aligned", dtype, widened=widened)
    found = rounding.swiglu(torch.cat((gate, up), -1).to(rounding.container))
    assert torch.equal(found.to(dtype), F.silu(gate) * up)


@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_engine_gate_is_rounded_once(dtype, widened):
    gate, up = half(30, 48, dtype=dtype, scale=2), half(30, 48, dtype=dtype, seed=1)
    rounding = make("engine", dtype, widened=widened)
    found = rounding.swiglu(torch.cat((gate, up), -1).to(rounding.container))
    wide = gate.double()
    assert_within_one_ulp(found, wide / (1 + (-wide).exp()) * up.double(), dtype)


@pytest.mark.parametrize("mode", ["engine", "aligned"])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_residual_is_a_half_sum_in_both_modes(mode, dtype):
    x, y = half(30, 48, dtype=dtype, scale=20), half(30, 48, dtype=dtype, seed=1)
    widened, native = make(mode, dtype), make(mode, dtype, widened=False)
    assert torch.equal(native.add(x, y), x + y)
    assert torch.equal(widened.add(x.float(), y.float()).to(dtype), x + y)


@pytest.mark.parametrize(
    ("mode", "widened", "rounds"),
    [("engine", True, True), ("engine", False, True), ("aligned", True, False), ("aligned", False, True)],
)
def test_probabilities_are_rounded_unless_the_trainers_attention_keeps_them_in_fp32(mode, widened, rounds):
    p = torch.randn(20, 20, generator=torch.Generator().manual_seed(0)).softmax(-1)
    found = make(mode, torch.float16, widened=widened).probabilities(p)
    assert found.dtype == torch.float32
    assert torch.equal(found, p.half().float() if rounds else p)


@pytest.mark.parametrize("mode", ["engine", "aligned"])
def test_nothing_rounds_in_fp32(mode):
    rounding = make(mode, torch.float32)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert rounding.round(x) is x and rounding.probabilities(x) is x and rounding.to_kv(x) is x
    module = LlamaRMSNorm(8, eps=EPS)
    assert torch.equal(rounding.rms_norm(x, module.weight.data, EPS), module(x).detach())


@pytest.mark.parametrize("container_is_wide", [True, False])
def test_cached_values_are_on_the_cache_grid(container_is_wide):
    rounding = make("engine", torch.float16, widened=container_is_wide, kv_dtype=torch.bfloat16)
    x = half(20, 20, dtype=torch.float16).to(rounding.container)
    found = rounding.to_kv(x)
    assert found.dtype == x.dtype
    assert torch.equal(found.float(), x.bfloat16().float())
    assert make("engine", torch.float16, kv_dtype=torch.float32).to_kv(x) is x


# -- other families


@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("kind", "module"), [("one_plus", Gemma3RMSNorm), ("once", Olmo2RMSNorm)])
def test_aligned_norms_of_other_kinds_equal_transformers_bit_for_bit(kind, module, dtype, widened):
    norm = module(64, eps=EPS)
    norm.weight.data = half(64, dtype=dtype, seed=1)
    x = half(50, 64, dtype=dtype, scale=3)
    rounding = make("aligned", dtype, widened=widened)
    found = rounding.rms_norm(x.to(rounding.container), norm.weight.data.float(), EPS, kind)
    assert torch.equal(found.to(dtype), norm(x).detach())
    assert not torch.equal(found, rounding.rms_norm(x.to(rounding.container), norm.weight.data.float(), EPS))


@pytest.mark.parametrize("dtype", HALVES)
def test_engine_norm_of_gemma_adds_one_to_the_weight_and_is_rounded_once(dtype):
    x, weight = half(50, 64, dtype=dtype, scale=3), half(64, dtype=dtype, seed=1)
    found = make("engine", dtype).rms_norm(x.float(), weight.float(), EPS, "one_plus")
    wide = x.double()
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (1 + weight.double())
    assert_within_one_ulp(found, exact, dtype)


@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_aligned_rope_over_a_part_of_a_head_equals_transformers(dtype, widened):
    rounding = make("aligned", dtype, widened=widened)
    cos, sin = rounding.rope_table(angles(40, 24), 1.0)
    both = torch.cat((angles(40, 24),) * 2, -1)
    q = half(1, 4, 40, 32, dtype=dtype)
    expected, _ = rotate_a_part(q, q, both.cos().to(dtype)[None], both.sin().to(dtype)[None])
    found = rounding.rope(q[0].transpose(0, 1).to(rounding.container), cos.unsqueeze(1), sin.unsqueeze(1))
    assert torch.equal(found.to(dtype).transpose(0, 1), expected[0])


@pytest.mark.parametrize("widened", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_aligned_rope_in_fp32_equals_transformers(dtype, widened):
    rounding = make("aligned", dtype, widened=widened)
    cos, sin = rounding.rope_table(angles(40, 32), 1.0, in_fp32=True)
    both = torch.cat((angles(40, 32),) * 2, -1)
    q = half(1, 4, 40, 32, dtype=dtype)
    expected, _ = rotate_in_fp32(q, q, both.cos()[None], both.sin()[None])
    heads = q[0].transpose(0, 1).to(rounding.container)
    found = rounding.rope(heads, cos.unsqueeze(1), sin.unsqueeze(1), in_fp32=True)
    assert torch.equal(found.to(dtype).transpose(0, 1), expected[0])


@pytest.mark.parametrize("dtype", HALVES)
def test_aligned_geglu_equals_transformers_bit_for_bit(dtype):
    gate, up = half(30, 48, dtype=dtype, scale=3), half(30, 48, dtype=dtype, seed=1)
    found = make("aligned", dtype).swiglu(torch.cat((gate, up), -1).float(), "gelu_tanh")
    assert torch.equal(found.to(dtype), GELUTanh()(gate) * up)


@pytest.mark.parametrize("mode", ["engine", "aligned"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_scaled_embedding_and_a_scaled_branch_round_as_transformers(mode, dtype):
    table = Gemma3TextScaledWordEmbedding(7, 16, 0, embed_scale=640**0.5)
    table.weight.data = half(7, 16, dtype=dtype)
    rounding = make(mode, dtype)
    found = rounding.embedding(table.weight.detach(), 640**0.5, rounds_scale=True)
    assert torch.equal(found.to(dtype), table(torch.arange(7)).detach())
    residual, branch = half(7, 16, dtype=dtype, seed=1), half(7, 16, dtype=dtype, seed=2)
    assert torch.equal(rounding.add(residual.float(), branch.float(), 0.22).to(dtype), residual + branch * 0.22)
