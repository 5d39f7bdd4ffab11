"""A correct engine differs from the trainer by rounding only; each injected fault is named by operation and layer."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import pytest
import torch
from tests import tiny_families
from tests.tiny_models import SMALL, loaded_model, tiny_config, tiny_module
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from betterhalf import ops
from betterhalf.batches import PackedSegment
from betterhalf.config.schema import RunConfig
from betterhalf.errors import InputError
from betterhalf.examine.engine_trace import decoded_trace, whole_trace
from betterhalf.examine.localize import localize, localize_pair, require_traced
from betterhalf.examine.localize_text import show_localize
from betterhalf.examine.subject import Subject, engine_in, trainer_in
from betterhalf.examine.trainer_trace import trainer_trace
from betterhalf.models.attention import PackLayout
from betterhalf.models.loading import LoadedModel, load_model
from betterhalf.rollout.native import decoder as decoder_module
from betterhalf.rollout.native.decoder import OPERATIONS, Decoder
from betterhalf.rollout.native.engine import NativeEngine
from betterhalf.rollout.native.families import Activation
from betterhalf.rollout.native.kv_cache import KVCache
from betterhalf.rollout.native.rounding import Rounding, layer_roundings
from betterhalf.types import DtypeName, GenerateRequest

FAMILIES: dict[str, Any] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
}
"""Family -> changes to its configuration."""
PROMPT = 9
TOKENS = tuple((7 * i * i + 3 * i) % 13 for i in range(15))
"""Ids that every model here knows, the demo's vocabulary of 16 included."""

Fault = Callable[[Decoder], None]


@cache
def model(name: str) -> LoadedModel:
    if name == "demo":
        return load_model(RunConfig.model_validate({"model": {"name": "demo"}}).model)
    module = tiny_module(tiny_config(name, SMALL, **FAMILIES[name]), seed=4, biases=0.3, norms=0.3)
    return loaded_model(module, stop_token_ids=(1,))


def subject(name: str = "demo", loaded: LoadedModel | None = None, **sections: Any) -> Subject:
    config = RunConfig.model_validate(sections)
    return Subject(target=name, config=config, model=loaded or model(name), task=cast(Any, None))


@contextmanager
def decoder_of(examined: Subject, dtype: DtypeName) -> Iterator[Decoder]:
    with engine_in(examined, dtype) as engine:
        assert isinstance(engine, NativeEngine)
        yield engine.decoder


def found_with(fault: Fault, dtype: DtypeName, name: str = "demo") -> dict[str, Any]:
    """Return the result of `localize` for an engine with a fault that the trainer does not have."""
    examined = subject(name)
    with decoder_of(examined, dtype) as decoder, torch.no_grad():
        fault(decoder)
        found = localize_pair(trainer_in(examined, dtype), decoder, TOKENS, PROMPT, dtype=dtype)
    json.dumps(found, allow_nan=False)
    return found


def place(first: dict[str, Any] | None) -> tuple[int | None, str] | None:
    return None if first is None else (first["layer"], first["operation"])


def firsts(found: dict[str, Any]) -> dict[str, Any]:
    return {name: place(comparison["first"]) for name, comparison in found["comparisons"].items()}


NOWHERE = {"trainer_engine": None, "prefill_decode": None, "batch": None}


# -- without faults


@pytest.mark.parametrize("name", ["demo", *FAMILIES])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("mode", ["engine", "aligned", "exact"])
def test_a_correct_engine_differs_from_the_trainer_by_rounding_only(name: str, dtype: DtypeName, mode: str) -> None:
    found = localize(subject(name, engine={"rounding": mode}), TOKENS, PROMPT, dtype=dtype)
    assert found["first"] is None and firsts(found) == NOWHERE
    assert [row["layer"] for row in found["growth"]] == [0, 1, 2]
    assert len(found["operations"]) == 3 * 14 + 3
    assert found["dtype"] == dtype and found["rounding"] == mode
    json.dumps(found, allow_nan=False)
    if mode == "exact":
        assert all(one["first_unequal"] is None for one in found["comparisons"].values())
        assert all(row[name] == 0.0 for row in found["growth"] for name in NOWHERE)


def test_the_residual_streams_drift_apart_in_half_as_half_rounds() -> None:
    by_dtype = {dtype: localize(subject(), TOKENS, PROMPT, dtype=dtype)["growth"] for dtype in ("fp32", "fp16", "bf16")}
    last = {dtype: rows[-1]["trainer_engine"] for dtype, rows in by_dtype.items()}
    assert 0 < last["fp32"] < 1e-5
    assert 4 < last["bf16"] / last["fp16"] < 16
    assert last["fp16"] > by_dtype["fp16"][0]["trainer_engine"] > 2**-13


def test_the_native_engine_is_examined_whatever_is_configured() -> None:
    assert firsts(localize(subject(engine={"type": "vllm"}), TOKENS, PROMPT, dtype="fp16")) == NOWHERE


@pytest.mark.parametrize("island", ["model.layers.1", "model.layers.*.mlp", "model.layers.0.mlp.down_proj"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_fp32_islands_differ_by_rounding_only(island: str, dtype: DtypeName) -> None:
    found = localize(subject(precision={"fp32_modules": [island]}), TOKENS, PROMPT, dtype=dtype)
    assert firsts(found) == NOWHERE and len(found["growth"]) == 3


# -- faults of the engine


class Scaled(Rounding):
    """Rounding whose SwiGLU is 1% too large."""

    def swiglu(self, gate_up: Tensor, activation: Activation = "silu") -> Tensor:
        return super().swiglu(gate_up, activation) * 1.01


class Unscaled(Rounding):
    """Rounding whose residual sum halves the branch."""

    def add(self, residual: Tensor, branch: Tensor, scale: float = 1.0) -> Tensor:
        return super().add(residual, branch * 0.5, scale)


def with_rounding(kind: type[Rounding]) -> Fault:
    def fault(decoder: Decoder) -> None:
        old = decoder.rounding
        decoder.rounding = kind(mode=old.mode, format=old.format, container=old.container, kv_format=old.kv_format)
        decoder._layers = layer_roundings(decoder.rounding, decoder.islands)

    return fault


def scale(decoder: Decoder, name: str, factor: float, row: int | None = None) -> None:
    """Multiply a weight of the engine, or one row of it."""
    held = {key: tensor.clone() for key, tensor in decoder.weights.narrowed()}
    held[name][slice(None) if row is None else row] *= factor
    decoder.weights.load(held.items())


def rope_off(decoder: Decoder) -> None:
    decoder.inv_freqs[0] *= 1.01


def epsilon_off(decoder: Decoder) -> None:
    decoder.config = dataclasses.replace(decoder.config, rms_eps=1e-2)


def down_off(decoder: Decoder) -> None:
    scale(decoder, "model.layers.1.mlp.down_proj.weight", 1.02)


def one_query_row_off(decoder: Decoder) -> None:
    scale(decoder, "model.layers.2.self_attn.q_proj.weight", 1.3, row=5)


def embedding_row_off(decoder: Decoder) -> None:
    decoder.weights.embedding[TOKENS[6]] *= 1.02


def final_norm_off(decoder: Decoder) -> None:
    decoder.weights.norm[:] = 1.0


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (with_rounding(Scaled), (0, "swiglu")),
        (with_rounding(Unscaled), (0, "attention_residual")),
        (rope_off, (0, "rotated_queries")),
        (epsilon_off, (0, "attention_norm")),
        (down_off, (1, "down")),
        (one_query_row_off, (2, "queries")),
        (embedding_row_off, (None, "embedding")),
        (final_norm_off, (None, "final_norm")),
    ],
)
def test_a_fault_of_the_engine_is_named_by_operation_and_layer(
    dtype: DtypeName, fault: Fault, expected: tuple[int | None, str]
) -> None:
    found = found_with(fault, dtype)
    assert place(found["first"]) == expected
    assert firsts(found) == NOWHERE | {"trainer_engine": expected}


def test_one_wrong_row_of_the_embedding_is_found_at_its_token() -> None:
    first = found_with(embedding_row_off, "fp16")["first"]
    assert TOKENS[first["token"]] == TOKENS[6]
    assert first["difference"] == pytest.approx(0.02, abs=1e-3)
    assert first["bound"] < 1e-5


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_per_cent_in_any_operation_is_found(dtype: DtypeName, operation: str) -> None:
    expected = (None if operation in ("embedding", "final_norm") else 1, operation)

    def fault(decoder: Decoder) -> None:
        handed_on = decoder._tapped

        def faulty(name: str, layer: int | None, value: Tensor) -> Tensor:
            return handed_on(name, layer, value * 1.01 if (layer, name) == expected else value)

        decoder._tapped = faulty  # type: ignore[method-assign]

    assert place(found_with(fault, dtype)["first"]) == expected


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_wrong_attention_scale_is_named(dtype: DtypeName, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = decoder_module.prompt_attention

    def sharper(config: Any, rounding: Any, q: Tensor, *rest: Any) -> Tensor:
        return plain(config, rounding, q * 1.1, *rest)

    monkeypatch.setattr(decoder_module, "prompt_attention", sharper)
    found = found_with(lambda _: None, dtype)
    assert place(found["first"]) == (0, "attention")
    # Decoding has its own attention, which is correct, so the prompt pass differs from it too.
    assert firsts(found)["prefill_decode"] == (0, "attention")


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("model.layers.1.self_attn.k_norm.weight", (1, "rotated_keys")),
        ("model.layers.0.self_attn.q_norm.weight", (0, "rotated_queries")),
        ("lm_head.weight", (None, "logits")),
    ],
)
def test_faults_of_head_norms_and_of_an_untied_head_are_distinguished(
    weight: str, expected: tuple[int | None, str]
) -> None:
    def fault(decoder: Decoder) -> None:
        scale(decoder, weight, 1.02)

    assert place(found_with(fault, "fp16", "qwen3")["first"]) == expected


# -- the engine against itself


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_wrong_cache_entry_is_named_by_prefill_against_decode(
    dtype: DtypeName, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = KVCache.append

    def faulty(self: KVCache, layer: int, places: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
        plain(self, layer, places, keys, values * 1.05 if layer == 1 else values)

    monkeypatch.setattr(KVCache, "append", faulty)
    found = found_with(lambda _: None, dtype)
    assert firsts(found) == NOWHERE | {"prefill_decode": (1, "attention")}


def test_one_wrong_prompt_token_in_the_cache_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = KVCache.fill

    def faulty(self: KVCache, start: int, stop: int, prefix: Tensor) -> None:
        prefix = prefix.clone()
        prefix[0, 1, 3] *= 2
        plain(self, start, stop, prefix)

    monkeypatch.setattr(KVCache, "fill", faulty)
    found = found_with(lambda _: None, "fp16")
    assert firsts(found) == NOWHERE | {"prefill_decode": (0, "attention")}
    assert found["comparisons"]["prefill_decode"]["first"]["token"] >= PROMPT


def test_a_neighbours_cache_read_in_a_batch_is_named_by_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = KVCache.read

    def faulty(self: KVCache, slots: int, length: int) -> tuple[tuple[Tensor, Tensor], ...]:
        held = list(plain(self, slots, length))
        if slots > 1:
            keys, values = held[2]
            held[2] = keys, values.roll(self.values.shape[2], 0)
        return tuple(held)

    monkeypatch.setattr(KVCache, "read", faulty)
    found = found_with(lambda _: None, "fp16")
    assert firsts(found) == NOWHERE | {"batch": (2, "attention")}
    assert found["comparisons"]["batch"]["sizes"] == [1, 8]
    # Layers before the fault differ by rounding, the layer with the fault by far more.
    growth = [row["batch"] for row in found["growth"]]
    assert growth[1] < 1e-2 < growth[2]


# -- overflow


def test_an_overflow_is_reported_as_such_at_the_place_where_it_happens() -> None:
    loaded = model("demo")
    unsafe = dataclasses.replace(loaded, module=copy.deepcopy(loaded.module))
    with torch.no_grad():
        unsafe.module.model.layers[1].mlp.down_proj.weight *= 3e4
    found = localize(subject(loaded=unsafe), TOKENS, PROMPT, dtype="fp16")
    assert place(found["first"]) == (1, "down")
    assert found["first"]["not_finite"] == ["engine", "trainer"] and found["first"]["difference"] is None
    assert found["growth"][0]["trainer_engine"] is not None and found["growth"][1]["trainer_engine"] is None
    assert "NaN or infinity in engine and trainer" in printed(found)
    json.dumps(found, allow_nan=False)
    assert localize(subject(loaded=unsafe), TOKENS, PROMPT, dtype="fp32")["first"] is None


# -- recording changes nothing


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_recording_leaves_every_number_bitwise_equal(dtype: DtypeName) -> None:
    examined = subject()
    with decoder_of(examined, dtype) as decoder, torch.no_grad():
        decoder.reserve(len(TOKENS))
        plain = decoder.hidden_rows(torch.tensor(TOKENS), (len(TOKENS),))
        traced = whole_trace(decoder, TOKENS)
        assert torch.equal(traced["final_norm", None], plain)
        assert torch.equal(whole_trace(decoder, TOKENS, forced=traced)["final_norm", None], plain)
        assert decoder.tap is None
    trainer = trainer_in(examined, dtype)
    arguments = {
        "input_ids": torch.tensor([TOKENS]),
        "position_ids": torch.arange(len(TOKENS))[None],
        "layout": PackLayout((PackedSegment(length=len(TOKENS)),)),
        "use_cache": False,
    }
    with torch.no_grad():
        plain = trainer.module.get_decoder()(**arguments).last_hidden_state[0]
        attend, hooks = ALL_ATTENTION_FUNCTIONS[trainer.attention], hooks_of(trainer.module)
        assert torch.equal(trainer_trace(trainer, TOKENS)["final_norm", None], plain)
    assert ALL_ATTENTION_FUNCTIONS[trainer.attention] is attend
    assert hooks_of(trainer.module) == hooks


def hooks_of(module: torch.nn.Module) -> list[tuple[int, int]]:
    return [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()]


def test_a_decoded_trace_is_what_generation_computes() -> None:
    with engine_in(subject(sampling={"max_tokens": 12}), "fp16") as engine:
        assert isinstance(engine, NativeEngine)
        request = GenerateRequest(token_ids=TOKENS[:PROMPT], group_size=1, key=(0, 0, 0))
        ((completion,),) = engine.generate([request], RunConfig().sampling)
        tokens = (*request.token_ids, *completion.token_ids)
        hidden = decoded_trace(engine.decoder, tokens, PROMPT)["final_norm", None]
        with torch.no_grad():
            logits = engine.decoder.logits(hidden[:-1])
    logprobs = ops.token_logprobs(logits, torch.tensor(completion.token_ids[1:]), RunConfig().sampling.temperature)
    assert logprobs.tolist() == pytest.approx(completion.behavior_logprobs[1:], abs=1e-5)


# -- edges


@pytest.mark.parametrize("prompt_length", [0, len(TOKENS)])
def test_a_sequence_without_prompt_or_completion_is_refused(prompt_length: int) -> None:
    with pytest.raises(InputError, match="cannot be replayed"):
        localize(subject(), TOKENS, prompt_length, dtype="fp32")


def test_one_token_of_prompt_and_one_of_completion_are_enough() -> None:
    found = localize(subject(), TOKENS[:2], 1, dtype="fp16")
    assert firsts(found) == NOWHERE and found["tokens"] == 2


def test_a_long_completion_is_cut() -> None:
    found = localize(subject(), TOKENS * 6, PROMPT, dtype="fp16")
    assert (found["tokens"], found["prompt_length"]) == (PROMPT + 64, PROMPT)


# -- text


def printed(found: dict[str, Any]) -> str:
    stream = io.StringIO()
    show_localize(found, stream)
    return stream.getvalue()


def test_the_text_names_the_place_the_size_and_where_to_look() -> None:
    text = printed(found_with(down_off, "fp16"))
    assert "trainer and engine: FIRST DIFFERENCE in layer 1, down, at token" in text
    assert "check the down projection: down_proj's weight or bias not synced" in text
    # Some processors give a row of a batch the same bits as the row alone.
    assert re.search("decoding alone and in a batch: (differ by rounding alone|no difference)", text)


def test_the_text_shows_every_layer_of_a_small_model_and_the_last_of_a_large_one() -> None:
    found = found_with(lambda _: None, "fp32")
    assert "trainer and engine: differ by rounding alone" in printed(found)
    row = found["growth"][0]
    found["growth"] = [row | {"layer": layer} for layer in range(30)]
    shown = [line.split()[0] for line in printed(found).splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    assert shown[-1] == "29" and len(shown) <= 12


def test_other_layers_than_llamas_are_refused() -> None:
    require_traced(tiny_config("qwen3"))
    for name in ("gemma3_text", "olmo2", "phi3", "granite"):
        with pytest.raises(InputError, match=f"'{name}' has others; leave --localize out"):
            require_traced(tiny_families.family_config(tiny_families.FAMILIES[name]))
