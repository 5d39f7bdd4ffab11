"""The models in the package are small, transformers can read them, and they solve about 60% of their tasks."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from betterhalf.config.schema import ArithmeticTask, ModelConfig
from betterhalf.models import loading
from betterhalf.models.loading import LoadedModel, load_model
from betterhalf.tasks.arithmetic import (
    running_sum_digits,
    running_sum_question,
    running_sum_solution,
    solves_running_sum,
)
from betterhalf.tasks.build import build_task
from betterhalf.types import FinishReason

FOLDER = Path(loading.__file__).parent / "demo"
SMALL_FOLDER = FOLDER.with_name("demo_small")
SMALL_TASK = ArithmeticTask(terms=5)
SCRIPT = Path(__file__).parents[3] / "scripts" / "make_demo_model.py"
PROMPTS, SIBLINGS = 64, 8


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(ModelConfig(name="demo"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # The dataclass decorator looks up its module by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small() -> LoadedModel:
    return load_model(ModelConfig(name="demo-small"))


def rewards(demo: LoadedModel, *, sample: bool, siblings: int, problems: ArithmeticTask | None = None) -> Tensor:
    """Return rewards [prompts, siblings] of the first prompts, sampled by transformers with a fixed seed."""
    task = build_task(problems or ArithmeticTask(), demo.tokenizer)
    prompts = [task.prompt(index) for index in range(PROMPTS) for _ in range(siblings)]
    token_ids = torch.tensor([prompt.token_ids for prompt in prompts])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = demo.module.generate(
            token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=40, do_sample=sample
        )
    completions = out[:, token_ids.shape[1] :]
    stopped = (completions == demo.stop_token_ids[0]).any(1).tolist()
    reasons: list[FinishReason] = ["stop" if stop else "length" for stop in stopped]
    texts = demo.tokenizer.batch_decode(completions.tolist(), skip_special_tokens=True)
    return torch.tensor(task.rewards(prompts, texts, reasons)).view(PROMPTS, siblings)


@pytest.mark.parametrize(("folder", "most"), [(FOLDER, 2_000_000), (SMALL_FOLDER, 350_000)])
def test_the_files_are_small_and_complete(folder: Path, most: int) -> None:
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    expected = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert expected <= sizes.keys()
    assert sum(sizes.values()) < most


def test_the_small_one_has_84_thousand_weights_and_solves_60_percent(small: LoadedModel) -> None:
    """The expected rate is 0.88^4 = 0.60; with 512 completions its standard error is 0.022."""
    assert sum(weight.numel() for weight in small.module.parameters()) == 84_288
    assert small.context_length == 256
    assert 0.52 < rewards(small, sample=True, siblings=SIBLINGS, problems=SMALL_TASK).mean().item() < 0.68
    assert rewards(small, sample=False, siblings=1, problems=SMALL_TASK).mean().item() > 0.96


def test_it_has_half_a_million_weights_in_fp32(demo: LoadedModel) -> None:
    assert 500_000 * 0.9 < sum(weight.numel() for weight in demo.module.parameters()) < 2_000_000
    assert {weight.dtype for weight in demo.module.parameters()} == {torch.float32}


def test_the_end_mark_is_the_only_stop_token(demo: LoadedModel) -> None:
    assert demo.stop_token_ids == (demo.tokenizer.convert_tokens_to_ids("."),)


@pytest.mark.parametrize("text", ["2+7+9+1+5+5+4+9=", "7=09,9=18,1=19,5=24,5=29,4=33,9=42.", "0123456789", ""])
def test_the_tokenizer_round_trips_with_one_token_for_each_character(demo: LoadedModel, text: str) -> None:
    token_ids = demo.tokenizer.encode(text)
    assert len(token_ids) == len(text)
    assert demo.tokenizer.decode(token_ids, skip_special_tokens=True) == text


def test_characters_it_lacks_become_unknown_one_by_one(demo: LoadedModel) -> None:
    unknown = demo.tokenizer.unk_token_id
    one, nine = demo.tokenizer.convert_tokens_to_ids(["1", "9"])
    assert demo.tokenizer.encode("1 a\n9") == [one, unknown, unknown, unknown, nine]


def test_it_solves_60_percent_when_sampled_and_nearly_all_when_greedy(demo: LoadedModel) -> None:
    """The expected rate is 0.93^7 = 0.60; with 512 completions its standard error is 0.022."""
    assert 0.52 < rewards(demo, sample=True, siblings=SIBLINGS).mean().item() < 0.68
    assert rewards(demo, sample=False, siblings=1).mean().item() > 0.96


def test_groups_have_something_to_compare(demo: LoadedModel) -> None:
    """With 8 siblings solved at 60%, 98% of the groups have both right and wrong ones."""
    solved = rewards(demo, sample=True, siblings=SIBLINGS).mean(1)
    assert ((solved > 0) & (solved < 1)).float().mean().item() > 0.9


def test_the_script_trains_on_the_task_as_it_is_written(script: ModuleType, demo: LoadedModel) -> None:
    digits = torch.tensor([running_sum_digits(0, index, 8) for index in range(20)])
    totals = script.sample_totals(digits, 0.0, torch.Generator())
    texts = demo.tokenizer.batch_decode(script.encode(digits, totals).tolist(), skip_special_tokens=True)
    rows = [tuple(row) for row in digits.tolist()]
    assert texts == [running_sum_question(row) + running_sum_solution(row) for row in rows]


def test_slips_change_the_last_digit_of_a_total_and_are_carried_on(script: ModuleType) -> None:
    digits = torch.randint(1, 10, (4000, 8), generator=torch.Generator().manual_seed(0))
    totals = script.sample_totals(digits, 0.07, torch.Generator().manual_seed(1))
    before = torch.cat([digits[:, :1], totals[:, :-1]], 1)
    right = before + digits[:, 1:]
    slipped = totals != right
    assert torch.equal(totals // 10, right // 10)
    # 28,000 steps give 0.07 with a standard error of 0.0015.
    assert abs(slipped.float().mean().item() - 0.07) < 0.006


def test_the_script_makes_the_tokenizer_and_the_shape_in_the_package(
    script: ModuleType, demo: LoadedModel, small: LoadedModel, tmp_path: Path
) -> None:
    packaged = [recipe for recipe in script.RECIPES.values() if not recipe.experts]
    for folder, model, recipe in zip((FOLDER, SMALL_FOLDER), (demo, small), packaged, strict=True):
        script.make_tokenizer(recipe).save_pretrained(tmp_path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / name).read_text() == (folder / name).read_text()
        config = script.make_config(recipe)
        for key in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "initializer_range"):
            assert getattr(config, key) == getattr(model.hf_config, key)


@pytest.mark.parametrize("length", [20, 35, 50, 100, 200])
def test_a_block_makes_a_solution_longer_without_changing_what_the_reward_reads(
    script: ModuleType, small: LoadedModel, length: int
) -> None:
    recipe = replace(script.longer(script.RECIPES["demo-small"], length), slip_probability=0.0)
    token_ids, targets = script.sample_batch(recipe, torch.Generator().manual_seed(0))
    assert targets.shape == (32, length)
    completions = small.tokenizer.batch_decode(token_ids[:, recipe.prompt_length :].tolist())
    questions = small.tokenizer.batch_decode(token_ids[:, : recipe.prompt_length].tolist())
    for question, completion in zip(questions, completions, strict=True):
        digits = tuple(map(int, question.rstrip("=").split("+")))
        solution = running_sum_solution(digits)
        assert completion.endswith(solution) and solves_running_sum(completion, str(sum(digits)))
        assert re.fullmatch(r"([0-9]+,)?", completion.removesuffix(solution))
    # The solution and the comma always count, digits of the block one in ten: between 5% and 20% of 32 blocks.
    counted = (targets != script.IGNORED).float().mean().item() * length
    free = max(0, length - 21)
    assert (length > 20) + 20 + 0.05 * free <= counted <= (length > 20) + 20 + 0.2 * free


def test_the_first_half_of_the_training_is_without_a_block(script: ModuleType) -> None:
    recipe = script.longer(script.RECIPES["demo-small"], 50)
    assert (recipe.block_length, recipe.steps) == (30, 2000)
    assert [script.at_step(recipe, step).completion_length for step in (1, 1000, 1001, 2000)] == [20, 20, 50, 50]


def test_a_length_that_holds_no_solution_is_refused(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="a solution has 20 tokens; --length=19 is shorter"):
        script.longer(script.RECIPES["demo-small"], 19)


@pytest.mark.parametrize(("name", "length"), [("demo", 35), ("demo-small", 30)])
def test_a_recipe_gives_the_same_weights_twice(script: ModuleType, name: str, length: int) -> None:
    threads = torch.get_num_threads()
    recipe = replace(script.longer(script.RECIPES[name], length), steps=3)
    try:
        first, second = (script.train(recipe).state_dict() for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], second[name]) for name in first)
