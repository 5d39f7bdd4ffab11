"""A stop token that is missing, that cannot be sampled, or that is wrong is reported early."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from betterhalf.config.schema import ModelConfig
from betterhalf.errors import ConfigError, InputError
from betterhalf.models import loading
from betterhalf.models.description import describe_model
from betterhalf.models.loading import load_model
from betterhalf.precision.device import choose_device
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.run_dir import read_json, read_jsonl

SMOKE = str(Path(__file__).parents[2] / "experiments" / "smoke" / "demo.toml")
ONE_STEP = ("training.steps=1", "training.prompts_per_step=2", "training.group_size=2", "training.optimizer_steps=1")
DEMO = Path(loading.__file__).parent / "demo"
CHAT = "{% for m in messages %}{{ m['content'] }}{{ '.' if m['role'] == 'assistant' else '=' }}{% endfor %}"

Ends = Callable[..., str]


def model_folder(folder: Path, **changes: dict[str, Any]) -> Path:
    """Copy the demo model; keyword arguments change `config`, `generation_config` and `tokenizer_config`."""
    shutil.copytree(DEMO, folder)
    for name, entries in changes.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return folder


def without_stop(folder: Path) -> Path:
    nothing = {"eos_token_id": None}
    return model_folder(folder, config=nothing, generation_config=nothing)


def test_a_model_without_a_stop_token_is_refused_with_the_ways_to_name_one(
    train: Ends, ends: Ends, tmp_path: Path
) -> None:
    model = without_stop(tmp_path / "model")
    for message in (train(2, f"model={model}"), ends(2, "evaluate", model, f"run_dir={tmp_path / 'evaluation'}")):
        assert "declares no stop token" in message and "eos_token_id in its generation_config.json" in message
        assert "model.stop_tokens" in message and "model.allow_no_stop_token=true" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_stop_token_that_only_transformers_assumes_is_none(train: Ends, tmp_path: Path) -> None:
    """A Llama configuration without the key has the end-of-sequence id 2, the digit 0 of the demo model."""
    model = without_stop(tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        entries = json.loads((model / name).read_text())
        del entries["eos_token_id"]
        (model / name).write_text(json.dumps(entries))
    assert AutoConfig.from_pretrained(model).eos_token_id == 2
    assert "declares no stop token" in train(2, f"model={model}")


def test_a_stop_token_named_in_the_configuration_gives_the_run_of_one_that_the_files_name(
    train: Ends, tmp_path: Path
) -> None:
    train(0)
    train(0, f"model={without_stop(tmp_path / 'model')}", "model.stop_tokens=.", f"run_dir={tmp_path / 'named'}")
    first, second = (read_jsonl(tmp_path / name / "rollouts.jsonl") for name in ("run", "named"))
    assert [row["token_ids"] for row in first] == [row["token_ids"] for row in second]


def test_completions_may_fill_the_limit_if_that_is_meant(train: Ends, tmp_path: Path) -> None:
    train(0, f"model={without_stop(tmp_path / 'model')}", "model.allow_no_stop_token=true", "sampling.max_tokens=9")
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["rollout/truncated_fraction"] == 1
    assert row["rollout/length/mean"] == 9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"generation_config": {"eos_token_id": 99}}, r"99 \(eos_token_id in generation_config.json\).* 16 tokens"),
        ({"generation_config": {"eos_token_id": [15, -1]}}, r"-1 \(eos_token_id in generation_config.json\)"),
        ({"config": {"eos_token_id": [15, 16]}}, r"16 \(eos_token_id in config.json\).* 16 tokens"),
        ({"tokenizer_config": {"eos_token": "</s>"}}, r"16 \(eos_token '</s>' in tokenizer_config.json\)"),
    ],
    ids=["generation", "negative", "list", "tokenizer"],
)
def test_a_stop_token_outside_the_vocabulary_is_refused_with_its_source(
    changes: dict[str, dict[str, Any]], words: str, train: Ends, tmp_path: Path
) -> None:
    model = model_folder(tmp_path / "model", **changes)
    assert re.search(words, train(2, f"model={model}"))
    train(0, f"model={model}", "model.stop_tokens=15")


def test_an_engine_refuses_a_stop_token_that_it_cannot_sample(small_config: Callable[..., Any]) -> None:
    config = small_config()
    precision = build_precision(config.precision, choose_device(config))
    with pytest.raises(InputError, match="stop token 16 is not in the model's vocabulary of 16 tokens"):
        build_engine(config, load_model(ModelConfig(name="demo")).hf_config, (15, 16), precision)


def test_stop_tokens_are_named_by_text_or_by_id() -> None:
    def ids(*tokens: str | int) -> tuple[int, ...]:
        return describe_model(ModelConfig(name="demo", stop_tokens=tokens)).stop_token_ids

    assert ids() == ids(".") == ids("15") == ids(15) == (15,)
    assert ids(15, ".", "=") == tuple(sorted({15, *ids("=")}))
    with pytest.raises(ConfigError, match=r"model.stop_tokens names '1\+2', which the tokenizer splits into 3 tokens"):
        ids("1+2")


# -- a template that ends turns with another token


def chat_model(folder: Path) -> Path:
    """Copy the demo model, whose completions end with ".", with a template that does so too, and another stop token."""
    model = model_folder(folder, config={"eos_token_id": 0}, generation_config={"eos_token_id": 0})
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 15, "content": "."})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (model / "chat_template.jinja").write_text(CHAT)
    return model


def test_a_template_that_ends_turns_with_an_undeclared_token_is_noted_at_load_and_when_it_is_sampled(
    betterhalf: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    model, run = chat_model(tmp_path / "model"), tmp_path / "run"
    words = ("train", SMOKE, *ONE_STEP, "logging.console=lines", f"model={model}", f"run_dir={run}")
    done = betterhalf(*words)
    assert done.returncode == 0, done.stderr
    assert "ends turns with '.', which is not one of its stop tokens ('<pad>')" in done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert "step 1: all 4 completions were cut off at sampling.max_tokens=" in said
    assert "of them hold '.', with which the chat template ends turns" in said
    assert "set model.stop_tokens=." in said
    assert read_json(run / "summary.json")["first_truncated_fraction"] == 1

    named = betterhalf(*words[:-1], "model.stop_tokens=.", f"run_dir={tmp_path / 'named'}")
    assert "stop_tokens" not in named.stderr and "cut off" not in named.stdout + named.stderr
    assert read_json(tmp_path / "named" / "summary.json")["first_truncated_fraction"] < 1


def test_an_evaluation_where_nothing_ends_says_so(
    betterhalf: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    few = ("evaluate.max_prompts=2", "evaluate.samples=2", f"run_dir={tmp_path / 'run'}")
    done = betterhalf("evaluate", "demo", "sampling.max_tokens=3", *few)
    assert done.returncode == 0, done.stderr
    assert "arithmetic: all completions were cut off at sampling.max_tokens=3" in done.stderr
