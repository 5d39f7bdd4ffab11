"""vLLM's experts: names and values through a kernel's order, FP32 routers, and the record of choices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny_families import FAMILIES, family_config
from torch import Tensor, nn
from transformers import Qwen3MoeConfig

from betterhalf.config.schema import RunConfig
from betterhalf.errors import InputError
from betterhalf.rollout.build import check_architecture
from betterhalf.rollout.vllm import experts, options
from betterhalf.rollout.vllm.routes import RouteRecorder


class RoutedExperts(nn.Module):
    """Stand-in for vLLM's class: three experts of width 4, padded to 6, hidden size 8."""

    def __init__(self) -> None:
        super().__init__()
        self.moe_config = SimpleNamespace(
            intermediate_size_per_partition=4, hidden_dim=8, moe_parallel_config=SimpleNamespace(tp_size=1)
        )
        self.quant_method = SimpleNamespace(moe_kernel=None)
        self.w13_weight = nn.Parameter(torch.arange(3 * 12 * 8.0).view(3, 12, 8))
        self.w2_weight = nn.Parameter(torch.arange(3 * 8 * 6.0).view(3, 8, 6))


class GateLinear(nn.Module):
    """Stand-in for vLLM's router."""

    return_bias = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).half())

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x @ self.weight.t(), None


PATH = "model.layers.1.mlp.experts.routed_experts"


def test_experts_have_the_names_and_shapes_of_the_files_without_padding() -> None:
    layer = RoutedExperts()
    found = dict(experts.held_experts(PATH, layer, lambda ranks, mine: [mine] * ranks))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == experts.expert_shapes(PATH, layer)
    assert torch.equal(found["model.layers.1.mlp.experts.2.up_proj.weight"], layer.w13_weight[2, 6:10])
    assert torch.equal(found["model.layers.1.mlp.experts.1.down_proj.weight"], layer.w2_weight[1, :, :4])


def test_shards_of_an_expert_are_joined_along_its_width() -> None:
    layer = RoutedExperts()
    layer.moe_config.moe_parallel_config.tp_size = 2
    found = dict(experts.held_experts(PATH, layer, lambda ranks, mine: [mine] * ranks))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == experts.expert_shapes(PATH, layer)
    assert found["model.layers.1.mlp.experts.0.gate_proj.weight"].shape == (8, 8)


@pytest.mark.extra
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_order_of_vllms_kernel_is_undone_bit_for_bit(dtype: torch.dtype) -> None:
    pack = pytest.importorskip("vllm._custom_ops", reason="vLLM is not installed").cpu_prepack_moe_weight
    if not hasattr(torch.ops._C, "prepack_moe_weight"):
        pytest.skip("this vLLM has no kernel for a CPU")
    weight = torch.randn(3, 128, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = SimpleNamespace(
        quant_method=SimpleNamespace(
            moe_kernel=SimpleNamespace(fused_experts=SimpleNamespace(isa="vec", _use_zentorch=False))
        )
    )
    packed = pack(weight, "vec")
    assert not torch.equal(packed, weight)
    assert torch.equal(experts._in_order(layer, packed), weight)


def test_a_router_multiplies_in_fp32_and_keeps_its_interface() -> None:
    model = nn.Sequential(GateLinear())
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)).half()
    rounded, _ = model[0](x)
    experts.route_in_fp32(model, lambda layer, name: getattr(layer, name).detach())
    logits, bias = model[0](x)
    assert bias is None and logits.dtype == torch.float32 and experts.routers(model) == [model[0]]
    exact = x.double() @ model[0].weight.double().t()
    assert (logits.double() - exact).abs().max() < 1e-5 < (rounded.double() - exact).abs().max()


class Runner:
    """Stand-in for vLLM's model runner: each pass chooses expert = token for the first layer, 1 for the second."""

    def __init__(self, routers: list[Any]) -> None:
        self.routers = routers
        self.input_batch = SimpleNamespace(req_ids=[], num_computed_tokens_cpu=[])

    def execute_model(self, scheduled: Any) -> Any:
        return self._model_forward(scheduled.tokens)

    def _model_forward(self, tokens: list[int]) -> str:
        chosen = torch.tensor(tokens)[:, None]
        for router, experts_TK in zip(self.routers, (chosen, torch.ones_like(chosen)), strict=True):
            router.capture(experts_TK)
        return "out"


class Router:
    """Stand-in for vLLM's choice of experts."""

    global_num_experts = 8
    capture: Any = None

    def set_capture_fn(self, capture: Any) -> None:
        self.capture = capture


def test_choices_are_assigned_to_requests_and_positions() -> None:
    blocks: list[Any] = [nn.Module() for _ in range(2)]
    for block in blocks:
        block.router, block.routed_experts = Router(), nn.Module()
    routers = [block.router for block in blocks]
    runner = Runner(routers)
    record = RouteRecorder(runner, nn.Sequential(*blocks))
    for requests, computed, counts, tokens in (
        (["a", "b"], [0, 0], {"a": 3, "b": 2}, [1, 2, 3, 4, 5, 0]),  # one row of padding
        (["b", "a"], [2, 3], {"b": 1, "a": 1}, [6, 7]),
        (["b"], [0], {"b": 4}, [0, 0, 0, 2]),  # computed again after a preemption
    ):
        runner.input_batch = SimpleNamespace(req_ids=requests, num_computed_tokens_cpu=computed)
        assert runner.execute_model(SimpleNamespace(num_scheduled_tokens=counts, tokens=tokens)) == "out"
    found = record.stop()
    assert found["a"][:, 0, 0].tolist() == [1, 2, 3, 7] and found["b"][:, 0, 0].tolist() == [4, 5, 6, 2]
    assert found["a"].shape == (4, 2, 1) and found["a"].dtype == "uint8" and set(found["a"][:, 1, 0]) == {1}
    assert routers[0].capture is None and "execute_model" not in vars(runner)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_a_mixture_whose_experts_have_other_names_is_refused_before_it_is_loaded(family: str) -> None:
    config = RunConfig.model_validate({"engine": {"type": "vllm"}})
    with pytest.raises(InputError, match=f"experts of architecture '{family}' .*; use a mixture of one of qwen3_moe"):
        check_architecture(config, family_config(FAMILIES[family]))
    for name in ("qwen3_moe", "qwen2_moe", "olmoe", "llama"):
        check_architecture(config, family_config(FAMILIES[name]))


def test_experts_that_do_not_divide_among_devices_are_refused() -> None:
    options.check_experts(Qwen3MoeConfig(moe_intermediate_size=96), 3)
    with pytest.raises(InputError, match="engine.tensor_parallel_size=5 does not divide the width .*96"):
        options.check_experts(Qwen3MoeConfig(moe_intermediate_size=96), 5)
