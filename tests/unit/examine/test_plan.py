"""The plan of the demo and of described models: packing, notes, exit status, and the text for people."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tests.adapter_folders import peft_adapter
from tests.tiny_models import EXPERTS, tiny_config, tiny_model

import betterhalf
from betterhalf import cli
from betterhalf.config.load import configuration_of, load_config
from betterhalf.config.schema import RunConfig
from betterhalf.diagnostics.sizes import GIB, Machine, count
from betterhalf.errors import ConfigError, InputError
from betterhalf.examine.plan import plan, plan_model, this_machine
from betterhalf.examine.plan_text import show_plan
from betterhalf.models.description import describe_model
from betterhalf.models.estimated_tokens import EstimatedTokens
from betterhalf.models.weight_files import WholeReason
from betterhalf.training.pack import pack_step
from betterhalf.types import Completion, Prompt, Rollout

SMOKE = "experiments/smoke/demo.toml"
RANKS = {"cluster.backend": "ray", "cluster.trainers": 2, "cluster.engines": 2}
PROMPTS = [Prompt(prompt_id=str(place), text="", token_ids=(1,) * (3 + place), answer="") for place in range(4)]


def described(family: str = "llama", **changes: Any) -> RunConfig:
    return configuration_of({"training.prompts_per_step": 4, "training.optimizer_steps": 1, **changes})


def test_the_demo_is_planned_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", refuse)
    found = plan(configuration_of(load_config(SMOKE), {"device": "cpu", **RANKS}))
    assert found.sizes.parameters == 496_512 and found.fits
    assert [(process.kind, process.count) for process in found.memory.processes] == [("rank", 2), ("engine", 2)]
    json.dumps(found.to_json())


@pytest.mark.parametrize("task", [{}, {"task.style": "running_sum"}])
def test_a_folder_with_config_json_alone_is_planned_with_estimated_prompts(
    tmp_path: Path, task: dict[str, str]
) -> None:
    source = Path(betterhalf.__file__).parent / "models" / "demo" / "config.json"
    (tmp_path / "config.json").write_text(source.read_text())
    config = configuration_of(load_config(SMOKE), {"device": "cpu", **RANKS, **task})
    alone = plan(configuration_of(config, {"model.name": str(tmp_path)}))
    assert alone.sizes == plan(config).sizes
    assert [process.total_bytes for process in alone.memory.processes] != []
    assert "prompts count a token for every 3 bytes" in alone.notes[-1]
    with pytest.raises(InputError, match="holds no tokenizer"):
        describe_model(config.model.model_copy(update={"name": str(tmp_path)}))


def test_text_counts_a_token_for_every_three_bytes() -> None:
    tokens = EstimatedTokens()
    assert [len(tokens.encode(text)) for text in ("", "a", "abc", "abcd", "\u00e4\u00e4")] == [1, 1, 1, 2, 2]
    assert len(tokens.decode([0, 0])) == 6


def test_packing_is_that_of_the_training_by_hand() -> None:
    """Four prompts of 3 to 6 tokens with two completions of 8: a pack holds a prompt once, and 7 tokens of each."""
    config = described(**{"training.group_size": 2, "sampling.max_tokens": 8, "training.tokens_per_micro_batch": 40})
    found = plan_model(config, tiny_config(), PROMPTS, Machine(gpu=False, memory_bytes=None), "tiny")
    longest = found.packings[0]
    assert longest.tokens == 3 + 4 + 5 + 6 + 8 * 7
    assert (longest.packs, longest.passes, longest.balance) == (2, 2, 1.0)
    assert found.packings[1].completions == "all 4 tokens"


def test_the_context_bounds_the_completions() -> None:
    config = described(**{"sampling.max_tokens": 500})
    found = plan_model(config, tiny_config(), PROMPTS, Machine(gpu=False, memory_bytes=None), "tiny")
    assert found.packings[0].completions == "all 58 tokens"  # a context of 64, the longest prompt has 6


def test_experts_without_a_precision_rule_are_planned_with_a_note_that_only_fp32_trains_them() -> None:
    machine = Machine(gpu=True, memory_bytes=GIB)
    half, full = (
        plan_model(described(precision=dtype), tiny_config("mixtral"), PROMPTS, machine, "tiny")
        for dtype in ("fp16", "fp32")
    )
    assert "MixtralTopKRouter" in half.notes[0] and full.notes == ()


def test_experts_that_the_trainer_computes_are_counted_as_total_and_active() -> None:
    config = tiny_config("qwen3_moe", **EXPERTS)
    found = plan_model(described(precision="fp16"), config, PROMPTS, Machine(gpu=True, memory_bytes=GIB), "tiny")
    # Six of eight experts, each with three matrices of 32 x 32, rest in each of two layers.
    assert found.sizes.parameters - found.sizes.active_parameters == 2 * 6 * 3 * 32 * 32
    assert found.notes == ()


def test_a_run_that_does_not_fit_fails_the_verb_and_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    changes = [f"{key}={value}" for key, value in {**RANKS, "training.tokens_per_micro_batch": 1024}.items()]
    status = cli.main(["plan", SMOKE, *changes, "--gpu-gib", "0.695", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 1 and not result["fits"]
    assert "Set " in result["misfits"][0]


@pytest.mark.parametrize(
    ("memory", "message"),
    [("many", "takes a number"), *((number, "is not the memory of a GPU") for number in ("-1", "nan", "inf"))],
)
def test_a_wrong_memory_is_bad_input(memory: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", SMOKE, "--gpu-gib", memory]) == 2
    assert message in capsys.readouterr().err


def test_a_cpu_has_no_memory_of_a_gpu() -> None:
    with pytest.raises(ConfigError, match="contradicts --gpu-gib"):
        this_machine(configuration_of({"device": "cpu"}), 80.0)


def test_the_text_names_every_item_once_for_each_process() -> None:
    config = described(**RANKS, **{"cluster.trainer.gpus": 1, "cluster.engine.gpus": 1})
    found = plan_model(config, tiny_config(), PROMPTS, Machine(gpu=True, memory_bytes=80 * GIB), "tiny")
    stream = io.StringIO()
    show_plan(found, stream)
    text = stream.getvalue()
    for process in found.memory.processes:
        assert f"{process.kind}, each of 2" in text
        assert all(item.name in text for item in process.items)
    assert text.rstrip().endswith("fits")


def test_the_text_names_the_rank_of_adapters_and_what_is_trained() -> None:
    config = described(**{"lora.rank": 4})
    found = plan_model(config, tiny_config(), PROMPTS, Machine(gpu=False, memory_bytes=None), "tiny")
    stream = io.StringIO()
    show_plan(found, stream)
    assert f"layers, LoRA of rank 4 ({count(found.sizes.adapters)} trained); one process" in stream.getvalue()
    assert found.to_json()["lora_rank"] == 4
    show_plan(plan_model(described(), tiny_config(), PROMPTS, Machine(gpu=False, memory_bytes=None), "tiny"), stream)
    assert stream.getvalue().count("LoRA") == 1


@pytest.mark.parametrize(
    ("whole", "words"),
    [
        ("format", "convert them once to safetensors"),
        ("conversion", "save_pretrained(..., save_original_format=False)"),
        ("buffers", "No conversion changes that"),
    ],
)
def test_files_that_a_rank_loads_whole_are_noted_with_the_way_out(whole: WholeReason, words: str) -> None:
    machine = Machine(gpu=True, memory_bytes=80 * GIB)
    ranks, alone = described(**RANKS, **{"cluster.trainer.gpus": 1, "cluster.engine.gpus": 1}), described()
    (note,) = plan_model(ranks, tiny_config(), PROMPTS, machine, "tiny", whole=whole).notes
    assert "rank 0 holds all 0.0 GiB of FP32 weights" in note and words in note
    assert plan_model(ranks, tiny_config(), PROMPTS, machine, "tiny").notes == ()
    assert plan_model(alone, tiny_config(), PROMPTS, machine, "tiny", whole=whole).notes == (), "one process has all"


@pytest.mark.parametrize("from_folder", [False, True])
def test_the_optimizer_of_adapters_has_their_size(from_folder: bool, tmp_path: Path) -> None:
    """By hand: rank 3 on q (32 x 32) and v (32 to 16) of two layers is 3 x (64 + 48) x 2 = 672 parameters."""
    if from_folder:
        pytest.importorskip("peft", reason="needs PEFT; pip install betterhalf[lora]")
        peft_adapter(tiny_model(seed=0).module, tmp_path, r=3, target_modules=["q_proj", "v_proj"])
    of_a_file = {"lora.adapter": str(tmp_path)} if from_folder else {"lora.rank": 3}
    targets = {} if from_folder else {"lora.target_modules": ["q_proj", "v_proj"]}
    machine = Machine(gpu=False, memory_bytes=None)
    kl = {"algorithm.kl.coefficient": 0.1}
    found = plan_model(described(**of_a_file, **targets, **kl), tiny_config(), PROMPTS, machine, "tiny")
    sizes = {item.name: item.num_bytes for item in found.memory.processes[0].items}
    assert (found.lora_rank, found.sizes.adapters) == (3, 672)
    assert sizes["masters (FP32)"] == sizes["gradients (FP32)"] == 4 * 672
    assert sizes["AdamW states (FP32)"] == 8 * 672
    assert sizes["reference policy"] == 2 * 672
    full = plan_model(described(**kl), tiny_config(), PROMPTS, machine, "tiny")
    whole = {item.name: item.num_bytes for item in full.memory.processes[0].items}
    assert whole["AdamW states (FP32)"] == 8 * full.sizes.parameters > 20 * sizes["AdamW states (FP32)"]
    assert whole["reference policy"] == 2 * full.sizes.parameters


def test_planned_tokens_are_those_of_the_packs_that_training_makes() -> None:
    config = described(**{"training.group_size": 3, "sampling.max_tokens": 9, "training.tokens_per_micro_batch": 25})
    found = plan_model(config, tiny_config(), PROMPTS, Machine(gpu=False, memory_bytes=None), "tiny").packings[0]
    completion = Completion(token_ids=(2,) * 9, behavior_logprobs=(0.0,) * 9, finish_reason="stop", policy_version=0)
    rollouts = [
        Rollout(prompt=prompt, completion=completion, text="", reward=0.0) for prompt in PROMPTS for _ in range(3)
    ]
    batch = pack_step(rollouts, [1.0] * 12, config, step=1)
    assert found.packs == len(batch.packs) > 2
    assert found.tokens == sum(pack.num_tokens for pack in batch.packs)
    assert found.largest_pack == max(pack.num_tokens for pack in batch.packs)
    assert found.largest_loss == max(len(pack.target_ids_C) for pack in batch.packs)


def test_the_function_plans_as_the_verb_does(capsys: pytest.CaptureFixture[str]) -> None:
    found = betterhalf.plan(SMOKE, device="cpu", **RANKS)
    cli.main(["plan", SMOKE, "device=cpu", *(f"{key}={value}" for key, value in RANKS.items()), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(found.to_json()))
