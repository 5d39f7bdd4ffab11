"""What goes wrong ends with status 2 or 3, one message that names the cure, no traceback, and nothing lost."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from betterhalf import cli
from betterhalf.models import loading
from betterhalf.run_dir import read_json, read_jsonl
from betterhalf.tasks import math_grader
from betterhalf.tasks.rewards import TextGrader

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "experiments" / "smoke" / "demo.toml")
DEMO_MODEL = Path(loading.__file__).parent / "demo"
SMALL = (
    *("training.steps=1", "training.prompts_per_step=2", "training.group_size=2", "training.optimizer_steps=1"),
    "logging.console=quiet",
)
SMALL_SANITY = ("sanity", *SMALL, "sanity.candidates=6", "sanity.samples=4", "sanity.evaluation_samples=2", "arms=fp16")
MATH = ("task=math", "task.template=none")
HEAD = ["config.json", "contract.json", "environment.json"]

Ends = Callable[..., str]


@pytest.fixture
def ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ends:
    """Run a command in this process; check its status and that it says one thing, and return what it said."""
    monkeypatch.delenv("BETTERHALF_TRACEBACK", raising=False)

    def run(status: int, *arguments: str | Path) -> str:
        capsys.readouterr()
        found = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert found == status, err
        assert "Traceback" not in err
        if status in (2, 3):
            assert [number for number, line in enumerate(err.splitlines()) if line.startswith("error: ")] == [0]
            assert out == ""
        return err

    return run


@pytest.fixture
def train(ends: Ends, tmp_path: Path) -> Ends:
    """A short training run in `run`, or in the run_dir given last."""
    return lambda status, *more: ends(status, "train", DEMO, *SMALL, f"run_dir={tmp_path / 'run'}", *more)


def steps_in(run: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(run / "metrics.jsonl")]


def data_file(folder: Path, *lines: str) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return f"task.path={path}"


def spoiled_demo(folder: Path, spoil: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the demo model whose weights `spoil` has changed."""
    shutil.copytree(DEMO_MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


UP = "model.layers.0.mlp.up_proj.weight"
SUM = json.dumps({"problem": "2+7=", "answer": "9"})


# -- found beforehand: status 2, no folder left, and the corrected command works in the same place


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["model=dmo"], ["unknown model 'dmo'", "Did you mean 'demo'?"]),
        (["model=./nowhere"], ["no model folder './nowhere'", "A model is 'demo'"]),
        (["model=nobody/nothing"], ["'nobody/nothing' cannot be loaded", "HF_HUB_OFFLINE", "local folder"]),
        (["algorithm=gppo"], ['"gppo" is not one of grpo', "Did you mean"]),
        (["precision=fp61"], ["fp16, bf16, fp32. Did you mean fp16?"]),
        (["training.stpes=3"], ["unknown key 'training.stpes'. Did you mean 'training.steps'?"]),
        (["lr=1e-4"], ["unknown key 'lr'. Did you mean 'optimizer.learning_rate'?"]),
        (["sampling.max_tokens=120"], ["context of 128", "16 tokens", "Set sampling.max_tokens=112 or less"]),
        (["training.group_size=1"], ["training.group_size=1", "group_mean", "2 or more"]),
        (["algorithm=rloo", "training.group_size=1"], ["leave_one_out", "2 or more"]),
        (["sampling.top_p=0.9"], ["sampling.top_p=0.9 truncates", "set it to 1"]),
        (["device=cuda"], ["torch sees no GPU", "device=cpu"]),
        (["precision.rollout_dtype=bf16"], ["differ in precision", "precision.allow_difference=true"]),
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
        ([], ["is empty", "at least one row of `problem` and `answer`"]),
        ([SUM, "", "{'problem': 1}"], ["row 3, is not JSON", "one object with `problem` and `answer`"]),
        ([SUM, '"2+7="'], ["row 2, is a str", "must be an object"]),
        ([SUM, '{"problem": "2+7="}'], ["row 2: the field `answer` is missing", "this one has 'problem'"]),
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
    """transformers would fill missing weights with random numbers, and train on."""
    lacking = spoiled_demo(tmp_path / "lacking", lambda weights: weights.pop(UP))
    assert f"lacks weights of its architecture (1, '{UP}'" in train(2, f"model={lacking}")
    torn = shutil.copytree(DEMO_MODEL, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    assert "cannot be loaded" in (message := train(2, f"model={torn}")) and "restore its files" in message
    assert not (tmp_path / "run").exists()
    train(0, f"model={DEMO_MODEL}")
    message = train(2, f"model={tmp_path / 'run'}", f"run_dir={tmp_path / 'other'}")
    assert "is a run; turn it into a model with `betterhalf export" in message


def test_a_folder_that_holds_a_run_is_left_alone(train: Ends, tmp_path: Path) -> None:
    train(0)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "already holds a run. Continue it with --resume" in train(2)
    message = train(2, "--resume", "optimizer.learning_rate=0.5")
    assert "optimizer.learning_rate: 0.0001 -> 0.5" in message and "naming" in message
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("place", ["file", "file/below", "n" * 300])
def test_a_run_folder_that_cannot_be_made_is_named(place: str, train: Ends, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    message = train(2, f"run_dir={tmp_path / place}")
    assert f"{tmp_path / place} cannot be made" in message and "Choose another folder with run_dir=PATH" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_folders_made_on_the_way_are_removed_and_others_are_not(train: Ends, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    train(2, "model=dmo", f"run_dir={tmp_path / 'kept' / 'a' / 'b'}")
    train(2, "model=dmo", f"run_dir={tmp_path / 'kept'}")
    assert (tmp_path / "kept").is_dir() and not list((tmp_path / "kept").iterdir())


# -- sanity


def test_nothing_perfectible_counts_both_sides_and_keeps_the_count(ends: Ends, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sanity = (*SMALL_SANITY, f"run_dir={run}")
    message = ends(2, *sanity, "sanity.lower=0.99", "sanity.upper=1")
    assert "none of 6 prompts is perfectible: 0 too easy" in message and "6 too hard" in message
    assert "widen sanity.lower and sanity.upper (in the same run_dir, --resume keeps the counts)" in message
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
    model = spoiled_demo(tmp_path / "large", lambda weights: weights[UP].view(-1)[5].fill_(1e6))
    bounds = ("sanity.lower=0", "sanity.upper=1", "arms=fp16,bf16", f"run_dir={tmp_path / 'run'}")
    ends(1, *SMALL_SANITY, f"model={model}", *bounds)
    summary = read_json(tmp_path / "run" / "summary.json")
    assert UP in summary["reasons"]["fp16"]
    assert summary["arms"]["fp16"]["passed"] is False
    assert steps_in(tmp_path / "run" / "arms" / "bf16") == [1]


# -- numbers that are none


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6], ids=["NaN", "infinite", "beyond FP16"])
def test_a_weight_that_is_not_finite_stops_the_engine_by_name(value: float, train: Ends, tmp_path: Path) -> None:
    model = spoiled_demo(tmp_path / "spoiled", lambda weights: weights[UP].view(-1)[5].fill_(value))
    message = train(3, f"model={model}")
    assert "the engine's hidden states are not finite in fp16" in message
    assert f"the weight {UP} holds NaN or infinity" in message and "precision=bf16" in message
    assert not (tmp_path / "run").exists()
    train(*((0, f"model={model}", "precision=bf16") if value == 1e6 else (0,)))


def test_trainer_numbers_that_are_not_finite_are_told_from_the_engine_s(train: Ends, tmp_path: Path) -> None:
    model = spoiled_demo(tmp_path / "large", lambda weights: weights[UP].view(-1)[5].fill_(1e6))
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
        from betterhalf.rollout import sampler as module

        score = module.token_logprobs
        monkeypatch.setattr(module, "token_logprobs", lambda *a: score(*a) * math.nan)
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


def test_a_reward_that_takes_too_long_scores_nothing_and_is_counted(
    train: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(math_grader, "extract_answer", lambda *_: "10^{10^{10}}")
    train(0, *MATH, data_file(tmp_path, SUM), "task.reward_seconds=0.3", "task.reward_workers=1")
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["rollout/reward_timeouts"] == 4
    assert row["rollout/reward/mean"] == 0


# -- what a run has written


@pytest.fixture
def two_checkpoints(train: Ends, tmp_path: Path) -> Path:
    train(0, "training.steps=2", "training.checkpoint_every=1")
    return tmp_path / "run"


def test_a_corrupted_checkpoint_is_named_with_the_older_one(two_checkpoints: Path, train: Ends, ends: Ends) -> None:
    weights = two_checkpoints / "checkpoints" / "step-000002" / "model.safetensors"
    whole, rows = weights.read_bytes(), read_jsonl(two_checkpoints / "metrics.jsonl")
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    resume = ("training.steps=2", "training.checkpoint_every=1", "--resume")
    for message in (
        train(2, *resume),
        ends(2, "evaluate", two_checkpoints, f"run_dir={two_checkpoints.parent / 'evaluation'}"),
        ends(2, "export", two_checkpoints, two_checkpoints.parent / "exported"),
    ):
        assert "step-000002 is corrupted (model.safetensors); delete that folder to resume from step-000001" in message
    assert [path.name for path in two_checkpoints.parent.iterdir()] == ["run"]
    assert read_jsonl(two_checkpoints / "metrics.jsonl") == rows

    shutil.rmtree(weights.parent)
    train(0, *resume)
    assert weights.read_bytes() == whole


def test_files_that_were_tampered_with_are_named(two_checkpoints: Path, train: Ends, ends: Ends) -> None:
    resume = ("training.steps=2", "training.checkpoint_every=1", "--resume")
    metrics, config = two_checkpoints / "metrics.jsonl", two_checkpoints / "config.json"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(lines[0])
    message = train(2, *resume)
    assert "holds 1 of the 2 steps before the checkpoint; restore it, or delete" in message
    metrics.write_text("".join(["not JSON\n", *lines]))
    assert "line 1, is not a JSON object" in train(2, *resume)
    metrics.write_text("".join(lines))
    config.write_text(config.read_text()[:100])
    assert "config.json is not valid JSON" in train(2, *resume)
    config.write_text('{"trianing": {"steps": 2}}')
    for message in (train(2, *resume), ends(2, "evaluate", two_checkpoints)):
        assert "Did you mean 'training.steps'?" in message and "config.json" in message


def test_a_checkpoint_of_another_model_is_refused(train: Ends, tmp_path: Path) -> None:
    model = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    train(0, f"model={model}")
    _shrink(model)
    message = train(2, f"model={model}", "--resume")
    assert "holds another shape of parameter" in message and "made by another model" in message


def _shrink(model: Path) -> None:
    """Give the model's MLP half its width."""
    config = json.loads((model / "config.json").read_text())
    half = config["intermediate_size"] // 2
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": half}))
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        if "gate_proj" in name or "up_proj" in name:
            weights[name] = weight[:half].contiguous()
        if "down_proj" in name:
            weights[name] = weight[:, :half].contiguous()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


# -- the disk


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_does_not_fit_loses_nothing_and_the_run_goes_on(train: Ends, tmp_path: Path) -> None:
    with file_size_limit(2**20):
        message = train(3)
    assert "step-000001 cannot be written" in message and "free disk space, then continue with --resume" in message
    assert steps_in(tmp_path / "run") == [1]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    train(0, "--resume")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]


def test_metrics_that_do_not_fit_keep_the_rows_before(
    train: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from the second row of metrics on."""
    write, metrics = os.write, tmp_path / "run" / "metrics.jsonl"

    def full(fd: int, data: bytes) -> int:
        if b"optim/loss_scale" in data and metrics.stat().st_size:
            write(fd, data[:20])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    two = ("training.steps=2", "training.checkpoint_every=1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        message = train(3, *two)
    assert "disk is full" in message and "metrics.jsonl" in message and "--resume" in message
    assert steps_in(tmp_path / "run") == [1]
    first = metrics.read_bytes()
    train(0, *two, "--resume")
    assert steps_in(tmp_path / "run") == [1, 2]
    assert metrics.read_bytes().startswith(first)


def test_a_disk_that_is_really_full_says_so(tmp_path: Path) -> None:
    """Two steps on a file system of 8 MiB, which one checkpoint with its optimizer states nearly fills."""
    script = f"""
        mount -t tmpfs -o size=8m tmpfs {tmp_path} || exit 77
        {sys.executable} -m betterhalf.cli train {DEMO} {" ".join(SMALL)} training.steps=2 training.checkpoint_every=1 \
            run_dir={tmp_path}/run
        status=$?
        find {tmp_path}/run | sort
        wc -l < {tmp_path}/run/metrics.jsonl
        exit $status
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("needs a user namespace that may mount")
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "step-000002 cannot be written" in done.stderr and "--resume" in done.stderr
    assert f"{tmp_path}/run/checkpoints/step-000001/manifest.json" in done.stdout
    assert "step-000002" not in done.stdout
    assert done.stdout.split()[-1] == "2"


# -- the other verbs


def test_evaluate_and_export_of_a_run_without_a_checkpoint(train: Ends, ends: Ends, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextGrader, "rewards", lambda *_: [])
        train(3)
    for message in (
        ends(2, "evaluate", tmp_path / "run", f"run_dir={tmp_path / 'evaluation'}"),
        ends(2, "export", tmp_path / "run", tmp_path / "exported"),
    ):
        assert "has no checkpoint yet; let it reach one" in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_evaluate_of_an_unknown_model_leaves_nothing(ends: Ends, tmp_path: Path) -> None:
    run_dir = f"run_dir={tmp_path / 'evaluation'}"
    assert "Did you mean 'demo'?" in ends(2, "evaluate", "dmo", run_dir)
    assert "row 1, is not JSON" in ends(2, "evaluate", "demo", *MATH, data_file(tmp_path, "{"), run_dir)
    assert not (tmp_path / "evaluation").exists()
    ends(0, "evaluate", "demo", "evaluate.max_prompts=2", "evaluate.samples=1", "logging.console=quiet", run_dir)
    assert "already holds a run" in ends(2, "evaluate", "demo", run_dir)


def test_report_refuses_what_is_no_run(ends: Ends, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in (
        (tmp_path / "gone", "is not a folder"),
        (tmp_path / "empty", "is no run folder"),
        (DEMO_MODEL, "is no run folder"),
    ):
        assert words in ends(2, "report", folder, f"run_dir={tmp_path / 'page'}")
        assert words in ends(2, "export", folder, tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_report_and_export_leave_what_they_would_overwrite(train: Ends, ends: Ends, tmp_path: Path) -> None:
    train(0)
    run, taken, file = tmp_path / "run", tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    for path in (taken / "mine", file):
        path.write_text("mine")
    for target in (taken, file):
        assert "is not an empty folder; name a new one" in ends(2, "export", run, target)
    assert "cannot be made" in ends(2, "export", run, file / "below")
    assert "cannot be made" in ends(2, "report", run, f"run_dir={file / 'below'}")
    with file_size_limit(2**18):
        assert "free disk space, or name another folder" in ends(3, "export", run, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run", "taken"]
    assert [path.read_text() for path in (taken / "mine", file)] == ["mine", "mine"]
    ends(0, "export", run, tmp_path / "model")
