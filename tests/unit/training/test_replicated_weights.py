"""FP32 masters collect half gradients in FP32 and publish weights with one rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from betterhalf.precision.contract import weights_digests
from betterhalf.precision.cpu_embedding import CpuEmbedding
from betterhalf.precision.formats import dtype_name
from betterhalf.precision.islands import resolve_islands
from betterhalf.training.weights import sums
from betterhalf.training.weights.replicated import ReplicatedWeights


def test_half_gradients_of_many_micro_batches_are_summed_in_fp32() -> None:
    layer = nn.Linear(1, 1, bias=False)
    weights = ReplicatedWeights(layer, "fp16")
    # 1 + 4095 x 2^-11: every term is exact in FP16, but an FP16 sum stays at 1, since half an ulp of 1 is 2^-11
    parts = [1.0] + [2.0**-11] * 4095
    for part in parts:
        layer(torch.tensor([[part]], dtype=torch.float16)).sum().backward()
    ((_, gradient),) = weights.gradients()
    assert gradient.dtype == torch.float32
    assert gradient.item() == 1.0 + 4095 * 2.0**-11
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_stale_gradient_is_neither_added_to_nor_reported(dtype: torch.dtype) -> None:
    pair = nn.ModuleDict({"used": nn.Linear(1, 1, bias=False), "idle": nn.Linear(1, 1, bias=False)})
    weights, x = ReplicatedWeights(pair, dtype_name(dtype)), torch.ones(1, 1, dtype=dtype)
    for layer in pair.values():
        (3 * layer(x)).sum().backward()
    assert [gradient.item() for _, gradient in weights.gradients()] == [3.0, 3.0]
    weights.zero_grad()
    for _ in range(2):
        (2 * pair["used"](x)).sum().backward()
    assert {name: gradient.item() for name, gradient in weights.gradients()} == {"used.weight": 4.0, "idle.weight": 0.0}
    weights.zero_grad()
    assert [gradient.item() for _, gradient in weights.gradients()] == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(7, 3), (7,), (1, 40)])
def test_gradients_are_added_in_parts_of_any_size(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_CACHED", 8)
    module = nn.ParameterDict({"w": nn.Parameter(torch.zeros(shape))})
    weights, factors = (
        ReplicatedWeights(module, "fp16"),
        torch.arange(7 * 3 * 40.0)[: math.prod(shape)].view(shape),
    )
    for _ in range(3):
        (module["w"] * factors.half()).sum().backward()
    ((_, gradient),) = weights.gradients()
    assert torch.equal(gradient, 3 * factors)


def test_both_uses_of_an_fp32_parameter_add_to_its_one_gradient() -> None:
    module = nn.ModuleDict({"table": CpuEmbedding(nn.Embedding(3, 1))})
    weights = ReplicatedWeights(module, "fp32")
    head = weights.second_use(module["table"].weight)
    for expected in ([1.0, 12.0, 1.0], [2.0, 24.0, 2.0]):
        (head.sum() + 11 * module["table"](torch.tensor([1])).sum()).backward()
        ((_, gradient),) = weights.gradients()
        assert gradient.flatten().tolist() == expected
    weights.zero_grad()
    head.sum().backward()
    assert [gradient.flatten().tolist() for _, gradient in weights.gradients()] == [[1.0, 1.0, 1.0]]


def test_sparse_gradients_of_an_embedding_add_up_and_discard_stale_ones() -> None:
    module = nn.ModuleDict({"table": CpuEmbedding(nn.Embedding(4, 1))})
    weights = ReplicatedWeights(module, "fp16")
    for tokens, expected in (([1, 1, 3], [0.0, 2.0, 0.0, 1.0]), ([0, 3], [1.0, 2.0, 0.0, 2.0])):
        module["table"](torch.tensor(tokens)).sum().backward()
        ((_, gradient),) = weights.gradients()
        assert gradient.flatten().tolist() == expected
    weights.zero_grad()
    module["table"](torch.tensor([2])).sum().backward()
    ((_, gradient),) = weights.gradients()
    assert gradient.flatten().tolist() == [0.0, 0.0, 1.0, 0.0]


def test_each_part_is_rounded_to_half_before_it_is_added() -> None:
    layer = nn.Linear(1, 1, bias=False)
    weights = ReplicatedWeights(layer, "fp16")
    fine = torch.tensor([[1 + 2.0**-10]], dtype=torch.float16)
    for _ in range(3):
        (layer(fine).float() * (1 + 2.0**-12)).sum().backward()
    ((_, gradient),) = weights.gradients()
    upstream = torch.tensor(1 + 2.0**-12).half()  # the FP32 upstream gradient is rounded to 1 at the half output
    assert gradient.item() == 3 * float(upstream * fine)


def test_masters_keep_what_half_cannot_hold_and_publish_rounds_once() -> None:
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    weights = ReplicatedWeights(layer, "bf16")
    with torch.no_grad():
        for _ in range(100):
            weights.masters["weight"].add_(1e-4)  # each far below the spacing of BF16 at 1, which is 2^-7
    weights.publish()
    assert abs(weights.masters["weight"].item() - 1.01) < 1e-5
    assert layer.weight.item() == torch.tensor(1.01).bfloat16().item()
    ((_, wired),) = weights.on_the_wire("fp16")
    assert wired.item() == torch.tensor(weights.masters["weight"].item()).half().item()


def test_fp32_masters_are_the_module_s_own_parameters() -> None:
    layer = nn.Linear(2, 2)
    weights = ReplicatedWeights(layer, "fp32")
    assert weights.masters["weight"] is layer.weight
    layer(torch.ones(1, 2)).sum().backward()
    layer(torch.ones(1, 2)).sum().backward()
    assert dict(weights.gradients())["bias"].tolist() == [2.0, 2.0]


def test_buffers_are_never_cast() -> None:
    layer = nn.Linear(2, 2)
    layer.register_buffer("inv_freq", torch.tensor([0.1, 0.01]))
    ReplicatedWeights(layer, "fp16")
    assert layer.inv_freq.dtype == torch.float32
    assert layer.weight.dtype == torch.float16


class Block(nn.Module):
    """A module with the parameter names of a one-layer model: one in an island, and one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(1, 1, bias=False)})])})
        self.head = nn.Linear(1, 1, bias=False)

    @property
    def island(self) -> nn.Linear:
        return self.get_submodule("model.layers.0.mlp")  # type: ignore[return-value]


ISLAND = "model.layers.0.mlp.weight"


def block_of_fine_weights() -> Block:
    block = Block()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(1 + 2.0**-14)
    return block


def island_weights(dtype: torch.dtype = torch.float16) -> tuple[Block, ReplicatedWeights]:
    block = block_of_fine_weights()
    return block, ReplicatedWeights(block, dtype_name(dtype), resolve_islands(["model.layers.0.mlp"], 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_island_s_weights_are_half_values_in_fp32_tensors_before_and_after_publishing(dtype: torch.dtype) -> None:
    block, weights = island_weights(dtype)
    assert block.island.weight.dtype == torch.float32 and block.island.weight.item() == 1.0
    assert block.head.weight.dtype == dtype
    with torch.no_grad():
        weights.masters[ISLAND].fill_(1.3)
    weights.publish()
    assert block.island.weight.dtype == torch.float32
    assert block.island.weight.item() == torch.tensor(1.3).to(dtype).item()


def test_an_island_s_gradient_is_never_rounded_to_half() -> None:
    block, weights = island_weights()
    fine = torch.tensor([[1 + 2.0**-20]])
    for _ in range(2):
        (block.island(fine) * 2.0**20).sum().backward()
    assert dict(weights.gradients())[ISLAND].item() == 2.0**21 * (1 + 2.0**-20)  # too large and too fine for half
    assert block.island.weight.grad is None


def test_digests_and_wire_do_not_know_of_islands() -> None:
    _, with_island = island_weights()
    without = ReplicatedWeights(block_of_fine_weights(), "fp16")
    assert weights_digests(with_island.computing()) == weights_digests(without.computing())
    sent, expected = dict(with_island.on_the_wire("fp16")), dict(without.on_the_wire("fp16"))
    assert sent.keys() == expected.keys() and all(torch.equal(sent[name], expected[name]) for name in sent)
    assert with_island.masters[ISLAND].item() == 1 + 2.0**-14


def test_fp32_masters_with_islands_are_still_the_module_s_own_parameters() -> None:
    block, weights = island_weights(torch.float32)
    assert weights.shared and weights.masters[ISLAND] is block.island.weight
