"""Every family of docs/engines.md that is trained or sampled agrees with transformers in FP32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tests.family_matrix import (
    AGREES,
    committed,
    engine_k3,
    gradient_gaps,
    k3,
    mismatch,
    native_cell,
    trainer_cell,
    trainer_k3,
)
from tests.tiny_families import FAMILIES

from betterhalf.errors import InputError
from betterhalf.rollout.native.config import SUPPORTED_ARCHITECTURES

ROOT = Path(__file__).parents[2]

REFUSED = (
    *("llama, rope dynamic", "gemma4_text", "phi", "granite_swa", "nemotron", "stablelm"),
    *("diffllama", "doge", "minicpm3", "youtu", "hrm_text", "falcon", "bloom", "mpt", "gptj", "lfm2", "mamba2"),
    *("recurrent_gemma", "falcon_h1", "qwen3_next", "qwen3_5_text", "gpt_oss", "llama4_text", "deepseek_v3"),
)
"""Families that the trainer refuses."""

NATIVE = tuple(
    name for name, row in FAMILIES.items() if row.model_type in SUPPORTED_ARCHITECTURES and name not in REFUSED
)
"""Families that the native engine computes."""

NEW = tuple(
    name for name in NATIVE if FAMILIES[name].model_type not in ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
)
"""Those whose block differs from Llama's, without mixtures of experts, whose choices jump with a rounding."""


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_the_trainer_agrees_with_transformers_over_packed_sequences(name: str) -> None:
    assert trainer_k3(name) < AGREES


@pytest.mark.parametrize(
    "name",
    ["gemma2", "gemma3_text", "granite", "cohere2", "nanochat", "phi3, partial rope, longrope", "olmo3", "smollm3"],
)
def test_gradients_of_packed_sequences_equal_those_of_transformers(name: str) -> None:
    assert max(gradient_gaps(name).values()) < 1e-4


WITHOUT_RULE = {
    "gpt2": r"transformer\.h\.0\.attn\.c_attn \(Conv1D\)",
    "opt": r"embed_positions \(OPTLearnedPositionalEmbedding\)",
    "mixtral": r"layers\.0\.mlp\.experts \(MixtralExperts\)",
    "granitemoe": r"block_sparse_moe\.router \(GraniteMoeTopKRouter\)",
}
"""Families with a linear operation that no precision rule covers, and how the message names it."""


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_in_half_every_linear_operation_has_a_rule_or_the_family_is_refused_by_its_name(name: str) -> None:
    if name in WITHOUT_RULE:
        with pytest.raises(InputError, match=rf"precision rules of fp16 .*{WITHOUT_RULE[name]}.*precision=fp32"):
            trainer_k3(name, "fp16")
    else:
        assert 1e-7 < trainer_k3(name, "fp16") < 2e-4


@pytest.mark.parametrize("name", REFUSED)
def test_every_other_family_is_refused_before_its_weights_are_read(name: str) -> None:
    with pytest.raises(InputError, match=f"'{FAMILIES[name].model_type}' cannot be trained"):
        trainer_k3(name)


@pytest.mark.parametrize("name", NATIVE)
def test_the_native_engine_agrees_with_transformers_in_prompts_and_in_decoding(name: str) -> None:
    assert engine_k3(name) < AGREES


def k3_of(log_ratio: torch.Tensor) -> float:
    return k3(log_ratio, torch.zeros_like(log_ratio))


def gap(name: str, precision: str, rounding: str) -> float:
    return k3_of(mismatch(name, precision, rounding))


@pytest.mark.parametrize("name", NEW)
def test_the_engine_rounds_where_the_trainer_does_if_aligned(name: str) -> None:
    """Engine rounding differs as BF16 and FP16 do; aligned rounding leaves the order of sums alone."""
    fp16, bf16 = gap(name, "fp16", "engine"), gap(name, "bf16", "engine")
    assert 1e-8 < fp16 < 1e-4 and bf16 > 15 * fp16
    assert gap(name, "fp16", "aligned") < fp16 / 8
    assert gap(name, "bf16", "aligned") < bf16 / 30
    assert gap(name, "e8m3", "aligned") < bf16


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "e8m3"])
def test_exact_rounding_leaves_no_mismatch(name: str, precision: str) -> None:
    assert not mismatch(name, precision, "exact").any()


ISLANDS = ("model.layers.0.self_attn", "model.layers.1.post_attention_layernorm", "model.layers.2.mlp")


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_islands_of_blocks_with_four_norms_are_the_same_on_both_sides(name: str) -> None:
    without = k3_of(mismatch(name, "fp16", "engine"))
    assert k3_of(mismatch(name, "fp16", "aligned", fp32_modules=ISLANDS)) < without / 8
    assert not mismatch(name, "fp16", "exact", fp32_modules=ISLANDS).any()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")
def test_the_matrix_of_the_page_is_what_the_code_gives() -> None:
    """Write it again by `python -m tests.family_matrix`."""
    page = {name: cells[:2] for name, cells in committed().items()}
    code = {name: (trainer_cell(name), native_cell(name)) for name in FAMILIES}
    if f"transformers=={transformers.__version__}" not in (ROOT / "constraints.txt").read_text().splitlines():
        # The page gives the reasons of the pinned version; in another one a family may be refused for another reason.
        page, code = ({name: [cell[:2] for cell in cells] for name, cells in rows.items()} for rows in (page, code))
    assert page == code
