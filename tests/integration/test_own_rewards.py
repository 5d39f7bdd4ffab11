"""Training with rewards and tasks in files outside the repository, as docs/rewards.md describes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from betterhalf.run_dir import read_json, read_jsonl

Ends = Callable[..., str]

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "experiments" / "smoke" / "demo.toml")
PAGE = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
SMALL = (
    *("training.steps=2", "training.prompts_per_step=4", "training.group_size=4", "training.optimizer_steps=1"),
    *("sampling.max_tokens=40", "task.workers=1"),
)
QUIET = (*SMALL, "logging.console=quiet")

UNRELIABLE = """
import os, sys
import score

def unreliable(prompts, completions, metadata):
    print('{"verb": "not the result"}', flush=True)
    print("diagnosis", file=sys.stderr, flush=True)
    way = metadata[0]["way"]
    if way == "exit":
        os._exit(7)
    if way == "raise":
        raise ValueError("no good")
    if way == "nan":
        return [float("nan")] + [0.25] * (len(completions) - 1)
    return score.score(prompts, completions, metadata)
"""


def blocks(language: str) -> list[str]:
    """Return the code blocks of the page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the files of the page into the working directory, which is outside the repository."""
    for source in blocks("python"):
        (tmp_path / source.split("\n", 1)[0].removeprefix("# ")).write_text(source)
    with (tmp_path / "score.py").open("a") as file:
        file.write("\n\ndef brevity(prompt, completion, metadata):\n    return -len(completion)\n")
    (tmp_path / "sums.jsonl").write_text(blocks("json")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(folder: Path, ways: list[str]) -> str:
    rows = [{"problem": f"{index}+2+1+4+2+2+2+2=", "answer": index + 15, "way": way} for index, way in enumerate(ways)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return "task.path=rows.jsonl"


def test_the_page_s_command_trains_on_the_page_s_reward(folder: Path, ends: Ends) -> None:
    (command,) = blocks("sh")
    words = command.replace("\\\n", " ").replace("experiments/smoke/demo.toml", SMOKE).split()
    assert words[:2] == ["betterhalf", "train"]
    ends(0, *words[1:], *QUIET, "run_dir=run")
    rows = read_jsonl(folder / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        total = row["task/score/ends/mean"] + row["task/score/right/mean"]
        assert row["rollout/reward/mean"] == pytest.approx(total) and row["task/score/mean"] == pytest.approx(total)
        assert row["task/errors"] == 0
    assert any(row["rollout/reward/std"] > 0 for row in rows) and rows[-1]["policy/version"] > 0
    kept = read_jsonl(folder / "run" / "rollouts.jsonl")
    assert all(row["reward"] == pytest.approx(0.2 * row["completion"].endswith(".") + _right(row)) for row in kept)
    assert "Reward score/right" in (folder / "run" / "report.html").read_text()


def _right(row: dict[str, Any]) -> float:
    total = sum(map(int, re.findall(r"\d", row["prompt"])))
    return float(row["completion"].endswith(f"={total:02d}."))


@pytest.mark.parametrize("number", range(len(blocks("toml"))))
def test_every_experiment_of_the_page_runs(folder: Path, ends: Ends, number: int) -> None:
    text = blocks("toml")[number]
    if "[task]" not in text:  # an addition to another experiment
        text = blocks("toml")[0] + text
    (folder / "mine.toml").write_text(f'extends = "{SMOKE}"\n{text}')
    ends(0, "train", "mine.toml", *QUIET, "training.steps=1", "run_dir=run")
    row = read_jsonl(folder / "run" / "metrics.jsonl")[0]
    assert row.get("task/errors", 0) == 0
    if "brevity" in text:
        assert row["task/brief/mean"] == pytest.approx(-_mean_characters(folder), abs=2)
        assert row["rollout/reward/mean"] == pytest.approx(0.0, abs=0.2)  # standardised by group
    if "squares" in text:
        assert {each["prompt"] for each in read_jsonl(folder / "run" / "rollouts.jsonl")} <= {
            f"{index}*{index}=" for index in range(64)
        }


def test_a_failing_reward_warns_even_without_progress(folder: Path, ends: Ends) -> None:
    (folder / "fails.py").write_text("def score(prompt, completion, metadata):\n    raise ValueError('no such key')\n")
    task = ("task=python", "task.template=none", "task.path=sums.jsonl", "task.reward=fails.py:score")
    err = ends(0, "train", SMOKE, *task, "task.on_error=score", "training.steps=1", *QUIET, "run_dir=run")
    assert err.count("warning: the reward score failed for") == 1
    assert "ValueError: no such key" in err
    assert "step 1" not in err and read_jsonl(folder / "run" / "metrics.jsonl")[0]["task/errors"] > 0


def _mean_characters(folder: Path) -> float:
    """Return the mean number of characters, which for the demo model is that of its tokens."""
    return float(read_jsonl(folder / "run" / "metrics.jsonl")[0]["rollout/length/mean"])


def test_failures_are_counted_everywhere_and_output_stays_out_of_the_result(folder: Path) -> None:
    (folder / "unreliable.py").write_text(UNRELIABLE)
    path = write_rows(folder, ["fine", "exit", "raise", "nan"])
    command = [
        *(sys.executable, "-m", "betterhalf", "train", SMOKE, *SMALL, "logging.console=lines"),
        *("task=python", "task.template=none", path, "task.reward=unreliable:unreliable", "run_dir=run", "--json"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["verb"] == "train"
    assert "not the result" not in done.stdout and "diagnosis" not in done.stdout

    rows = read_jsonl(folder / "run" / "metrics.jsonl")
    for row in rows:  # each of the four prompts once in every step
        assert (row["task/crashes"], row["task/exceptions"], row["task/not_finite"]) == (4, 4, 1)
        assert row["task/errors"] == 9 and row["task/timeouts"] == 0
    summary = read_json(folder / "run" / "summary.json")["task"]
    assert summary["errors"] == 18 and summary["crashes"] == 8
    for words in ("with exit status 7", "ValueError: no good (", "a reward is nan", "shown this once"):
        assert done.stderr.count(words) == 1, words
    assert "\ndiagnosis\n" in done.stderr
    assert "Failed rewards" in (folder / "run" / "report.html").read_text()


def test_a_failure_stops_the_run_if_asked_and_the_run_resumes(folder: Path, ends: Ends) -> None:
    (folder / "unreliable.py").write_text(UNRELIABLE)
    path = write_rows(folder, ["fine", "fine", "raise", "fine"])
    words = ("train", SMOKE, *QUIET, "task=python", "task.template=none", path, "run_dir=run")
    reward = "task.reward=unreliable.py:unreliable"
    message = ends(3, *words, reward, "task.on_error=stop")
    assert "ValueError: no good" in message and "task.on_error=score" in message and "python/2" in message
    assert not (folder / "run" / "summary.json").exists()


def test_another_reward_is_refused_on_resume(folder: Path, ends: Ends) -> None:
    words = ("train", SMOKE, *QUIET, "task=python", "task.template=none", "task.path=sums.jsonl", "run_dir=run")
    reward = "task.reward=score.py:score"
    ends(0, *words, reward)
    (folder / "score.py").write_text((folder / "score.py").read_text().replace("0.2", "0.3"))
    message = ends(2, *words, reward, "--resume")
    assert "the reward differs (reward score: " in message and "task.allow_changed_data=true" in message
    ends(0, *words, reward, "task.allow_changed_data=true", "--resume")
    (folder / "sums.jsonl").write_text(blocks("json")[0].replace("42", "43"))
    assert "1 of 4 rows differ" in ends(2, *words, reward, "--resume")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["task.reward=scor.py:score"], ["scor.py does not exist. Did you mean score.py?"]),
        (["task.reward=score.py:scoer"], ["score.py has no attribute 'scoer'. Did you mean score?"]),
        (["task.reward=skore:score"], ["there is no module 'skore'. Did you mean score?"]),
        (["task.reward=score"], ["is not an import path. Write module:name or file.py:name"]),
        (
            ["task.reward=bad.py:reward"],
            ["signature reward(completions)", "Expected: def reward(prompts, completions,"],
        ),
        (["task.reward=broken.py:reward"], ["fails with SyntaxError"]),
        (["task.reward=score.py:score", "task.path=gone.jsonl"], ["no data file 'gone.jsonl'"]),
        (["task.reward=score.py:score", "task.path=bad.jsonl"], ["bad.jsonl, row 2", "the field `problem` is missing"]),
        (["task.reward=score.py:score", "task.template=chat"], ["no chat template"]),
        (["task.task=squares.py:Squares"], ["with settings {} fails with KeyError: 'largest'"]),
        (["task.task=squares.py:Square"], ["Did you mean Squares?"]),
        ([], ["has no reward. Set task.reward"]),
    ],
)
def test_bad_input_is_refused_before_the_run_with_the_fix(
    folder: Path, ends: Ends, settings: list[str], words: list[str]
) -> None:
    (folder / "bad.py").write_text("def reward(completions): return [1.0]\n")
    (folder / "broken.py").write_text("def reward(:\n")
    (folder / "bad.jsonl").write_text('{"problem": "1+1="}\n{"question": "1+1="}\n')
    base = ["task=python", "task.template=none"]
    base += [] if any("squares" in setting for setting in settings) else ["task.path=sums.jsonl"]
    message = ends(2, "train", SMOKE, *QUIET, *base, *settings, "run_dir=run")
    assert all(word in message for word in words), message
    assert not (folder / "run").exists()


def test_a_sanity_set_is_counted_with_the_user_s_reward(folder: Path, ends: Ends) -> None:
    (folder / "solved.py").write_text(
        "def solved(prompts, completions, metadata):\n    return [float(text.endswith('.')) for text in completions]\n"
    )
    ends(
        *(0, "evaluate", "demo", "task=python", "task.template=none", "task.path=sums.jsonl", "logging.console=quiet"),
        *("task.reward=solved.py:solved", "evaluate.samples=4", "sampling.max_tokens=40", "run_dir=run"),
    )
    assert [row["solved"] for row in read_jsonl(folder / "run" / "evaluation.jsonl")] == [4, 4, 4, 4]
