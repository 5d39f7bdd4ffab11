"""FP32 masters collect half gradients in FP32 and publish weights with one rounding."""

from __future__ import annotations

import torch
from torch import nn

from betterhalf.training.master_weights import MasterWeights


def test_half_gradients_of_many_micro_batches_are_summed_in_fp32() -> None:
    layer = nn.Linear(1, 1, bias=False)
    weights = MasterWeights(layer, torch.float16)
    # 1 + 4095 x 2^-11: every part is exact in FP16, but an FP16 sum stays at 1, since half an ulp of 1 is 2^-11
    parts = [1.0] + [2.0**-11] * 4095
    for part in parts:
        layer(torch.tensor([[part]], dtype=torch.float16)).sum().backward()
    ((_, gradient),) = weights.gradients()
    assert gradient.dtype == torch.float32
    assert gradient.item() == 1.0 + 4095 * 2.0**-11
    assert layer.weight.grad is None


def test_each_part_is_rounded_to_half_before_it_is_added() -> None:
    layer = nn.Linear(1, 1, bias=False)
    weights = MasterWeights(layer, torch.float16)
    fine = torch.tensor([[1 + 2.0**-10]], dtype=torch.float16)
    for _ in range(3):
        (layer(fine).float() * (1 + 2.0**-12)).sum().backward()
    ((_, gradient),) = weights.gradients()
    upstream = torch.tensor(1 + 2.0**-12).half()  # the FP32 upstream gradient meets the half output: rounded to 1
    assert gradient.item() == 3 * float(upstream * fine)


def test_masters_keep_what_half_cannot_hold_and_publish_rounds_once() -> None:
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    weights = MasterWeights(layer, torch.bfloat16)
    with torch.no_grad():
        for _ in range(100):
            weights.masters["weight"].add_(1e-4)  # each far below BF16's step of 2^-7 at 1
    weights.publish()
    assert abs(weights.masters["weight"].item() - 1.01) < 1e-5
    assert layer.weight.item() == torch.tensor(1.01).bfloat16().item()
    ((_, wired),) = weights.on_the_wire(torch.float16)
    assert wired.item() == torch.tensor(weights.masters["weight"].item()).half().item()


def test_fp32_masters_are_the_module_s_own_parameters() -> None:
    layer = nn.Linear(2, 2)
    weights = MasterWeights(layer, torch.float32)
    assert weights.masters["weight"] is layer.weight
    layer(torch.ones(1, 2)).sum().backward()
    layer(torch.ones(1, 2)).sum().backward()
    assert dict(weights.gradients())["bias"].tolist() == [2.0, 2.0]


def test_buffers_are_never_cast() -> None:
    layer = nn.Linear(2, 2)
    layer.register_buffer("inv_freq", torch.tensor([0.1, 0.01]))
    MasterWeights(layer, torch.float16)
    assert layer.inv_freq.dtype == torch.float32
    assert layer.weight.dtype == torch.float16
