"""Messages, exit statuses and last line of the command line, with recorders in place of the work of the verbs."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from betterhalf import __version__, cli
from betterhalf.config.load import flat, load_config, resolved_json
from betterhalf.errors import ConfigError, EngineError

SRC = Path(__file__).parents[2] / "src"
SMOKE = str(SRC.parent / "experiments" / "smoke" / "demo.toml")

ARM = {"passed": True, "final_accuracy": 0.975, "mismatch_k3": 2e-8, "mismatch_max_abs": 0.01, "skipped_steps": 1}
SANITY = {
    "passed": True,
    "k3_ratio": 50.0,
    "arms": {"fp16": ARM | {"seconds": 80.0}, "bf16": ARM | {"passed": False, "seconds": 90.0}},
    "run_dir": "runs/x",
}

Calls = list[tuple[Any, ...]]


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """Replace the function of a verb by a recorder that returns, or raises, a given value."""

    def put(module: str, name: str, outcome: object) -> Calls:
        calls: Calls = []

        def recorder(*arguments: Any, **options: Any) -> object:
            calls.append((*arguments, *([options] if options else [])))
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        fake = types.ModuleType(module)
        setattr(fake, name, recorder)
        monkeypatch.setitem(sys.modules, module, fake)
        return calls

    return put


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_train_gets_the_configuration_the_folder_and_resume(replace: Callable[..., Calls]) -> None:
    calls = replace("betterhalf.runs.train", "train", {"steps": 12})
    assert cli.main(["train", "--resume", SMOKE, "precision=bf16", "run_dir=a/b", "--json", "seed=4"]) == 0
    assert calls == [(load_config(SMOKE, ["precision=bf16", "seed=4"]), "a/b", True)]


def test_sanity_runs_the_demo_from_any_folder(
    replace: Callable[..., Calls], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = replace("betterhalf.runs.sanity", "sanity", SANITY)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sanity", "arms=fp16"]) == 0
    config, run_dir, resume = calls[0]
    assert (config.name, config.sanity.arms, config.training.steps, run_dir, resume) == (
        "demo",
        ("fp16",),
        load_config("experiments/sanity/demo.toml").training.steps,
        None,
        False,
    )
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("fp16", "passed", "0.975", "2.00e-08", "runs/x/report.html"))


def test_sanity_prints_its_result_as_the_last_line(
    replace: Callable[..., Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    replace("betterhalf.runs.sanity", "sanity", SANITY | {"k3_ratio": math.nan})
    assert cli.main(["sanity", "--json"]) == 0
    assert last_line(capsys) == SANITY | {"k3_ratio": None}


def test_a_failed_verdict_exits_1(replace: Callable[..., Calls]) -> None:
    replace("betterhalf.runs.sanity", "sanity", SANITY | {"passed": False})
    assert cli.main(["sanity", "--json"]) == 1


EVALUATION: dict[str, Any] = {
    "precision": "fp16",
    "run_dir": "runs/x",
    "data": {"sums": {"prompts": 4, "avg@8": 0.5, "maj@2": 0.25, "intervals": {"avg@8": [0.4, 0.6]}}},
}


def test_evaluate_starts_from_the_configuration_of_a_run(
    replace: Callable[..., Calls], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = replace("betterhalf.runs.evaluate", "evaluate", EVALUATION)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text('{"seed": 9, "name": "mine"}')
    assert cli.main(["evaluate", str(tmp_path), "evaluate.samples=4"]) == 0
    target, config, *others = calls[0]
    assert (target, config.seed, config.name, config.evaluate.samples) == (str(tmp_path), 9, "mine", 4)
    assert others == [None, False, "latest"]
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("avg@8", "0.500 [0.400, 0.600]", "maj@2", "fp16", "runs/x/report.html"))


def test_evaluate_takes_a_model_folder_for_a_model(replace: Callable[..., Calls], tmp_path: Path) -> None:
    """A Hugging Face folder has another kind of config.json."""
    calls = replace("betterhalf.runs.evaluate", "evaluate", EVALUATION)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert cli.main(["evaluate", str(tmp_path), "run_dir=out", "--checkpoint", "best"]) == 0
    assert calls == [(str(tmp_path), load_config(None), "out", False, "best")]


def test_evaluating_a_sanity_run_names_its_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "arms" / "fp16").mkdir(parents=True)
    assert cli.main(["evaluate", str(tmp_path)]) == 2
    assert f"such as {tmp_path}/arms/fp16" in capsys.readouterr().err


def test_export_gets_run_and_directory(replace: Callable[..., Calls], capsys: pytest.CaptureFixture[str]) -> None:
    calls = replace("betterhalf.runs.export", "export", {"directory": "out", "loss": math.inf})
    assert cli.main(["export", "run", "out", "--json"]) == 0
    assert calls == [("run", "out", "latest", {"merge": False})]
    assert last_line(capsys) == {"directory": "out", "loss": None}


@pytest.mark.parametrize(
    ("words", "out"),
    [(["A"], "A/report.html"), (["A", "run_dir=C"], "C/report.html"), (["A", "B", "run_dir=C"], "C/report.html")],
)
def test_report_goes_to_the_run_or_to_run_dir(
    words: list[str], out: str, replace: Callable[..., Calls], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = replace("betterhalf.report.page", "write_report", Path("x"))
    monkeypatch.chdir(tmp_path)
    for name in "AB":
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
    assert cli.main(["report", *words]) == 0
    runs, path, figures = calls[0]
    assert [str(run.path) for run in runs] == [word for word in words if "=" not in word]
    assert str(path) == out
    assert figures is None


def test_config_prints_toml_and_the_difference_of_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", SMOKE, "seed=5"]) == 0
    assert "seed = 5\n" in capsys.readouterr().out
    twins = [str(SRC.parent / f"experiments/smoke/smollm2_{name}.toml") for name in ("fp16", "bf16")]
    assert cli.main(["config", *twins]) == 0
    assert capsys.readouterr().out.splitlines() == [
        'name: "smollm2_fp16" -> "smollm2_bf16"',
        'precision.preset: "fp16" -> "bf16"',
    ]
    assert cli.main(["config", *twins, "--json", "precision=fp32"]) == 0
    assert last_line(capsys) == {"differences": [{"key": "name", "left": "smollm2_fp16", "right": "smollm2_bf16"}]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian", "x"], "unknown verb 'trian'. Did you mean train?"),
        (
            ["zzz"],
            "The verbs are sanity, train, doctor, probe, evaluate, sweep, report, compare, config, plan, audit, "
            "export, new, completion.",
        ),
        (["frobnicate"], "unknown verb 'frobnicate'. The verbs are sanity,"),
        (["train", "experiments/laptop/formats.sweep.toml"], "Start it with `betterhalf sweep experiments/laptop/form"),
        (["--jsn"], "unknown option '--jsn'"),
        (["train", SMOKE, "--resum"], "unknown option '--resum'. Did you mean --resume?"),
        (["train", SMOKE, "--seed=3"], "Write a setting without dashes: seed=3."),
        (["doctor", "demo", "--resume"], "unknown option '--resume'"),
        (["train"], "train takes EXPERIMENT, but got nothing."),
        (["train", "a", "b"], "train takes EXPERIMENT, but got a b."),
        (["export", "a"], "export takes RUN DIR, but got a."),
        (["export", "a", "b", "seed=1"], "export takes no settings, but got seed=1."),
        (["train", SMOKE, "training.stpes=3"], "Did you mean 'training.steps'?"),
        (["train", "gone.toml"], "there is no experiment file 'gone.toml'"),
        (["report", "gone"], "gone is not a folder"),
    ],
)
def test_bad_input_exits_2_with_one_message(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert words in captured.err


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ConfigError("wrong. Fix it."), 2, "error: wrong. Fix it."),
        (EngineError("broken. Restart."), 3, "error: broken. Restart."),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/metrics.jsonl"),
            3,
            "the disk is full: /x/metrics.jsonl; earlier files are intact.",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 3, "Permission denied: /x."),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (KeyboardInterrupt("interrupted; see there"), 130, "error: interrupted; see there"),
    ],
)
def test_failures_exit_with_their_status_and_no_traceback(
    error: BaseException,
    status: int,
    words: str,
    replace: Callable[..., Calls],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("BETTERHALF_TRACEBACK", raising=False)
    replace("betterhalf.runs.train", "train", error)
    assert cli.main(["train", SMOKE, "--json"]) == status
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert json.loads(captured.out.splitlines()[-1])["exit_status"] == status


def test_a_traceback_can_be_asked_for(
    replace: Callable[..., Calls], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BETTERHALF_TRACEBACK", "1")
    replace("betterhalf.runs.train", "train", EngineError("broken"))
    assert cli.main(["train", SMOKE]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_an_unexpected_error_is_not_a_failed_verdict_and_keeps_its_traceback(
    replace: Callable[..., Calls], capsys: pytest.CaptureFixture[str]
) -> None:
    replace("betterhalf.runs.train", "train", ZeroDivisionError("division by zero"))
    assert cli.main(["train", SMOKE]) == 3
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "error: ZeroDivisionError: division by zero. Please report this" in error


def test_version_and_help_of_each_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], *([verb, "--help"] for verb in cli.VERBS)):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"betterhalf {__version__}\n" in shown
    assert "usage: betterhalf train EXPERIMENT [key=value ...] [run_dir=PATH] [--resume] [--json]" in shown


def test_a_reader_that_stops_early_is_not_an_error() -> None:
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    command = f"{sys.executable} -m betterhalf.cli config {SMOKE} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_config_refuses_an_algorithm_that_contradicts_itself(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("algorithm.correction.level=token", "algorithm.correction.ratio=proximal/behavior")
    assert cli.main(["config", SMOKE, *words, "algorithm.correction.treatment=truncate"]) == 2
    assert "truncates without an upper bound" in capsys.readouterr().err


def test_config_without_an_experiment_prints_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--json"]) == 0
    assert last_line(capsys) == json.loads(json.dumps(load_config(None).model_dump(mode="json")))


def test_config_prints_every_key_also_those_without_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config"]) == 0
    shown = tomllib.loads(capsys.readouterr().out)
    assert flat(shown).keys() >= {key for key, value in flat(resolved_json(load_config(None))).items() if value != []}
    assert shown["cluster"]["address"] == shown["cluster"]["trainer"]["threads"] == "none"


@pytest.mark.parametrize("words", [("export", "run", "folder"), ("config", SMOKE)])
def test_a_verb_without_a_run_folder_refuses_one(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "run_dir=x"]) == 2
    assert "writes no run folder" in capsys.readouterr().err


def test_a_run_folder_that_is_trained_with_resume_is_the_run_that_continues(
    replace: Callable[..., Calls], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(load_config(SMOKE).model_dump_json())
    precision = {"compute_dtype": "fp32", "rollout_dtype": "e8m2"}
    summary = {"verb": "train", "precision": precision, "run_dir": str(run)}
    calls = replace("betterhalf.runs.train", "train", summary)
    assert cli.main(["train", str(run), "--resume"]) == cli.main(["train", SMOKE, f"run_dir={run}", "--resume"]) == 0
    assert [(run_dir, resume) for _, run_dir, resume in calls] == [(str(run), True)] * 2
    assert "precision  fp32 trainer, e8m2 (emulated) engine\n" in capsys.readouterr().out


def test_a_word_too_many_is_told_how_a_setting_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", SMOKE, "training.steps", "3"]) == 2
    assert "Write a setting as key=value" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_not_called_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", str(tmp_path)]) == 2
    assert "is a folder without config.json" in capsys.readouterr().err
    assert cli.main(["config", str(tmp_path / "config.json")]) == 2
    assert "has lost its config.json" in capsys.readouterr().err


def test_swapped_letters_come_first_among_the_suggestions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", SMOKE, "algorithm=gpro"]) == 2
    assert "Did you mean grpo?" in capsys.readouterr().err
