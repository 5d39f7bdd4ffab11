"""`evaluate` on several data sets, with votes and the deployment gap: its numbers follow from the rows it writes."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from betterhalf import cli
from betterhalf.config.schema import RunConfig
from betterhalf.run_dir import read_json, read_jsonl
from betterhalf.runs.evaluate import evaluate

Ends = Callable[..., str]

SETTINGS: dict[str, Any] = {
    "sampling": {"max_tokens": 40},
    "evaluate": {
        "samples": 4,
        "max_prompts": 10,
        "k": [1, 3, 4],
        "data": {"fresh": {"type": "arithmetic", "seed": 9}, "short": {"type": "arithmetic", "terms": 4}},
    },
    "logging": {"console": "quiet"},
}


def config_with(**changes: Any) -> RunConfig:
    """Return the settings with changes of `[evaluate]`; `sections` replaces other sections."""
    sections = changes.pop("sections", {})
    return RunConfig.model_validate(SETTINGS | sections | {"evaluate": SETTINGS["evaluate"] | changes})


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    return evaluate("demo", config_with(), str(folder)), folder


def majority(row: dict[str, Any], k: int) -> float:
    """Return maj@k of a prompt from its rows, by enumeration."""
    ballots = list(zip(row["answers"], row["rewards"], strict=True))
    total = 0.0
    for subset in combinations(ballots, k):
        counts = Counter(answer for answer, _ in subset if answer is not None)
        winners = [answer for answer, count in counts.items() if count == max(counts.values())]
        right = {answer for answer, reward in ballots if reward == 1}
        total += sum(answer in right for answer in winners) / len(winners) if winners else 0.0
    return total / len(list(combinations(ballots, k)))


def test_every_number_follows_from_the_rows(evaluated: tuple[dict[str, Any], Path]) -> None:
    answer, folder = evaluated
    rows = read_jsonl(folder / "evaluation.jsonl")
    assert [row["data"] for row in rows] == ["fresh"] * 10 + ["short"] * 10
    assert read_json(folder / "summary.json") == answer
    assert "avg@4" not in answer  # there is no number for several data sets
    for name, found in answer["data"].items():
        own = [row for row in rows if row["data"] == name]
        assert found["avg@4"] == pytest.approx(statistics.fmean(sum(row["rewards"]) / 4 for row in own), rel=1e-12)
        assert found["maj@1"] == pytest.approx(found["pass@1"], rel=1e-12)
        for k in (1, 3, 4):
            solved = [[reward == 1 for reward in row["rewards"]] for row in own]
            tries = [statistics.fmean(any(s) for s in combinations(each, k)) for each in solved]
            assert found[f"pass@{k}"] == pytest.approx(statistics.fmean(tries), rel=1e-12)
            assert found[f"maj@{k}"] == pytest.approx(statistics.fmean(majority(row, k) for row in own), rel=1e-12)
            low, high = found["intervals"][f"pass@{k}"]
            assert low <= found[f"pass@{k}"] <= high and low < high
        assert "pass@2" not in found
    assert answer["data"]["fresh"]["maj@4"] != answer["data"]["fresh"]["avg@4"] > 0.3


def test_the_draws_of_a_data_set_do_not_depend_on_the_others(
    evaluated: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    _, folder = evaluated
    alone = config_with(data={"short": SETTINGS["evaluate"]["data"]["short"]})
    answer = evaluate("demo", alone, str(tmp_path / "alone"))
    rows = [row for row in read_jsonl(folder / "evaluation.jsonl") if row["data"] == "short"]
    assert read_jsonl(tmp_path / "alone" / "evaluation.jsonl") == rows
    assert answer["avg@4"] == answer["data"]["short"]["avg@4"]


def test_the_sampling_of_evaluate_is_its_own(tmp_path: Path) -> None:
    given = {"temperature": 0.7, "top_p": 0.8, "top_k": 5, "min_p": 0.05, "max_tokens": 20}
    answer = evaluate("demo", config_with(**given, max_prompts=4), str(tmp_path / "run"))
    assert read_json(tmp_path / "run" / "config.json")["sampling"] == given
    # The sum of eight terms takes 35 tokens; a completion that is cut off has no answer.
    fresh = answer["data"]["fresh"]
    assert (fresh["truncated_fraction"], fresh["mean_length"], fresh["avg@4"], fresh["maj@4"]) == (1, 20, 0, 0)
    rows = read_jsonl(tmp_path / "run" / "evaluation.jsonl")
    assert all(row["answers"] == [None] * 4 for row in rows if row["data"] == "fresh")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_with_exact_rounding_there_is_no_deployment_gap(precision: str, tmp_path: Path) -> None:
    sections = {"engine": {"type": "native", "rounding": "exact"}, "precision": {"preset": precision}}
    found = evaluate("demo", config_with(deployment_gap=True, sections=sections), str(tmp_path / "run"))
    for each in found["data"].values():
        gap = each["deployment_gap"]
        assert (gap["gap"], gap["interval"], gap["ess_fraction"]) == (0.0, [0.0, 0.0], 1.0)
        assert gap["accuracy"] == gap["trainer_accuracy"] == pytest.approx(each["avg@4"], rel=1e-12)
        assert gap["reliable"]


def test_a_coarse_engine_has_a_gap_that_is_called_unreliable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("betterhalf.diagnostics.deployment_gap.RELIABLE_ESS", 0.95)  # the completions are short
    sections = {"precision": {"preset": "e8m2"}, "logging": {"console": "lines"}}
    data = {"fresh": SETTINGS["evaluate"]["data"]["fresh"]}
    found = evaluate("demo", config_with(deployment_gap=True, data=data, sections=sections), str(tmp_path / "run"))
    gap = found["deployment_gap"]
    assert 0.5 < gap["ess_fraction"] < 0.95 and not gap["reliable"]
    assert "fresh: the deployment gap is not reliable" in " ".join(capsys.readouterr().err.split())
    rows = read_jsonl(tmp_path / "run" / "evaluation.jsonl")
    assert all(len(row["log_ratios"]) == 4 for row in rows)
    assert gap["gap"] == pytest.approx(gap["trainer_accuracy"] - gap["accuracy"], abs=1e-12) and gap["gap"] != 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "the deployment gap is not reliable" in page and "effective sample" in page


def test_a_gap_of_truncated_samples_is_refused(ends: Ends, tmp_path: Path) -> None:
    few = ("evaluate", "demo", "evaluate.deployment_gap=true", f"run_dir={tmp_path / 'run'}")
    for override in ("evaluate.top_p=0.9", "sampling.top_k=3"):
        assert "needs samples from the whole distribution" in ends(2, *few, override)
    assert not (tmp_path / "run").exists()


def test_a_task_without_answers_has_no_votes_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("betterhalf.setup.evaluation.answer_extractor", lambda *arguments: None)
    data = {"short": SETTINGS["evaluate"]["data"]["short"]}
    shown = config_with(data=data, max_prompts=3, sections={"logging": {"console": "lines"}})
    answer = evaluate("demo", shown, str(tmp_path / "run"))
    assert not [name for name in answer if name.startswith("maj@")] and answer["pass@4"] >= answer["pass@1"]
    assert "short: no maj@k, because its task extracts no answers" in " ".join(capsys.readouterr().err.split())


def test_an_interrupted_evaluation_of_several_data_sets_continues_where_it_stopped(
    evaluated: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    whole = (evaluated[1] / "evaluation.jsonl").read_text()
    run = tmp_path / "run"
    evaluate("demo", config_with(), str(run))
    lines = whole.splitlines(keepends=True)
    (run / "evaluation.jsonl").write_text("".join(lines[:13]))
    (run / "summary.json").unlink()
    answer = evaluate("demo", config_with(), str(run), resume=True)
    assert (run / "evaluation.jsonl").read_text() == whole
    assert answer["data"] == evaluated[0]["data"]


def test_the_table_and_the_page_show_each_data_set(
    tmp_path: Path, evaluated: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    answer, folder = evaluated
    assert cli.main(["report", str(folder), f"run_dir={tmp_path / 'page'}"]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert "<h2>Evaluation</h2>" in page and "No step is recorded" not in page
    for name, found in answer["data"].items():
        low, high = found["intervals"]["maj@3"]
        assert f"<td>{found['maj@3']:.3f} [{low:.3f}, {high:.3f}]</td>" in page and name in page
    assert page.count('id="evaluation0-pass"') == page.count('id="evaluation0-maj"') == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("evaluate.k=1,9",), "holds 9, but pass@k and maj@k need k from 1 to evaluate.samples=8"),
        (("evaluate.data.x=math", "evaluate.data.x.template=none", "evaluate.data.x.path=gone.jsonl"), "gone.jsonl"),
        (("evaluate.data.x=math",), "evaluate.data.x.path is required"),
        (("--checkpoint", "best"), "demo is a model, not the folder of a run, and has no checkpoints"),
    ],
)
def test_bad_input_is_found_before_any_weights_are_loaded(
    settings: tuple[str, ...], message: str, ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("betterhalf.cluster.build.load_weights", lambda described: pytest.fail("too late"))
    run = tmp_path / "run"
    assert message in ends(2, "evaluate", "demo", *settings, f"run_dir={run}")
    assert not run.exists()
    if settings[0] != "--checkpoint":
        assert message in ends(
            2, "train", "experiments/smoke/demo.toml", "evaluate.every=1", *settings, f"run_dir={run}"
        )
        assert not run.exists()


def test_rows_that_cannot_be_used_are_named_by_the_key_of_their_data_set(ends: Ends, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"problem": "1+1=", "answer": "2"}\n{"problem": "' + "9" * 2000 + '=", "answer": "1"}\n')
    few = ("evaluate", "demo", f"evaluate.data.own.path={path}", "evaluate.data.own.type=math", "evaluate.samples=1")
    few = (*few, "evaluate.data.own.template=none", "sampling.max_tokens=8", f"run_dir={tmp_path / 'run'}")
    assert "evaluate.data.own.bad_rows=skip" in ends(2, *few)
    ends(0, *few, "evaluate.data.own.bad_rows=skip", "logging.console=quiet")
    assert read_json(tmp_path / "run" / "summary.json")["rows_left_out"] == 1


OWN_TASK = """
class Sums:
    def __init__(self, settings, tokenizer):
        self.first = settings["first"]

    def __len__(self):
        return 4

    def prompt(self, index):
        return {"problem": f"{self.first + index}+2+3+4+5+6+7+8=", "answer": str(self.first + index + 35)}

    def rewards(self, prompts, texts, finish_reasons):
        return [float(self.answer(text) == prompt.answer) for prompt, text in zip(prompts, texts)]

    def answer(self, text):
        return text.rstrip(".").rpartition("=")[2] or None
"""


def test_a_task_of_one_s_own_is_a_data_set_with_votes(ends: Ends, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN_TASK)
    own = ("evaluate.data.own=python", f"evaluate.data.own.task={file}:Sums", "evaluate.data.own.template=none")
    few = (*own, "evaluate.samples=4", "sampling.max_tokens=40", "logging.console=quiet", f"run_dir={tmp_path / 'run'}")
    ends(0, "evaluate", "demo", *few, "evaluate.data.own.settings.first=1")
    rows = read_jsonl(tmp_path / "run" / "evaluation.jsonl")
    assert [[float(answer == str(36 + index)) for answer in row["answers"]] for index, row in enumerate(rows)] == [
        row["rewards"] for row in rows
    ]
    found = read_json(tmp_path / "run" / "summary.json")
    assert found["maj@4"] == pytest.approx(statistics.fmean(majority(row, 4) for row in rows), rel=1e-12)
    assert 0 < found["avg@4"] < 1
