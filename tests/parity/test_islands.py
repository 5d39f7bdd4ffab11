"""FP32 islands in trainer and engine: they prevent an overflow, keep both close, and give the gradients of FP32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_models import SMALL, loaded_model, tiny_config, tiny_module
from torch import Tensor

from betterhalf.batches import MicroBatch
from betterhalf.config.schema import RunConfig
from betterhalf.errors import EngineError, InputError, NumericsError
from betterhalf.models.loading import LoadedModel
from betterhalf.precision.contract import compare
from betterhalf.precision.formats import narrowest_format
from betterhalf.precision.products import has_native_matmul
from betterhalf.precision.roles import Precision, build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.rollout.native.engine import NativeEngine
from betterhalf.training.pack import pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, GenerateRequest, Prompt, Rollout

FAMILIES: dict[str, Any] = {"llama": {}, "qwen2": {"tie_word_embeddings": True}, "qwen3": {}}
"""Family -> changes to its configuration."""
DOWN = "model.layers.1.mlp.down_proj"
ISLANDS = (DOWN, "model.layers.1.mlp", "model.layers.1.self_attn.o_proj", "model.layers.1.self_attn", "model.layers.1")
PROMPTS = [tuple((7 * k + 3 * i) % 95 + 2 for i in range(3 + 4 * k)) for k in range(4)]


def random_model(family: str = "llama", scaled: tuple[str, float] | None = None) -> LoadedModel:
    """Return a model of three layers; `scaled` is a prefix of weight names and the factor on these weights."""
    module = tiny_module(tiny_config(family, SMALL, **FAMILIES[family]), seed=4, biases=0.3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if scaled and name.startswith(scaled[0]):
                parameter.mul_(scaled[1])
    return loaded_model(module, stop_token_ids=(1,))


def overflowing() -> LoadedModel:
    """Return a model whose layer 1 down_proj exceeds half a million; its weights and all values before it fit FP16."""
    return random_model("llama", (DOWN, 40000.0))


def wings(
    model: LoadedModel, precision: dict[str, Any], rounding: str = "aligned", **training: Any
) -> tuple[PolicyTrainer, NativeEngine, Precision]:
    """Return trainer and engine at the same weights, as a run builds them."""
    config = RunConfig.model_validate(
        {
            "precision": precision,
            "engine": {"type": "native", "rounding": rounding},
            "sampling": {"max_tokens": 24},
            "training": {"tokens_per_micro_batch": 300, "optimizer_steps": 1, **training},
        }
    )
    roles = build_precision(config.precision, torch.device("cpu"))
    engine = build_engine(config, model.hf_config, model.stop_token_ids, roles)
    trainer = PolicyTrainer(model, config=config, precision=roles)
    engine.load_weights(trainer.weight_stream(), policy_version=0)
    assert isinstance(engine, NativeEngine)
    return trainer, engine, roles


def packed(config: RunConfig, groups: list[tuple[Completion, ...]]) -> tuple[MicroBatch, ...]:
    rollouts = [
        Rollout(
            prompt=Prompt(prompt_id="", text="", token_ids=ids, answer=""), completion=completion, text="", reward=0.0
        )
        for ids, group in zip(PROMPTS, groups, strict=True)
        for completion in group
    ]
    return pack_step(rollouts, [1.0] * len(rollouts), config, step=1).packs


def fixed_packs(config: RunConfig) -> tuple[MicroBatch, ...]:
    """Return made-up completions, which no engine sampled."""

    def completion(k: int) -> Completion:
        ids = tuple((11 * k + 5 * i) % 95 + 2 for i in range(20))
        return Completion(token_ids=ids, behavior_logprobs=(0.0,) * 20, finish_reason="length", policy_version=0)

    return packed(config, [(completion(k), completion(k + 7)) for k in range(len(PROMPTS))])


def gaps(trainer: PolicyTrainer, engine: NativeEngine) -> Tensor:
    """Return trainer minus behavior logprobs of completions that the engine samples, float64."""
    requests = [GenerateRequest(token_ids=ids, group_size=4, key=(0, 1, k)) for k, ids in enumerate(PROMPTS)]
    packs = packed(trainer.config, engine.generate(requests, trainer.config.sampling))
    return torch.cat(
        [trainer.measure([pack])[0].logprobs_C.double() - pack.behavior_logprobs_C.double() for pack in packs]
    )


def k3(gap: Tensor) -> float:
    return float((gap.exp() - 1 - gap).mean())


def logprobs(trainer: PolicyTrainer) -> Tensor:
    return torch.cat([trainer.measure([pack])[0].logprobs_C for pack in fixed_packs(trainer.config)])


def largest_down(trainer: PolicyTrainer) -> float:
    """Return the largest magnitude in the result of layer 1's down_proj."""
    seen: list[float] = []
    down = trainer.module.get_submodule(DOWN)
    handle = down.register_forward_hook(lambda _module, _args, out: seen.append(float(out.abs().max())))
    logprobs(trainer)
    handle.remove()
    return max(seen)


def half(precision: str, *islands: str) -> dict[str, Any]:
    return {"preset": precision, "half_matmul": "fp32_sums", "fp32_modules": islands}


def test_without_an_island_the_overflow_leaves_neither_side_finite() -> None:
    trainer, engine, _ = wings(overflowing(), half("fp16"))
    assert largest_down(trainer) == float("inf")
    assert not bool(logprobs(trainer).isfinite().all())
    with pytest.raises(NumericsError, match=r"precision\.fp32_modules"):
        trainer.report()
    with pytest.raises(EngineError, match=r"precision\.fp32_modules"):
        gaps(trainer, engine)


@pytest.mark.parametrize("island", [DOWN, "model.layers.1.mlp", "model.layers.1"])
def test_an_island_prevents_the_overflow_in_the_trainer(island: str) -> None:
    trainer, _, _ = wings(overflowing(), half("fp16", island))
    exact, _, _ = wings(overflowing(), {"preset": "fp32"})
    found, expected = logprobs(trainer), logprobs(exact)
    assert 1e5 < largest_down(trainer) < 1e6
    # FP16 without an overflow, the same model unscaled, is no closer to its own FP32.
    plain, plain_exact = (wings(random_model(), precision)[0] for precision in (half("fp16"), {"preset": "fp32"}))
    rounding = (logprobs(plain) - logprobs(plain_exact)).square().mean()
    assert (found - expected).square().mean() < 1.5 * rounding


@pytest.mark.parametrize("mode", ["aligned", "engine"])
@pytest.mark.parametrize("island", [DOWN, "model.layers.1.mlp", "model.layers.1"])
def test_an_island_prevents_the_overflow_in_the_engine_and_both_sides_stay_close(island: str, mode: str) -> None:
    gap = gaps(*wings(overflowing(), half("fp16", island), mode)[:2])
    plain, engine_mode = (k3(gaps(*wings(random_model(), half("fp16"), m)[:2])) for m in (mode, "engine"))
    assert bool(gap.isfinite().all())
    # Aligned sides may agree bit for bit, which leaves nothing to compare with.
    assert k3(gap) < max(1.5 * plain, 0.03 * engine_mode)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("island", ISLANDS)
def test_sides_with_islands_are_as_close_as_without(family: str, island: str, precision: str) -> None:
    without, with_island, engine_mode = (
        k3(gaps(*wings(random_model(family), half(precision, *names), mode)[:2]))
        for names, mode in (((), "aligned"), ((island,), "aligned"), ((), "engine"))
    )
    # Aligned BF16 meets a boundary of its coarse grid once in thousands of values, or never, so the bound is not
    # relative to its own k3 but three hundredths of that of production rounding.
    assert with_island < max(1.5 * without, 0.03 * engine_mode)


@pytest.mark.skipif(not has_native_matmul(torch.bfloat16), reason="this processor has no BF16 products")
@pytest.mark.parametrize("island", ISLANDS)
def test_native_bf16_uses_fp32_tensors_in_islands_and_both_sides_stay_close(island: str) -> None:
    native = {"preset": "bf16", "half_matmul": "native"}
    trainer, engine, _ = wings(random_model(), {**native, "fp32_modules": [island]})
    engine_mode = k3(gaps(*wings(random_model(), native, "engine")[:2]))
    seen: dict[tuple[str, int | None], torch.dtype] = {}

    def tap(operation: str, layer: int | None, value: Tensor) -> Tensor:
        seen[operation, layer] = value.dtype
        return value

    engine._decoder.tap = tap
    assert k3(gaps(trainer, engine)) < 0.2 * engine_mode
    assert {seen["mlp_residual", layer] for layer in (1, 2)} == {torch.float32}
    assert {seen["mlp_residual", 0], seen["down", 2], seen["mlp_norm", 2], seen["final_norm", None]} == {torch.bfloat16}
    assert engine._weights.layers[1].down.dtype == (torch.bfloat16 if "attn" in island else torch.float32)
    assert engine._weights.layers[2].down.dtype == torch.bfloat16


@pytest.mark.parametrize("island", ISLANDS)
def test_the_contract_holds_with_islands_and_breaks_if_one_side_lacks_them(island: str) -> None:
    trainer, engine, _ = wings(random_model("qwen3"), half("fp16", island))
    contract = compare(trainer.report(), engine.report(), allow_difference=False)
    assert contract.ok, contract.table()
    assert {row.region: row.trainer for row in contract.rows}["islands"] == island
    _, without, _ = wings(random_model("qwen3"), half("fp16"))
    assert not compare(trainer.report(), without.report(), allow_difference=False).ok


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_keys_and_values_of_an_attention_island_stay_on_the_cache_s_grid(precision: str) -> None:
    _, engine, _ = wings(random_model(), half(precision, "model.layers.1.self_attn"))
    engine._decoder.reserve(40)
    with torch.inference_mode():
        _, cached = engine._decoder.prefill(torch.arange(2, 42), (40,))
    assert narrowest_format(cached[1]) == precision


def test_fp32_ignores_islands() -> None:
    with_island, without = (
        wings(random_model(), {"preset": "fp32", "fp32_modules": names})[0] for names in ((DOWN,), ())
    )
    assert torch.equal(logprobs(with_island), logprobs(without))
    assert with_island.report().facts["fp32_modules"] == "none"


def test_an_architecture_with_other_layers_is_refused() -> None:
    model = random_model()
    for layer in model.module.model.layers:
        layer.pre_feedforward_layernorm = torch.nn.Identity()
    with pytest.raises(InputError, match=r"cannot be an FP32 island in architecture 'llama'"):
        wings(model, half("fp16", DOWN))


SCALE = 4096.0
"""Loss scale of the gradients below, so that FP16 loses none of them."""


def gradients(trainer: PolicyTrainer) -> dict[str, Tensor]:
    for pack in fixed_packs(trainer.config):
        (trainer.score(pack).mean() * SCALE).backward()  # type: ignore[no-untyped-call]
    return {name: gradient / SCALE for name, gradient in trainer.weights.gradients()}


def gradients_in_float64(family: str, scaled: tuple[str, float] | None = None) -> dict[str, Tensor]:
    """Return gradients of the transformers module on weights rounded to FP16, sequence by sequence."""
    module = random_model(family, scaled).module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half())
    module.double().set_attn_implementation("eager")
    config = RunConfig.model_validate({"training": {"tokens_per_micro_batch": 300, "optimizer_steps": 1}})
    for pack in fixed_packs(config):
        counts = torch.bincount(pack.sequence_index_C, minlength=pack.num_sequences).tolist()
        logits = []
        for rows, targets in zip(pack.loss_rows_C.split(counts), pack.target_ids_C.split(counts), strict=True):
            last = int(rows[0])
            prompt = pack.token_ids_T[last - int(pack.position_ids_T[last]) : last + 1]
            logits.append(module(torch.cat((prompt, targets))[None]).logits[0, len(prompt) - 1 : -1])
        rows = torch.cat(logits).log_softmax(-1)
        rows.gather(1, pack.target_ids_C[:, None]).mean().backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("island", [*ISLANDS, "model.layers.*"])
def test_gradients_equal_those_of_float64_within_half_rounding(family: str, island: str) -> None:
    found, exact = gradients(wings(random_model(family), half("fp16", island))[0]), gradients_in_float64(family)
    without = gradients(wings(random_model(family), half("fp16"))[0])
    inside = {name for name in exact if name.startswith(island.removesuffix(".*") + ".")}
    assert inside
    for name in exact:
        assert relative_error(found[name], exact[name]) < max(1.3 * relative_error(without[name], exact[name]), 1e-3)


def test_only_gradients_of_islands_have_more_bits_than_half() -> None:
    trainer, _, _ = wings(random_model(), half("fp16", "model.layers.1.mlp"), tokens_per_micro_batch=4096)
    (pack,) = fixed_packs(trainer.config)
    (trainer.score(pack).mean() * SCALE).backward()  # type: ignore[no-untyped-call]
    for name, gradient in trainer.weights.gradients():
        assert narrowest_format(gradient) == ("fp32" if name.startswith("model.layers.1.mlp.") else "fp16"), name


def test_gradients_are_right_where_the_forward_pass_would_overflow() -> None:
    scaled = (DOWN, 40000.0)
    found = gradients(wings(random_model("llama", scaled), half("fp16", DOWN))[0])
    exact = gradients_in_float64("llama", scaled)
    for name in (f"{DOWN}.weight", "model.layers.0.mlp.gate_proj.weight", "model.layers.2.mlp.up_proj.weight"):
        assert relative_error(found[name], exact[name]) < 0.01, name


@pytest.mark.parametrize("island", ISLANDS)
def test_activation_checkpointing_changes_no_bit(island: str) -> None:
    plain, checkpointed = (
        gradients(wings(random_model(), half("fp16", island), activation_checkpointing=on)[0]) for on in (False, True)
    )
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_the_engine_follows_new_weights_of_an_island() -> None:
    trainer, engine, _ = wings(random_model(), half("fp16", "model.layers.1"))
    with torch.no_grad():
        for master in trainer.weights.masters.values():
            master.mul_(1.01)
    trainer.weights.publish()
    engine.load_weights(trainer.weight_stream(), policy_version=1)
    assert engine.report().digests == trainer.report().digests
    assert k3(gaps(trainer, engine)) < 1e-5
