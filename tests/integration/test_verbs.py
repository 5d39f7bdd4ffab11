"""evaluate, export, report and config on a finished run: every number agrees with the files of the run."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from betterhalf import cli
from betterhalf.models.loading import load_model
from betterhalf.precision.formats import torch_dtype
from betterhalf.run_dir import read_json, read_jsonl

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "experiments" / "smoke" / "demo.toml")
SMALL = ("training.steps=2", "training.prompts_per_step=4", "training.group_size=4", "logging.console=quiet")
SAMPLES = ("evaluate.max_prompts=12", "evaluate.samples=4", "logging.console=quiet")

Verb = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finish a run in this precision; its learning rate is large enough to change the weights visibly."""
    folder: Path = tmp_path_factory.mktemp(request.param) / "run"
    settings = (*SMALL, f"precision={request.param}", "optimizer.learning_rate=1e-3", f"run_dir={folder}")
    assert cli.main(["train", DEMO, *settings]) == 0
    return folder


@pytest.fixture
def verb(capsys: pytest.CaptureFixture[str]) -> Verb:
    """Run a command with --json and return its last line, which must be JSON."""

    def call(*arguments: str | Path, status: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        found = cli.main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert found == status, err
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        return answer

    return call


def masters(run: Path) -> dict[str, torch.Tensor]:
    (newest,) = sorted((run / "checkpoints").iterdir())[-1:]
    return load_file(newest / "model.safetensors")


def precision_of(run: Path) -> str:
    name: str = read_json(run / "config.json")["precision"]["preset"]
    return name


def test_exported_weights_are_the_masters_rounded_once(run: Path, verb: Verb, tmp_path: Path) -> None:
    answer = verb("export", run, tmp_path / "model")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    trained = masters(run)
    dtype = torch_dtype(precision_of(run))  # type: ignore[arg-type]
    assert set(exported) == set(trained)
    for name, weight in exported.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, trained[name].to(dtype)), name
    assert answer["parameters"] == sum(weight.numel() for weight in trained.values())
    assert answer["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"], "no partial folder is left"


def test_the_run_has_learned_something_that_the_export_carries(run: Path) -> None:
    """Check that trained weights differ from the model's own, because the other tests rely on it."""
    from betterhalf.config.schema import ModelConfig

    start = dict(load_model(ModelConfig(name="demo")).module.named_parameters())
    assert all(not torch.equal(weight, start[name]) for name, weight in masters(run).items())


def test_transformers_gives_the_export_the_logprobs_that_the_engine_sampled_with(verb: Verb, tmp_path: Path) -> None:
    """Without learning, the exported policy is the one that sampled the kept rollouts."""
    verb("train", DEMO, *SMALL, "precision=fp32", "optimizer.learning_rate=0", f"run_dir={tmp_path / 'run'}")
    verb("export", tmp_path / "run", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    for sample in read_jsonl(tmp_path / "run" / "rollouts.jsonl"):
        prompt, taken = (tokenizer.encode(sample[part]) for part in ("prompt", "completion"))
        with torch.no_grad():
            logits = model(torch.tensor([prompt + taken])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(taken).unsqueeze(1)).squeeze(1)
        assert logprobs.tolist() == pytest.approx(sample["behavior_logprobs"], abs=1e-4)


def test_evaluation_agrees_with_its_rows(run: Path, verb: Verb, tmp_path: Path) -> None:
    answer = verb("evaluate", run, *SAMPLES, f"run_dir={tmp_path / 'evaluation'}")
    rows = read_jsonl(tmp_path / "evaluation" / "evaluation.jsonl")
    assert [row["prompt_id"] for row in rows] == [f"running_sum/{index}" for index in range(12)]
    assert answer["avg@4"] == pytest.approx(statistics.fmean(row["reward"] for row in rows), rel=1e-12)
    assert answer["avg@4"] == pytest.approx(sum(row["solved"] for row in rows) / 48, rel=1e-12)
    assert answer["pass@4"] == pytest.approx(statistics.fmean(row["solved"] > 0 for row in rows), rel=1e-12)
    missed_twice = statistics.fmean(math.comb(4 - row["solved"], 2) / math.comb(4, 2) for row in rows)
    assert answer["pass@2"] == pytest.approx(1 - missed_twice, rel=1e-12)
    assert answer["pass@1"] == answer["avg@4"]
    assert 0 < answer["avg@4"] < 1
    assert answer["mean_length"] == sum(row["tokens"] for row in rows) / 48
    assert read_json(tmp_path / "evaluation" / "summary.json") == answer
    assert read_json(tmp_path / "evaluation" / "contract.json")["ok"] is True


def test_a_run_and_its_export_evaluate_alike_and_unlike_the_base_model(run: Path, verb: Verb, tmp_path: Path) -> None:
    """Draws depend on seed and prompt alone, so equal weights give equal counts for every prompt."""
    verb("export", run, tmp_path / "model")
    settings = (*SAMPLES, f"precision={precision_of(run)}", "sampling.max_tokens=48")
    rows = {}
    for name, target in (("run", run), ("export", tmp_path / "model"), ("base", "demo")):
        verb("evaluate", target, *settings, f"run_dir={tmp_path / name}")
        rows[name] = read_jsonl(tmp_path / name / "evaluation.jsonl")
    assert rows["run"] == rows["export"]
    assert rows["run"] != rows["base"]


def test_evaluating_takes_the_run_s_own_settings_and_the_ones_given(run: Path, verb: Verb, tmp_path: Path) -> None:
    verb("evaluate", run, *SAMPLES, "evaluate.temperature=0.5", f"run_dir={tmp_path / 'e'}")
    config = read_json(tmp_path / "e" / "config.json")
    assert config["precision"]["preset"] == precision_of(run)
    assert config["sampling"] == {**read_json(run / "config.json")["sampling"], "temperature": 0.5}


def test_a_finished_run_resumes_to_itself_from_its_own_folder(run: Path, verb: Verb) -> None:
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    rows = read_jsonl(run / "metrics.jsonl")
    answer = verb("train", run, f"run_dir={run}", "--resume")
    assert read_jsonl(run / "metrics.jsonl") == rows
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before
    assert answer["mismatch_k3"] == pytest.approx(statistics.fmean(row["mismatch/k3/mean"] for row in rows))
    assert answer["last_reward"] == pytest.approx(statistics.fmean(row["rollout/reward/mean"] for row in rows))


def test_the_report_of_two_runs_overlays_both(run: Path, verb: Verb, tmp_path: Path) -> None:
    other = tmp_path / "other"
    verb("train", DEMO, *SMALL, "seed=1", f"run_dir={other}")
    answer = verb("report", run, other, f"run_dir={tmp_path / 'both'}")
    page = Path(answer["report"])
    assert page == tmp_path / "both" / "report.html"
    text = page.read_text()
    assert "<title>run, other - betterhalf report</title>" in text
    assert "Settings that differ" in text and "optimizer.learning_rate" in text
    for folder in (run, other):
        assert f"last {read_jsonl(folder / 'metrics.jsonl')[-1]['rollout/reward/mean']:.4g}" in text
    assert "default-src 'none'" in text and not re.search(r"""(src|href)=["']?https?:""", text)


def test_config_shows_a_run_as_it_was_and_how_two_differ(run: Path, verb: Verb) -> None:
    assert verb("config", run) == read_json(run / "config.json")
    changes = {row["key"]: (row["left"], row["right"]) for row in verb("config", DEMO, run)["differences"]}
    expected: dict[str, tuple[object, object]] = {
        "logging.console": ("auto", "quiet"),
        "optimizer.learning_rate": (2e-4, 1e-3),
        "training.group_size": (8, 4),
        "training.prompts_per_step": (16, 4),
        "training.steps": (12, 2),
    }
    if precision_of(run) != "fp16":
        expected["precision.preset"] = ("fp16", precision_of(run))
    assert changes == expected


def test_a_config_printed_as_toml_loads_back_the_same(
    run: Path, verb: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["config", str(run)]) == 0
    (tmp_path / "again.toml").write_text(capsys.readouterr().out)
    assert verb("config", tmp_path / "again.toml", run)["differences"] == []
