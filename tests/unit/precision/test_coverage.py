"""Refusal of weights outside the precision rules, and reports of FP32 sums that are found by summing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny_models import EXPERTS, loaded_model, tiny_config, tiny_module
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from betterhalf.config.schema import RunConfig
from betterhalf.errors import InputError
from betterhalf.precision import cpu_linear
from betterhalf.precision.coverage import sums_in_fp32
from betterhalf.precision.products import has_native_matmul
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.rollout.native import decoder
from betterhalf.training.policy_trainer import PolicyTrainer

HALVES = ({"preset": "fp16"}, {"preset": "bf16"}, {"preset": "bf16", "half_matmul": "fp32_sums"})


def tiny(family: str = "llama", **changes: Any) -> Any:
    return tiny_module(tiny_config(family, **changes), seed=0)


def configured(precision: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({"precision": precision})


def trainer_of(module: Any, precision: dict[str, Any]) -> PolicyTrainer:
    config = configured(precision)
    roles = build_precision(config.precision, torch.device("cpu"))
    return PolicyTrainer(loaded_model(module), config=config, precision=roles)


# -- coverage


class OwnLinear(nn.Linear):
    """Subclass that computes what `nn.Linear` does, but could do anything."""


class OnParameters(nn.Module):
    """Projection by `F.linear` on a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(32, 48))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kernel)


class Experts(nn.Module):
    """Two experts in one parameter of three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, 32, 48))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weights @ x.unsqueeze(-3).transpose(-1, -2)).sum(-3).transpose(-1, -2)


class Convolved(nn.Module):
    """Projection as a convolution of width 1."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Conv1d(48, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.taps(x.transpose(-1, -2)).transpose(-1, -2)
        return out


class Squared(nn.Module):
    """Bilinear form of the input with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(48, 48, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.form(x, x)
        return out


OUTSIDE: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: Conv1D(32, 48), r"model\.layers\.1\.mlp\.down_proj \(Conv1D\)"),
    (lambda: OwnLinear(48, 32), r"model\.layers\.1\.mlp\.down_proj \(OwnLinear\)"),
    (OnParameters, r"model\.layers\.1\.mlp\.down_proj \(OnParameters\)"),
    (Experts, r"model\.layers\.1\.mlp\.down_proj \(Experts\)"),
    (Convolved, r"model\.layers\.1\.mlp\.down_proj\.taps \(Conv1d\)"),
    (Squared, r"model\.layers\.1\.mlp\.down_proj\.form \(Bilinear\)"),
]


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize(("make", "named"), OUTSIDE)
def test_weights_that_no_rule_covers_are_refused_by_name(
    make: Callable[[], nn.Module], named: str, precision: dict[str, Any]
) -> None:
    module = tiny()
    module.model.layers[1].mlp.down_proj = make()
    with pytest.raises(InputError, match=rf"also multiplies by weights in {named}; train it with precision=fp32"):
        trainer_of(module, precision)


def test_every_place_is_counted_and_the_first_are_named() -> None:
    module = tiny()
    for layer in module.model.layers:
        layer.mlp.up_proj, layer.mlp.down_proj = OwnLinear(32, 48), OwnLinear(48, 32)
    message = r"layers\.0\.mlp\.up_proj .*, .*layers\.0\.mlp\.down_proj .*, .*layers\.1\.mlp\.up_proj .* and 1 more"
    with pytest.raises(InputError, match=message):
        trainer_of(module, {"preset": "fp16"})


def test_experts_of_a_real_mixture_are_refused_in_half_and_train_in_fp32() -> None:
    with pytest.raises(InputError, match=r"experts \(MixtralExperts\)"):
        trainer_of(tiny("mixtral"), {"preset": "bf16"})
    trainer_of(tiny("mixtral"), {"preset": "fp32"})


class WithoutCalling(nn.Module):
    """Projection that multiplies by another module's weight without calling that module."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.owner.weight  # type: ignore[assignment]
        return F.linear(x, weight)


@pytest.mark.parametrize("precision", HALVES)
def test_a_covered_layer_whose_weight_is_multiplied_elsewhere_is_refused(precision: dict[str, Any]) -> None:
    module = tiny()
    mlp = module.model.layers[1].mlp
    mlp.down_proj = WithoutCalling(mlp.down_proj)
    with pytest.raises(InputError, match=r"weights in model\.layers\.1\.mlp\.down_proj\.owner\.weight"):
        trainer_of(module, precision)


class Calling(nn.Module):
    """Layer that is called, and whose weight then takes part in a product of another kind as well."""

    def __init__(self, owner: nn.Linear, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.owner, self.multiply = owner, multiply

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.owner(x) + 0 * self.multiply(x, self.owner.weight)
        return out


PRODUCTS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, w: torch.matmul(x, w.t()),
    lambda x, w: torch.einsum("bti,oi->bto", x, w),
    lambda x, w: torch.bmm(x, w.t()[None]),
    lambda x, w: x @ w.t().contiguous(),
    lambda x, w: (x.float() @ w.float().t()).to(x.dtype),
    lambda x, w: (x.unsqueeze(-2) @ w[[0] * 32].unsqueeze(0)[..., :32]).sum() + 0 * x[..., :1],
    lambda x, w: F.conv1d(x.transpose(1, 2), w[..., None]).transpose(1, 2),
    lambda x, w: torch.tensordot(x, w, dims=([2], [1])),
    lambda x, w: torch.nn.functional.grouped_mm(x[0], w.t()[None], offs=torch.tensor([x.shape[1]], dtype=torch.int32)),
]


NAMES = ["matmul", "einsum", "bmm", "copy", "widened", "lookup", "conv1d", "tensordot", "grouped"]


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("multiply", PRODUCTS, ids=NAMES)
def test_every_kind_of_product_with_a_weight_outside_its_layer_is_refused(
    multiply: Callable[[Tensor, Tensor], Tensor], precision: dict[str, Any]
) -> None:
    module = tiny()
    layer = module.model.layers[0].self_attn
    layer.o_proj = Calling(layer.o_proj, multiply)
    with pytest.raises(InputError, match=r"weights in model\.layers\.0\.self_attn\.o_proj\.owner\.weight"):
        trainer_of(module, precision)


class Gram(nn.Module):
    """Product of activations with themselves."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(-1, -2)) @ x


def test_a_product_of_half_activations_is_refused_where_sums_must_be_fp32() -> None:
    module = tiny()
    module.model.layers[0].mlp.act_fn = Gram()
    with pytest.raises(InputError, match="weights in other operations"):
        trainer_of(module, {"preset": "bf16", "half_matmul": "fp32_sums"})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", [*HALVES, {"preset": "fp16", "fp32_modules": ["model.layers.1.mlp"]}])
def test_sound_decoders_are_covered(family: str, tied: bool, precision: dict[str, Any]) -> None:
    facts = trainer_of(tiny(family, tie_word_embeddings=tied), precision).report().facts
    assert sum(int(number) for number in re.findall(r"\d+(?= )", facts["linear_layers"])) == 14
    assert facts["matmul_sums"] == "fp32"


@pytest.mark.parametrize("precision", [*HALVES, {"preset": "fp16", "fp32_modules": ["model.layers.1.mlp"]}])
def test_routers_and_experts_are_covered_and_counted_one_by_one(precision: dict[str, Any]) -> None:
    facts = trainer_of(tiny("qwen3_moe", **EXPERTS), precision).report().facts
    # Attention 4, router 1, and three matrices of eight experts, in two layers.
    assert sum(int(number) for number in re.findall(r"\d+(?= )", facts["linear_layers"])) == 2 * (4 + 1 + 24)
    assert facts["matmul_sums"] == "fp32"
    assert ("26 in fp32" if "fp32_modules" in precision else "2 in fp32") in facts["linear_layers"]


# -- reports


@pytest.mark.parametrize(
    ("precision", "layers"),
    [
        ({"preset": "fp16"}, "14 widened to fp32"),
        ({"preset": "bf16"}, "14 native" if has_native_matmul(torch.bfloat16) else "14 widened to fp32"),
        ({"preset": "bf16", "half_matmul": "fp32_sums"}, "14 widened to fp32"),
        ({"preset": "fp32"}, "14 in fp32"),
        ({"preset": "fp16", "fp32_modules": ["model.layers.1.mlp"]}, "11 widened to fp32, 3 in fp32"),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_both_sides_report_the_same_layers_and_fp32_sums(precision: dict[str, Any], layers: str, bias: bool) -> None:
    trainer = trainer_of(tiny(mlp_bias=bias), precision)
    engine = build_engine(configured(precision), trainer.module.config, (0,), trainer.precision)
    engine.load_weights(trainer.weight_stream(), policy_version=0)
    for report in (trainer.report(), engine.report()):
        assert (report.facts["linear_layers"], report.facts["matmul_sums"]) == (layers, "fp32")


def test_the_report_leaves_weights_and_results_as_they_were() -> None:
    trainer = trainer_of(tiny(), {"preset": "fp16"})
    before, held = trainer._few_hidden(8), trainer.report().digests
    assert torch.equal(trainer._few_hidden(8), before) and trainer.report().digests == held
    assert all(parameter.grad is None for parameter in trainer.module.parameters())


def in_half(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a product whose sums are rounded to half after every term."""
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.float16)
    for x, w in zip(left.t(), right.to_dense().t() if right.layout != torch.strided else right.t(), strict=True):
        total += torch.outer(x, w).half()
    return total.to(left.dtype)


def test_sums_in_half_are_reported_whatever_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tiny(), {"preset": "fp16"})
    engine = build_engine(configured({"preset": "fp16"}), trainer.module.config, (0,), trainer.precision)
    engine.load_weights(trainer.weight_stream(), policy_version=0)
    monkeypatch.setattr(cpu_linear, "product", in_half)
    assert trainer.report().facts["matmul_sums"] == "less than fp32"
    assert engine.report().facts["matmul_sums"] == "fp32"
    monkeypatch.undo()
    monkeypatch.setattr(decoder, "product", in_half)
    assert trainer.report().facts["matmul_sums"] == "fp32"
    assert engine.report().facts["matmul_sums"] == "less than fp32"


@pytest.mark.parametrize("of", ["inputs", "weights"])
def test_gradients_summed_in_half_are_reported_as_well(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    exact = cpu_linear.product

    def second_or_third(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(left)
        return (in_half if len(calls) % 3 == {"inputs": 2, "weights": 0}[of] else exact)(left, right, bias)

    trainer = trainer_of(tiny(), {"preset": "fp16"})
    monkeypatch.setattr(cpu_linear, "product", second_or_third)
    trainer._few_hidden = lambda most: torch.ones(most, 32)  # type: ignore[method-assign]
    assert trainer.report().facts["matmul_sums"] == "less than fp32"


# -- the test product: terms [out, in], added up in many orders


def in_order(terms: Tensor, kind: torch.dtype) -> Tensor:
    total = torch.zeros_like(terms[:, 0]).to(kind)
    for column in terms.t():
        total = (total.double() + column.double()).to(kind)
    return total


def pairwise(terms: Tensor, kind: torch.dtype) -> Tensor:
    while terms.shape[1] > 1:
        terms = F.pad(terms, (0, terms.shape[1] % 2))
        terms = (terms[:, ::2].double() + terms[:, 1::2].double()).to(kind)
    return terms[:, 0].to(kind)


def blocks(size: int) -> Callable[[Tensor, torch.dtype], Tensor]:
    """Return a sum that is exact within a block and rounded between blocks."""
    return lambda terms, kind: in_order(
        torch.stack([part.double().sum(1).to(kind) for part in torch.split(terms, size, 1)], 1), kind
    )


def lanes(count: int) -> Callable[[Tensor, torch.dtype], Tensor]:
    """Return a sum of every `count`-th term, rounded each time, and then of these lanes, pairwise."""
    return lambda terms, kind: pairwise(
        torch.stack([in_order(terms[:, lane::count], kind) for lane in range(count)], 1), kind
    )


ORDERS = {
    "in order": in_order,
    "pairwise": pairwise,
    **{f"blocks of {size}": blocks(size) for size in (4, 16, 64)},
    **{f"{count} lanes": lanes(count) for count in (2, 8, 16, 64)},
}


@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize("operands", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [96, 201])
def test_fp32_sums_are_distinguished_from_narrower_ones_in_every_order(
    order: str, operands: torch.dtype, width: int
) -> None:
    weight = torch.empty(40, width, dtype=operands)

    def sums(kind: torch.dtype) -> bool:
        return sums_in_fp32(lambda x, w: ORDERS[order](w, kind)[None], weight)

    assert sums(torch.float32)
    assert not sums(torch.float16) and not sums(torch.bfloat16)


@pytest.mark.parametrize("bits", [7, 10])
def test_rounding_of_fp32_operands_is_detected(bits: int) -> None:
    """Round as TF32 does, to 10 stored bits, or as oneDNN's bf16 mode does, to 7."""

    def multiply(x: Tensor, w: Tensor) -> Tensor:
        scale = 2.0 ** (w.abs().clamp(min=1e-30).log2().floor() - bits)
        return x.double() @ ((w / scale).round() * scale).double().t()

    assert not sums_in_fp32(multiply, torch.empty(16, 50))
    assert sums_in_fp32(lambda x, w: x.double() @ w.double().t(), torch.empty(16, 50))
