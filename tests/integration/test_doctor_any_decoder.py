"""`betterhalf doctor` on decoders that the engine, or even the trainer, does not know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    Lfm2Config,
    Lfm2Model,
    MambaConfig,
    set_seed,
)

from betterhalf.config.schema import ModelConfig, RunConfig
from betterhalf.errors import InputError
from betterhalf.examine import doctor as doctor_module
from betterhalf.examine.census import census_batch, reference
from betterhalf.examine.doctor import doctor
from betterhalf.examine.doctor_text import show_doctor
from betterhalf.examine.greedy import MAX_TOKENS, greedy_completions
from betterhalf.examine.subject import open_subject
from betterhalf.models.description import describe_model
from betterhalf.rollout.native.engine import NativeEngine

SMALL: dict[str, Any] = {
    "task": {"type": "arithmetic", "num_prompts": 8},
    "doctor": {"prompts": 2, "group_size": 2, "max_tokens": 8},
    "logging": {"console": "quiet"},
}
Change = Callable[[Any], None]


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., str]:
    """Write a random model of a configuration, with the tokenizer of the demo model, and return its folder."""

    def make(config: Any, change: Change = lambda module: None) -> str:
        set_seed(0)
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            change(module)
        module.save_pretrained(tmp_path / "model")
        demo = describe_model(ModelConfig(name="demo"))
        AutoTokenizer.from_pretrained(demo.source.location).save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return make


def neox() -> GPTNeoXConfig:
    """Return a decoder that the trainer can pack and the native engine does not know."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return GPTNeoXConfig(vocab_size=32, max_position_embeddings=256, hidden_dropout=0.0, attention_dropout=0.0, **sizes)


def convolving() -> Lfm2Config:
    """Return a decoder with convolutions, whose sequences cannot be packed."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    kinds = ["conv", "full_attention"]
    return Lfm2Config(vocab_size=32, max_position_embeddings=256, num_key_value_heads=2, layer_types=kinds, **sizes)


def four_norms() -> Gemma3TextConfig:
    """Return a small Gemma 3: norms before and after attention and MLP."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    kinds = ["sliding_attention", "full_attention"] * 2
    return Gemma3TextConfig(
        vocab_size=32, head_dim=8, num_key_value_heads=2, max_position_embeddings=256, layer_types=kinds, **sizes
    )


def examined(target: str, tmp_path: Path, **config: Any) -> dict[str, Any]:
    return doctor(target, RunConfig.model_validate({**SMALL, **config}), str(tmp_path / "run"))


def test_a_model_unknown_to_the_engine_has_a_census_and_says_who_can_measure_the_mismatch(
    made: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NativeEngine, "__init__", lambda *_, **__: pytest.fail("an engine was started"))
    result = examined(made(neox()), tmp_path)
    assert "does not know architecture 'gpt_neox'" in result["mismatch_not_measured"]
    assert "engine=vllm" in result["mismatch_not_measured"]
    assert result["mismatch"] == [] and result["engine_agrees"] is None
    assert {name: verdict["verdict"] for name, verdict in result["verdicts"].items()} == dict.fromkeys(
        ("fp16", "bf16", "fp32"), "ok"
    )
    fp16 = result["census"]["fp16"]
    assert fp16["predicted"] is None and fp16["largest_safe_loss_scale"] > 1
    assert {row["kind"] for row in fp16["modules"]} >= {"forward", "backward", "weight", "gradient"}
    assert result["recommended"] == "fp16" and result["passed"] is True
    assert "The mismatch of trainer and engine was not measured" in (tmp_path / "run" / "report.html").read_text()


def test_a_model_that_cannot_be_packed_has_a_census_predicted_from_fp32(
    made: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = examined(made(convolving()), tmp_path)
    assert "mixes positions outside attention" in result["mismatch_not_measured"]
    fp16 = result["verdicts"]["fp16"]
    assert fp16["verdict"] == "ok" and any("predicted from FP32 magnitudes" in reason for reason in fp16["reasons"])
    assert result["census"]["fp16"]["predicted"] and result["census"]["fp16"]["largest_safe_loss_scale"] > 1
    assert result["census"]["fp32"]["predicted"] is None
    assert result["recommended"] is None and result["config"] == ""
    show_doctor(result)
    shown = capsys.readouterr().out
    assert "No precision is recommended: betterhalf cannot train this model." in shown and "Recommended:" not in shown
    assert "No precision is recommended" in (tmp_path / "run" / "report.html").read_text()


def test_a_model_whose_own_code_fails_is_refused_with_its_words(
    made: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise AttributeError("'NoneType' object has no attribute 'kernel'")

    monkeypatch.setattr(Lfm2Model, "forward", fails)
    with pytest.raises(InputError, match="its own code in transformers fails in FP32.*AttributeError: 'NoneType'"):
        examined(made(convolving()), tmp_path)


def test_a_recurrent_model_without_a_length_limit_has_a_census(made: Callable[..., str], tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=32, hidden_size=32, state_size=4, num_hidden_layers=2, use_cache=False)
    result = examined(made(config), tmp_path, doctor={"prompts": 1, "group_size": 1, "max_tokens": 2})
    assert result["mismatch_not_measured"] and result["census"]["fp16"]["predicted"]
    assert result["verdicts"]["fp16"]["verdict"] == "ok"
    assert {row["module"] for row in result["census"]["fp32"]["modules"]} >= {"backbone.layers.1.mixer.out_proj"}


def test_a_prediction_names_the_module_that_overflows(made: Callable[..., str], tmp_path: Path) -> None:
    def enlarge(module: Any) -> None:
        module.model.layers[1].feed_forward.w2.weight.mul_(1e9)

    result = examined(made(convolving(), enlarge), tmp_path)
    fp16, bf16 = (result["verdicts"][name] for name in ("fp16", "bf16"))
    assert fp16["verdict"] == "unsafe" and "does not fit into FP16" in fp16["reasons"][0]
    assert fp16["modules"][0] == "model.layers.1.feed_forward.w2"
    assert bf16["verdict"] == "ok" and result["islands"] is None and result["recommended"] is None


def test_a_residual_stream_that_overflows_is_fixed_by_the_norm_that_writes_it(
    made: Callable[..., str], tmp_path: Path
) -> None:
    def enlarge(module: Any) -> None:
        module.model.layers[1].post_feedforward_layernorm.weight.fill_(4e4)

    result = examined(made(four_norms(), enlarge), tmp_path, doctor={"prompts": 2, "group_size": 1, "max_tokens": 4})
    fp16 = result["verdicts"]["fp16"]
    assert fp16["verdict"] == "unsafe"
    assert result["islands"]["modules"] == ["model.layers.1.post_feedforward_layernorm"], result["islands"]["reason"]
    assert result["islands"]["cures"]
    assert result["verdicts"]["bf16"]["verdict"] != "unsafe"


def test_training_such_a_model_is_refused_before_its_weights_are_read(made: Callable[..., str]) -> None:
    with pytest.raises(InputError, match="mixes positions outside attention"):
        describe_model(ModelConfig(name=made(convolving())))


def test_a_plain_pass_gives_the_logprobs_and_gradients_of_the_trainer() -> None:
    """One sequence through both: a model that can be packed is run as if it could not."""
    with open_subject("demo", RunConfig.model_validate(SMALL)) as subject:
        prompts = subject.prompts(1)
        groups = [(one,) for one in greedy_completions(subject, prompts)]
        plain = replace(subject, model=replace(subject.model, unpackable="as a test"))
        batches = [census_batch(one, prompts, groups) for one in (subject, plain)]
        packed, alone = (reference(one, batch) for one, batch in zip((subject, plain), batches, strict=True))
    # The trainer sees the gradient of a tied head apart from the embedding's.
    gradients = [s for s in packed.sizes if s.kind in ("gradient", "weight") and s.module.startswith("model.layers")]
    assert gradients
    for spot in gradients:
        assert alone.sizes[spot].max_abs == pytest.approx(packed.sizes[spot].max_abs, rel=2e-4), str(spot)


def test_greedy_completions_are_the_most_likely_tokens_and_end_at_a_stop_token() -> None:
    with open_subject("demo", RunConfig.model_validate({**SMALL, "sampling": {"max_tokens": 8}})) as subject:
        prompts = subject.prompts(2)
        completions = greedy_completions(subject, prompts)
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = list(prompt.token_ids)
        for token_id in completion.token_ids:
            with torch.no_grad():
                logits = subject.model.module(torch.tensor([ids])).logits[0, -1]
            assert int(logits.argmax()) == token_id
            ids.append(token_id)
        assert len(completion.token_ids) <= min(MAX_TOKENS, 8)
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] in subject.model.stop_token_ids)


def test_an_engine_that_refuses_only_at_its_start_leaves_the_census(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> Any:
        raise InputError("the engine cannot load this model; set engine=vllm")

    monkeypatch.setattr(NativeEngine, "load_weights", refuses)
    result = examined("demo", tmp_path)
    assert result["mismatch_not_measured"] == "the engine cannot load this model; set engine=vllm"
    assert result["verdicts"]["fp16"]["verdict"] == "ok"
    assert doctor_module.doctor_json(result)["recommended"] == "fp16"
