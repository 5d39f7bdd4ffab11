"""FP32 islands: the modules that patterns select, the FP32 residual stream behind them, and refusals."""

from __future__ import annotations

import pytest
import torch

from betterhalf.config.schema import PrecisionConfig
from betterhalf.errors import InputError
from betterhalf.precision.island_hooks import round_through, use_islands
from betterhalf.precision.islands import has_post_norms, resolve_islands
from betterhalf.precision.roles import build_precision

FLAGS = ("stream_in", "attention", "output", "attention_norm", "stream_mid", "mlp", "down", "mlp_norm", "stream_out")


def wide(patterns: list[str], num_layers: int = 3, *, post_norms: bool = False) -> list[set[str]]:
    """Return the parts that are FP32, for each layer."""
    islands = resolve_islands(patterns, num_layers, post_norms=post_norms)
    return [{flag for flag in FLAGS if getattr(layer, flag)} for layer in islands.layers]


def test_without_patterns_nothing_is_fp32() -> None:
    islands = resolve_islands((), 3)
    assert wide([]) == [set(), set(), set()]
    assert not islands and not islands.attention and not islands.stream_out
    assert islands.described() == "none"
    assert not islands.hold("model.layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.1.mlp.down_proj", {"down", "mlp_norm", "stream_out"}),
        ("model.layers.1.mlp", {"mlp", "down", "mlp_norm", "stream_out"}),
        ("model.layers.1.self_attn.o_proj", {"output", "attention_norm", "stream_mid", "stream_out"}),
        ("model.layers.1.self_attn", {"attention", "output", "attention_norm", "stream_mid", "stream_out"}),
        ("model.layers.1", set(FLAGS)),
    ],
)
def test_the_stream_is_fp32_from_the_island_on_and_nothing_before_it(name: str, parts: set[str]) -> None:
    assert wide([name]) == [set(), parts, {"stream_in", "stream_mid", "stream_out"}]
    islands = resolve_islands([name], 3)
    assert islands.described() == name and islands.stream_out
    assert islands.attention == ("attention" in parts)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.1.post_attention_layernorm", {"attention_norm", "stream_mid", "stream_out"}),
        ("model.layers.1.post_feedforward_layernorm", {"mlp_norm", "stream_out"}),
    ],
)
def test_the_norm_of_a_branch_s_result_is_an_island_in_blocks_that_have_one(name: str, parts: set[str]) -> None:
    assert wide([name], post_norms=True) == [set(), parts, {"stream_in", "stream_mid", "stream_out"}]
    with pytest.raises(InputError, match=r"did you mean|matches no module"):
        resolve_islands([name], 3)


def test_patterns_select_every_layer_and_names_stay_in_the_model_s_order() -> None:
    islands = resolve_islands(["model.layers.*.mlp.down_proj", "model.layers.10", "model.layers.2.self_attn"], 11)
    downs = [f"model.layers.{layer}.mlp.down_proj" for layer in range(10)]
    assert islands.names == (*downs[:2], "model.layers.2.self_attn", *downs[2:], "model.layers.10")


def test_an_island_within_another_is_not_named() -> None:
    assert resolve_islands(["model.layers.1*"], 2).names == ("model.layers.1",)
    both = resolve_islands(["model.layers.0.mlp.down_proj", "model.layers.0.mlp"], 2)
    assert both.names == ("model.layers.0.mlp",)


def test_a_layer_s_name_does_not_hold_the_parameters_of_a_longer_number() -> None:
    islands = resolve_islands(["model.layers.1"], 12)
    assert islands.hold("model.layers.1.input_layernorm.weight")
    assert not islands.hold("model.layers.11.input_layernorm.weight")
    assert not islands.hold("model.norm.weight") and not islands.hold("lm_head.weight")


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"),
        ("model.layers.1.mlp.down_porj", "model.layers.1.mlp.down_proj"),
        ("model.layers.4.mlp", "model.layers.2.mlp"),
        ("layers.1.mlp", "model.layers.1.mlp"),
        ("model.layers.*.input_layernorm", None),
        ("lm_head", None),
        ("", None),
    ],
)
def test_a_module_that_cannot_be_an_island_is_refused_with_the_closest_name(pattern: str, meant: str | None) -> None:
    with pytest.raises(InputError) as caught:
        resolve_islands(["model.layers.0", pattern], 3)
    message = str(caught.value)
    assert repr(pattern) in message and "3 layers" in message and "self_attn.o_proj" in message
    assert ("did you mean" in message) == (meant is not None)
    assert meant is None or f"did you mean {meant}?" in message


def test_fp32_has_no_islands_but_refuses_wrong_names_all_the_same() -> None:
    right, wrong = (
        build_precision(PrecisionConfig(fp32_modules=(name,)), torch.device("cpu"))
        for name in ("model.layers.0", "model.layers.9")
    )
    assert not right.islands(2, "fp32") and right.islands(2, "fp16")
    with pytest.raises(InputError):
        wrong.islands(2, "fp32")


def test_rounding_through_rounds_values_and_passes_gradients_unchanged() -> None:
    x = torch.tensor([1 + 2.0**-12, 70000.0, -3.0], requires_grad=True)
    out = round_through(x, torch.float16)
    assert out.dtype == torch.float32 and out.tolist() == [1.0, float("inf"), -3.0]
    out.backward(torch.tensor([1 + 2.0**-12, 1e6, 1e-9]))
    assert x.grad is not None and torch.equal(x.grad, torch.tensor([1 + 2.0**-12, 1e6, 1e-9]))


def test_post_norms_make_the_residual_stream_of_a_four_norm_block_fp32() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Gemma3TextConfig(vocab_size=32, head_dim=8, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    module = Gemma3ForCausalLM(config).eval()
    islands = resolve_islands(["model.layers.1.post_feedforward_layernorm"], 3, post_norms=has_post_norms(config))
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if islands.hold(name) else torch.bfloat16)
    use_islands(module, islands, torch.bfloat16)
    seen: dict[str, torch.dtype] = {}
    for name, part in module.named_modules():
        if "layers." in name and isinstance(part, torch.nn.Module):
            part.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: getattr(out, "dtype", None)}))
    module(torch.arange(6).unsqueeze(0))
    stream = [seen[f"model.layers.{layer}"] for layer in range(3)]
    assert stream == [torch.bfloat16, torch.float32, torch.float32]
    assert seen["model.layers.1.mlp.down_proj"] == seen["model.layers.2.mlp.down_proj"] == torch.bfloat16
    assert seen["model.layers.1.post_feedforward_layernorm"] == torch.float32
    assert seen["model.layers.2.post_feedforward_layernorm"] == torch.bfloat16
    assert seen["model.layers.2.input_layernorm"] == seen["model.layers.2.pre_feedforward_layernorm"] == torch.bfloat16
