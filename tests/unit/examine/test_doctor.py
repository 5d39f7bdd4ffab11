"""Conclusions of the doctor from its measurements: islands for a place, and a configuration that loads."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from betterhalf.config.load import configuration_of, load_config
from betterhalf.config.schema import LoraConfig, RunConfig
from betterhalf.diagnostics.numerics import Census, Kind, ModuleRange, Spot
from betterhalf.diagnostics.verdict import Verdict
from betterhalf.examine.doctor import doctor_json
from betterhalf.examine.islands import Islands, _grown, _spots, islands_for
from betterhalf.examine.recommendation import config_text
from betterhalf.examine.subject import Subject, open_subject
from betterhalf.types import DtypeName

LAYER = "model.layers.3"


@pytest.fixture(scope="module")
def subject() -> Subject:
    with open_subject("demo", RunConfig()) as opened:
        return opened


def census(dtype: DtypeName, safe: float | None = 2.0**20, scale: float = 2.0**18) -> Census:
    return Census(
        dtype=dtype,
        ranges=(),
        first_forward=None,
        first_backward=None,
        largest_safe_loss_scale=safe,
        loss_scale=scale,
        zeroed_fraction=0.0,
        zeroed_fraction_unscaled=0.0,
    )


def verdict(word: str, reason: str = 'because "x" # y') -> Verdict:
    return Verdict(verdict=word, reasons=(reason,), modules=())  # type: ignore[arg-type]


def loaded(text: str, tmp_path: Path) -> RunConfig:
    file = tmp_path / "recommended.toml"
    file.write_text(text, encoding="utf-8")
    return load_config(file)


@pytest.mark.parametrize(
    ("module", "kind", "islands"),
    [
        (f"{LAYER}.mlp.down_proj", "forward", [f"{LAYER}.mlp.down_proj", f"{LAYER}.mlp", LAYER]),
        (f"{LAYER}.mlp.down_proj", "input", [f"{LAYER}.mlp", LAYER]),
        (f"{LAYER}.mlp.up_proj", "backward", [f"{LAYER}.mlp", LAYER]),
        (f"{LAYER}.mlp.act_fn", "forward", [f"{LAYER}.mlp", LAYER]),
        (f"{LAYER}.self_attn.o_proj", "forward", [f"{LAYER}.self_attn.o_proj", f"{LAYER}.self_attn", LAYER]),
        (f"{LAYER}.self_attn.o_proj", "input", [f"{LAYER}.self_attn", LAYER]),
        (f"{LAYER}.self_attn.q_norm", "forward", [f"{LAYER}.self_attn", LAYER]),
        (f"{LAYER}.input_layernorm", "forward", [LAYER]),
        (LAYER, "forward", [LAYER]),
        (f"{LAYER}.mlp.down_proj", "weight", []),
        ("model.embed_tokens", "forward", []),
        ("lm_head", "gradient", []),
    ],
)
def test_a_place_is_covered_by_the_narrowest_island_that_helps(module: str, kind: Kind, islands: list[str]) -> None:
    assert list(islands_for(Spot(module=module, kind=kind))) == islands


@pytest.mark.parametrize(
    ("module", "kind", "islands"),
    [
        (LAYER, "forward", [f"{LAYER}.post_feedforward_layernorm", LAYER]),
        (f"{LAYER}.post_feedforward_layernorm", "forward", [f"{LAYER}.post_feedforward_layernorm", LAYER]),
        (f"{LAYER}.pre_feedforward_layernorm", "input", [f"{LAYER}.post_attention_layernorm", LAYER]),
        (f"{LAYER}.mlp.down_proj", "forward", [f"{LAYER}.mlp.down_proj", f"{LAYER}.mlp", LAYER]),
        (f"{LAYER}.post_feedforward_layernorm", "backward", [LAYER]),
    ],
)
def test_in_a_block_with_four_norms_the_norm_that_writes_to_the_stream_is_tried_first(
    module: str, kind: Kind, islands: list[str]
) -> None:
    assert list(islands_for(Spot(module=module, kind=kind), post_norms=True)) == islands


def test_only_the_first_place_of_an_overflowing_residual_stream_needs_an_island() -> None:
    """Stream of layers 1 to 3: 30000 has too little headroom, 70000 and 90000 overflow."""
    sizes = {"model.layers.1": 3e4, "model.layers.2": 7e4, "model.layers.3": 9e4}
    spots = {name: Spot(module=name, kind="forward") for name in sizes}
    rows = tuple(
        ModuleRange(
            spot=spots[name],
            max_abs=size,
            headroom_bits=math.log2(65504 / size),
            subnormal_fraction=0.0,
            zero_fraction=0.0,
            finite=size < 65504,
        )
        for name, size in sizes.items()
    )
    overflow = replace(census("fp16"), ranges=rows, first_forward=spots["model.layers.2"])
    assert _spots(overflow) == (spots["model.layers.1"],)
    assert _grown((), _spots(overflow), post_norms=True) == ("model.layers.1.post_feedforward_layernorm",)


def test_islands_grow_only_where_they_were_tried() -> None:
    gate, act = (Spot(module=f"{LAYER}.mlp.{name}", kind="forward") for name in ("gate_proj", "act_fn"))
    once = _grown((), (gate, act))
    assert once == (f"{LAYER}.mlp",)
    assert _grown(once, (act,)) == (LAYER,)
    assert _grown((LAYER,), (gate,)) == (LAYER,)
    assert _grown((), (Spot(module="model.embed_tokens", kind="forward"),)) == ()


def test_the_configuration_of_fp16_can_be_pasted(subject: Subject, tmp_path: Path) -> None:
    verdicts: dict[DtypeName, Verdict] = {"fp16": verdict("ok"), "bf16": verdict("watch")}
    text = config_text(subject, "fp16", verdicts, {"fp16": census("fp16")}, None)
    config = loaded(text, tmp_path)
    assert (config.model.name, config.precision.preset) == ("demo", "fp16")
    assert config.precision.loss_scale.initial == 2.0**18
    assert tomllib.loads(text).keys() == {"model", "precision"}
    settings = [line for line in text.splitlines() if "=" in line and not line.startswith("#")]
    assert settings and all("  # " in line for line in settings)


def test_islands_that_are_good_enough_are_in_the_configuration(subject: Subject, tmp_path: Path) -> None:
    island = f"{LAYER}.mlp.down_proj"
    islands = Islands(
        modules=(island,), cures=True, reason="", verdict=verdict("ok"), census=census("fp16", 2.0**10, 2.0**8)
    )
    broken = census("fp16", None, 1.0)
    text = config_text(subject, "fp16", {"fp16": verdict("unsafe", "it\noverflows")}, {"fp16": broken}, islands)
    config = loaded(text, tmp_path)
    assert config.precision.fp32_modules == (island,)
    assert config.precision.loss_scale.initial == 2.0**8
    assert "it overflows" in text


def test_other_formats_get_no_loss_scale(subject: Subject, tmp_path: Path) -> None:
    islands = Islands(
        modules=("model.layers.0",), cures=True, reason="", verdict=verdict("watch"), census=census("fp16")
    )
    verdicts: dict[DtypeName, Verdict] = {"fp16": verdict("unsafe"), "bf16": verdict("ok")}
    text = config_text(subject, "bf16", verdicts, {"bf16": census("bf16", 2.0**32, 1.0)}, islands)
    config = loaded(text, tmp_path)
    assert config.precision.preset == "bf16"
    assert config.precision.fp32_modules == ()
    assert "loss_scale" not in text


def test_adapters_are_in_the_configuration_as_they_were_examined(subject: Subject, tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, alpha=6, target_modules=("q_proj", "v_proj"), merge="adapter")
    adapted = replace(subject, config=subject.config.model_copy(update={"lora": lora}))
    text = config_text(adapted, "fp16", {"fp16": verdict("ok")}, {"fp16": census("fp16")}, None)
    assert loaded(text, tmp_path).lora == lora
    assert "[lora]" not in config_text(subject, "fp16", {"fp16": verdict("ok")}, {"fp16": census("fp16")}, None)


def test_an_adapter_to_start_from_says_the_rest_itself(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]}
        )
    )
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{layer}.lora_{part}.weight": torch.ones(3, 3) for part in "AB"}, tmp_path / "adapter_model.safetensors"
    )
    lora = configuration_of({"lora": {"adapter": str(tmp_path)}}).lora
    adapted = replace(subject, config=subject.config.model_copy(update={"lora": lora}))
    text = config_text(adapted, "fp16", {"fp16": verdict("ok")}, {"fp16": census("fp16")}, None)
    assert tomllib.loads(text)["lora"] == {"adapter": str(tmp_path)}
    assert loaded(text, tmp_path).lora == lora and lora.rank == 3


def test_before_a_recommendation_there_is_no_configuration(subject: Subject) -> None:
    assert config_text(subject, None, {}, {}, None) == ""


def test_json_has_only_the_promised_keys() -> None:
    result = {"verdicts": {}, "recommended": "fp16", "run_dir": "x", "census": {}, "passed": True}
    assert doctor_json(result) == {"verdicts": {}, "recommended": "fp16", "run_dir": "x"}
