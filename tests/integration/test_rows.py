"""Unusable rows, changed rows, and an evaluation that fails midway: nothing is lost or mixed up."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from betterhalf.config.schema import PerfectibleTask, RunConfig
from betterhalf.errors import EngineError
from betterhalf.models import loading
from betterhalf.run_dir import RunDir, read_json, read_jsonl
from betterhalf.runs.perfect import build_perfectible
from betterhalf.setup import data
from betterhalf.tasks.rewards import TextGrader
from betterhalf.training.shards import read_manifest, write_file, write_manifest

Ends = Callable[..., str]

SUM_DIGITS = range(1, 10)
MATH = (
    *("task=math", "task.template=none", "sampling.max_tokens=16", "training.steps=2", "training.checkpoint_every=1"),
    "logging.console=lines",
)
LONG = {"problem": "1+" * 64 + "1=", "answer": "65"}


def sums(count: int) -> list[dict[str, Any]]:
    return [{"problem": f"{i % 9 + 1}+{i // 9 % 9 + 1}=", "answer": i % 9 + i // 9 % 9 + 2} for i in range(count)]


def data_file(folder: Path, rows: list[Any]) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"task.path={path}"


def steps_in(run: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(run / "metrics.jsonl")]


def prompts_of(run: Path) -> set[str]:
    return {row["prompt_id"] for row in read_jsonl(run / "rollouts.jsonl")}


# -- rows that cannot be used


def test_a_bad_row_beyond_the_first_thousands_is_found_before_the_first_step(train: Ends, tmp_path: Path) -> None:
    rows: list[Any] = sums(2100)
    rows[2089] = LONG
    data, run = data_file(tmp_path, rows), tmp_path / "run"
    message = train(2, *MATH, data)
    assert "data.jsonl, row 2090: its prompt of 130 tokens leaves no room" in message
    assert not run.exists()

    message = train(0, *MATH, data, "task.bad_rows=skip")
    assert "task.bad_rows=skip leaves out 1 of 2100 rows:" in message and message.count("row 2090") == 1
    assert [row["row"].rpartition(", ")[2] for row in read_jsonl(run / "bad_rows.jsonl")] == ["row 2090"]
    assert read_json(run / "summary.json")["rows_left_out"] == 1
    train(0, *MATH, data, "task.bad_rows=skip", "--resume")


def test_rows_that_a_run_refuses_when_it_resumes_can_be_left_out_then(train: Ends, tmp_path: Path) -> None:
    """Resume a run of an older version, which met the row in the middle of its training."""
    rows: list[Any] = sums(30)
    data = data_file(tmp_path, rows)
    train(0, *MATH, data)
    data_file(tmp_path, [*rows, LONG])
    assert "row 31" in train(2, *MATH, data, "--resume")
    train(0, *MATH, data, "task.bad_rows=skip", "--resume")


def test_a_sanity_test_leaves_bad_rows_out_of_its_set_and_resumes(
    ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(data, "show_note", lambda text, mode: shown.append(text))
    rows: list[Any] = [{"problem": "1+2+3+1+1+2+1+1=", "answer": total} for total in (12,) * 6]
    rows[1], rows[4] = LONG, {"problem": "\ud800", "answer": "1"}
    small = (
        *("training.steps=1", "training.prompts_per_step=2", "training.group_size=2", "training.optimizer_steps=1"),
        *("sanity.candidates=4", "sanity.samples=4", "sanity.evaluation_samples=2", "arms=fp16", "sanity.lower=0"),
        *("sanity.upper=1", "logging.console=quiet", "task=math", "task.template=none", "sampling.max_tokens=40"),
        data_file(tmp_path, rows),
    )
    sanity = ("sanity", *small, f"run_dir={tmp_path / 'run'}")
    assert "row 2: its prompt" in ends(2, *sanity)
    assert not (tmp_path / "run").exists()
    ends(1, *sanity, "task.bad_rows=skip", "sanity.pass_accuracy=1")
    assert len(shown) == 1 and "leaves out 2 of 6 rows" in shown[0]
    counted = read_jsonl(tmp_path / "run" / "perfectible.jsonl")[1:]
    assert [row["prompt_id"] for row in counted] == ["math/0", "math/2", "math/3", "math/5"]
    assert read_json(tmp_path / "run" / "summary.json")["rows_left_out"] == 2
    assert prompts_of(tmp_path / "run" / "arms" / "fp16") <= {"math/0", "math/2", "math/3", "math/5"}

    resume = (*sanity, "task.bad_rows=skip", "sanity.pass_accuracy=1", "--resume")
    ends(1, *resume)
    rows[3] = {"problem": "2+2=", "answer": "4"}
    data_file(tmp_path, rows)
    message = ends(2, *resume)
    assert "1 of 4 prompts" in message and "data.jsonl, row 4" in message and "task.allow_changed_data" in message


def test_a_sanity_test_on_a_ready_set_writes_what_it_leaves_out(tmp_path: Path) -> None:
    data_file(tmp_path, [*sums(2), LONG])
    task = {"type": "math", "path": str(tmp_path / "data.jsonl"), "template": "none", "bad_rows": "skip"}
    path, run = tmp_path / "perfectible.jsonl", RunDir.create(tmp_path / "run", resume=False)
    config = RunConfig.model_validate(
        {
            "task": {"type": "perfectible", "path": str(path), "base": task},
            "sampling": {"max_tokens": 16},
            "logging": {"console": "quiet"},
        }
    )
    assert isinstance(config.task, PerfectibleTask)
    counted = {"candidates": 3, "samples": 2, "lower": 0.2, "upper": 0.8, "seed": 0, "max_tokens": 16}
    made_by = {"model": "demo", "weights_digest": "", "temperature": 1.0, "engine_dtype": "fp32", "versions": {}}
    provenance = {**counted, **made_by, "task": config.task.base.model_dump()}
    rows = [{"index": i, "prompt_id": f"math/{i}", "solved": 1, "samples": 2} for i in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"provenance": provenance}, *rows)))
    build_perfectible(config, run)
    assert [row["row"].rpartition(", ")[2] for row in read_jsonl(run.bad_rows)] == ["row 3"]


def test_a_chat_template_that_raises_is_bad_input(train: Ends, ends: Ends, tmp_path: Path) -> None:
    model = shutil.copytree(Path(loading.__file__).parent / "demo", tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")
    data = data_file(tmp_path, sums(3))
    for message in (
        train(2, f"model={model}", "task=math", data),
        train(2, f"model={model}", "task.style=word_problem"),
        ends(2, "doctor", model, "task.style=word_problem"),
    ):
        assert "fails with TemplateError: System role not supported" in message
        assert "Correct the template (chat_template.jinja" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["doctor", "probe"])
def test_an_examination_looks_at_the_rows_it_uses(verb: str, ends: Ends, tmp_path: Path) -> None:
    rows = [*sums(2), LONG, *sums(2)]
    few = (f"{verb}.prompts=2", "task=math", "task.template=none", data_file(tmp_path, rows), "logging.console=quiet")
    ends(0, verb, "demo", *few, "probe.group_size=1", "sampling.max_tokens=8", f"run_dir={tmp_path / 'run'}")
    more = (*few[1:], f"{verb}.prompts=3", f"run_dir={tmp_path / 'other'}")
    assert "row 3: its prompt of 130 tokens" in ends(2, verb, "demo", *more)


# -- rows that have changed


def test_other_data_is_refused_on_resume_with_the_number_of_rows(train: Ends, tmp_path: Path) -> None:
    rows, run = sums(40), tmp_path / "run"
    data = data_file(tmp_path, rows)
    train(0, *MATH, data)
    shutil.rmtree(run / "checkpoints" / "step-000002")
    metrics = (run / "metrics.jsonl").read_bytes()
    changed = list(rows)
    changed[7], changed[30] = {"problem": "9+9+9=", "answer": 27}, {"problem": "1+1=", "answer": 3}
    data_file(tmp_path, [*changed, *sums(2)])
    message = train(2, *MATH, data, "--resume")
    assert "2 of 40 rows differ, the first is" in message and "data.jsonl, row 8" in message
    assert "there were 40 rows and there are now 42" in message and "task.allow_changed_data=true" in message
    assert (run / "metrics.jsonl").read_bytes() == metrics

    allowed = (*MATH, data, "--resume", "task.allow_changed_data=true")
    assert "2 of 40 rows differ" in train(0, *allowed)
    assert steps_in(run) == [1, 2]
    assert read_json(run / "config.json")["task"]["allow_changed_data"] is False  # it applies to one start
    train(0, *MATH, data, "--resume")  # the changed rows are now its data
    data_file(tmp_path, rows)
    assert "rows differ" in train(2, *MATH, data, "--resume")


def test_rows_in_another_order_are_other_data(train: Ends, tmp_path: Path) -> None:
    rows = sums(20)
    data = data_file(tmp_path, rows)
    train(0, *MATH, data)
    data_file(tmp_path, [rows[1], rows[0], *rows[2:]])
    assert "2 of 20 rows differ" in train(2, *MATH, data, "--resume")


def test_another_reward_is_refused_on_resume(train: Ends, tmp_path: Path) -> None:
    data = data_file(tmp_path, sums(20))
    train(0, *MATH, data)
    state = tmp_path / "run" / "checkpoints" / "step-000002" / "state.json"
    edited = read_json(state)
    edited["data"]["reward"]["code"] = "0123456789abcdef"
    rewrite_state(state, edited)
    message = train(2, *MATH, data, "--resume")
    assert re.search(r"the reward differs \(code: 0123456789abcdef -> [0-9a-f]{16}\)", message)
    assert "rows differ" not in message


def test_a_checkpoint_without_digests_goes_on_with_a_note(train: Ends, tmp_path: Path) -> None:
    data = data_file(tmp_path, sums(20))
    train(0, *MATH, data)
    state = tmp_path / "run" / "checkpoints" / "step-000002" / "state.json"
    edited = read_json(state)
    del edited["data"]
    rewrite_state(state, edited)
    assert "holds no digest of its data" in train(0, *MATH, data, "--resume")


def rewrite_state(path: Path, values: dict[str, Any]) -> None:
    """Replace a checkpoint's state, and its digest in the manifest."""
    others = [file for file in read_manifest(path.parent) if file.name != path.name]
    path.unlink()
    (path.parent / "manifest.json").unlink()
    state = write_file(path, iter([memoryview(json.dumps(values).encode())]))
    write_manifest(path.parent, (*others, state))


# -- evaluation


def test_an_evaluation_that_fails_midway_keeps_its_results_and_continues(
    ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    few = ("evaluate", "demo", "evaluate.samples=2", "evaluate.max_prompts=150", "logging.console=quiet")
    ends(0, *few, f"run_dir={whole}")
    rewards, calls = TextGrader.rewards, []

    def failing(self: TextGrader, *arguments: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise EngineError("the engine is gone")
        return rewards(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TextGrader, "rewards", failing)
        message = ends(3, *few, f"run_dir={run}")
    assert "the engine is gone. 128 of 150 prompts are evaluated, and kept in" in message and "--resume" in message
    assert len(read_jsonl(run / "evaluation.jsonl")) == 128 and not (run / "summary.json").exists()

    assert "--resume (train, sanity, evaluate, sweep)" in ends(2, *few, f"run_dir={run}")
    assert "started with another configuration" in ends(2, *few, "evaluate.samples=3", f"run_dir={run}", "--resume")
    ends(0, *few, f"run_dir={run}", "--resume")
    assert (run / "evaluation.jsonl").read_bytes() == (whole / "evaluation.jsonl").read_bytes()
    keys = ("prompts", "avg@2", "pass@1", "pass@2", "mean_length", "rows_left_out")
    found, expected = (read_json(folder / "summary.json") for folder in (run, whole))
    assert [found[key] for key in keys] == [expected[key] for key in keys]
    ends(0, *few, f"run_dir={run}", "--resume")


def test_an_evaluation_is_not_continued_on_other_data_or_in_another_kind_of_folder(
    ends: Ends, train: Ends, tmp_path: Path
) -> None:
    data = data_file(tmp_path, sums(4))
    few = ("evaluate", "demo", "evaluate.samples=1", *MATH[:3], data, f"run_dir={tmp_path / 'evaluation'}")
    ends(0, *few)
    data_file(tmp_path, [*sums(3), {"problem": "7+7=", "answer": 14}])
    assert "1 of 4 rows differ" in ends(2, *few, "--resume")
    train(0)
    assert "holds no evaluation" in ends(2, *few[:-1], f"run_dir={tmp_path / 'run'}", "--resume")


def test_an_engine_names_the_prompt_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from betterhalf.errors import InputError
    from betterhalf.runs.assembly import assemble
    from betterhalf.runs.collect import sample_groups
    from betterhalf.runs.stopwatch import Stopwatch
    from betterhalf.runs.weight_sync import first_sync
    from betterhalf.types import Prompt

    parts = assemble(RunConfig.model_validate({"task": {"type": "arithmetic", "num_prompts": 4}}))
    first_sync(parts)
    with torch.inference_mode(), pytest.raises(InputError, match="prompt math/2089 has 130 tokens"):
        long = Prompt(prompt_id="math/2089", text="", token_ids=(5,) * 130, answer="")
        clock = Stopwatch(torch.device("cpu"))
        sample_groups(parts, [parts.task.prompt(0), long], 2, step=1, policy_version=0, first_index=0, clock=clock)
    parts.close()
