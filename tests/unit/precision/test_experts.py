"""Routers and experts: FP32 sums, FP32 logits, gradients that reach the router, and no rounding between experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_models import EXPERTS, TINY, tiny_config, tiny_module
from torch import Tensor, nn

from betterhalf.config.schema import PrecisionConfig
from betterhalf.precision.experts import Experts, Router, use_experts
from betterhalf.precision.grouped_products import grouped_product
from betterhalf.precision.roles import build_precision
from betterhalf.precision.routing import (
    RoutingTape,
    by_expert,
    chosen_experts,
    combine,
    compact,
    expert_weights,
    spread,
)

HALVES = (torch.float16, torch.bfloat16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return the first layer's block of experts with replaced layers, its parameters in `dtype`."""
    module = tiny_module(tiny_config("qwen3_moe", TINY, **{**EXPERTS, "initializer_range": 0.3, **changes}), seed=3)
    name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    roles = build_precision(PrecisionConfig(preset=name, half_matmul="fp32_sums"), torch.device("cpu"))
    assert use_experts(module, roles) is not None
    found = module.model.layers[0].mlp
    for parameter in found.parameters():
        parameter.data = parameter.data.to(dtype)
    return found


# -- groups


def test_pairs_are_grouped_by_expert_and_keep_the_order_of_tokens() -> None:
    order, counts = by_expert(torch.tensor([[2, 0], [0, 3], [2, 0]]), 5)
    assert counts == (3, 0, 2, 1, 0)
    assert order.tolist() == [1, 2, 5, 0, 4, 3]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_grouped_products_and_gradients_are_exact_sums_rounded_once(dtype: torch.dtype) -> None:
    counts = (4, 0, 7)
    # Multiples of 1/4 and of 1/32: sums are exact in FP32, and no half format holds them.
    rows, weight, grad = (
        ((random(*shape, seed=k) * scale).round() / scale).to(dtype)
        for k, (shape, scale) in enumerate([((11, 24), 4), ((3, 16, 24), 32), ((11, 16), 4)])
    )
    rows, weight = rows.requires_grad_(), weight.requires_grad_()
    out = grouped_product(rows, weight, weight.detach().float(), counts)
    out.backward(grad)
    wide, matrices = rows.detach().double(), weight.detach().double()
    start, of_weight = 0, torch.zeros_like(matrices)
    assert rows.grad is not None and weight.grad is not None
    for group, count in enumerate(counts):
        part = slice(start, start + count)
        assert torch.equal(out[part], (wide[part] @ matrices[group].t()).to(dtype))
        assert torch.equal(rows.grad[part], (grad[part].double() @ matrices[group]).to(dtype))
        of_weight[group] = grad[part].double().t() @ wide[part]
        start += count
    assert torch.equal(weight.grad, of_weight.to(dtype))
    assert weight.grad[0].any() and not weight.grad[1].any()


def test_the_gradient_of_a_weight_with_an_fp32_sum_is_added_there() -> None:
    rows, weight = random(5, 8), random(2, 4, 8, seed=1).requires_grad_()
    weight.grad = torch.ones_like(weight)
    grouped_product(rows, weight, weight.detach(), (2, 3)).sum().backward()
    expected = 1 + torch.stack([rows[:2].sum(0).expand(4, -1), rows[2:].sum(0).expand(4, -1)])
    torch.testing.assert_close(weight.grad, expected)


def test_the_gradient_of_a_token_is_an_fp32_sum_over_its_experts() -> None:
    x = torch.zeros(1, 1, dtype=torch.float16, requires_grad=True)
    order = torch.tensor([2, 0, 1])
    spread(x, order, 3).backward(torch.tensor([[1.0], [2048.0], [-2048.0]], dtype=torch.float16))
    # The partial sum 2049 does not exist in FP16, where it would be rounded to 2048.
    assert x.grad is not None and x.grad.item() == 1.0


def test_the_sum_over_experts_is_fp32_and_rounded_once() -> None:
    results = torch.tensor([[[2048.0], [1.0], [1.0]]], dtype=torch.float16, requires_grad=True)
    weights = torch.tensor([[1.0, 1.0, 0.75]], requires_grad=True)
    out = combine(results, weights)
    assert out.item() == 2050.0  # 2049.75; with half partial sums it would be 2048
    out.backward(torch.tensor([[2.0]], dtype=torch.float16))
    assert results.grad is not None and results.grad.flatten().tolist() == [2.0, 2.0, 1.5]
    assert weights.grad is not None and weights.grad.tolist() == [[4096.0, 2.0, 2.0]]


# -- routing


def test_the_largest_logits_are_chosen_and_the_first_of_equal_ones() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert chosen_experts(logits, 2).tolist() == [[1, 3], [0, 1]]


@pytest.mark.parametrize("normalise", [False, True])
def test_weights_are_those_of_transformers(normalise: bool) -> None:
    module = tiny_module(tiny_config("qwen3_moe", TINY, **EXPERTS | {"norm_topk_prob": normalise}), seed=1)
    gate, x = module.model.layers[1].mlp.gate, random(9, 32)
    _, expected, experts = gate(x)
    router = Router(gate, RoutingTape(), 0, tiled=False)
    _, weights, found = router(x)
    assert torch.equal(found, experts)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_router_computes_logits_in_fp32(dtype: torch.dtype) -> None:
    router, x = block(dtype).gate, random(50, 32).to(dtype)
    logits, weights, _ = router(x)
    assert logits.dtype == weights.dtype == torch.float32
    expected = x.double() @ router.weight.double().t()
    assert (logits.double() - expected).abs().max() < 1e-5
    assert (logits.to(dtype).double() - expected).abs().max() > 1e-4


def test_given_experts_replace_the_choice_and_every_logit_gets_a_gradient() -> None:
    part, x = block(), random(6, 32)
    given = torch.tensor([[[7, 0]]]).expand(6, 1, 2).to(torch.uint8)
    with part.gate._tape.recording() as own, part.gate._tape.replaying(given):
        logits, weights, experts = part.gate(x)
    assert experts.tolist() == [[7, 0]] * 6
    assert torch.equal(own[0], chosen_experts(logits, 2)) and own[0].tolist() != experts.tolist()
    torch.testing.assert_close(weights, expert_weights(logits, experts, normalise=True))
    expert_weights(logits, experts, normalise=False).sum().backward()
    assert bool((part.gate.weight.grad.abs().sum(1) > 0).all())
    _, _, again = part.gate(x)
    assert torch.equal(again, own[0])


def test_indices_take_a_byte_each_for_up_to_256_experts() -> None:
    assert compact(torch.tensor([255]), 256).dtype == torch.uint8
    assert compact(torch.tensor([256]), 257).tolist() == [256]


# -- the block


def test_an_fp32_block_equals_that_of_transformers_with_its_gradients() -> None:
    config = tiny_config("qwen3_moe", TINY, **EXPERTS, initializer_range=0.3)
    plain, own = tiny_module(config, seed=3).model.layers[0].mlp, block()
    x = random(1, 17, 32)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = plain(first), own(second)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(second.grad, first.grad, rtol=1e-4, atol=1e-5)
    for (name, one), two in zip(own.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_block_is_closer_to_fp32_than_that_of_transformers(dtype: torch.dtype) -> None:
    config = tiny_config("qwen3_moe", TINY, **EXPERTS, initializer_range=0.3)
    own, x = block(dtype), random(1, 64, 32).to(dtype)
    exact, plain = (tiny_module(config, seed=3).model.layers[0].mlp for _ in range(2))
    for wide, half, parameter in zip(exact.parameters(), plain.parameters(), own.parameters(), strict=True):
        wide.data, half.data = parameter.data.float(), parameter.data
    with torch.no_grad():
        wanted = exact(x.float())
        mine, theirs = ((part(x).float() - wanted).abs().mean() for part in (own, plain))
    assert mine < theirs


def test_changed_weights_are_widened_again() -> None:
    part, x = block(torch.float16), random(1, 5, 32).half()
    before = part(x)
    with torch.no_grad():
        part.experts.down_proj.mul_(2)
    torch.testing.assert_close(part(x), 2 * before)


def test_parameters_keep_their_names_and_other_models_have_no_tape() -> None:
    plain = tiny_module(tiny_config("qwen3_moe", **EXPERTS), seed=0).model.layers[0].mlp
    names = {name for name, _ in plain.named_parameters()}
    assert {name for name, _ in block().named_parameters()} == names
    assert isinstance(block().experts, Experts) and isinstance(block().experts.act_fn, nn.Module)
    roles = build_precision(PrecisionConfig(preset="fp16"), torch.device("cpu"))
    assert use_experts(tiny_module(tiny_config(), seed=0), roles) is None
