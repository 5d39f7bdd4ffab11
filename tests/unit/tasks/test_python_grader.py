"""Rewards of one's own in worker processes: their forms, their metrics, and what is refused before a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.schema import PythonTask
from betterhalf.errors import ConfigError
from betterhalf.tasks.python_grader import PythonGrader
from betterhalf.types import FinishReason, Prompt

REWARDS = """
import asyncio, os, sys

def length(prompts, completions, metadata):
    return [float(len(text)) for text in completions]

def one(prompt, completion, metadata):
    return completion == metadata["answer"]

async def slow(prompts, completions, metadata):
    await asyncio.sleep(0.01)
    return [1.0] * len(completions)

async def one_slow(prompt, completion, metadata):
    await asyncio.sleep(0.3)
    return float(len(completion))

class Judge:
    def __call__(self, prompts, completions, metadata):
        return [{"form": 0.5, "right": float(text == row["answer"])} for text, row in zip(completions, metadata)]

judge = Judge()

def spoil(prompts, completions, metadata):
    metadata[0]["answer"] = "spoiled"
    prompts.clear()
    return [float(row["answer"] == "4") for row in metadata]

def seen(prompts, completions, metadata):
    assert prompts == ["2+2="] * len(completions), prompts
    row = metadata[0]
    assert row == {
        "prompt_id": "sum/1", "answer": "4", "finish_reason": "stop", "problem": "2+2", "level": 3, "tags": ["a", None],
    }, row
    assert metadata[1]["finish_reason"] == "length"
    return [1.0] * len(completions)

def modules(prompts, completions, metadata):
    heavy = {"torch", "transformers", "pydantic", "numpy"} & sys.modules.keys()
    assert not heavy, heavy
    return [1.0] * len(completions)

count = 0
def calls(prompts, completions, metadata):
    global count
    count += 1
    return [float(count)] * len(completions)

def reads_input(prompts, completions, metadata):
    return [float(len(sys.stdin.read()))] * len(completions)

wrong = lambda prompts: [1.0]
text = "no function"
"""

PROMPT = Prompt(
    prompt_id="sum/1",
    text="2+2=",
    token_ids=(1,),
    answer="4",
    metadata={"problem": "2+2", "level": 3, "tags": ["a", None]},
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(REWARDS)
    return path


class Graders:
    """Make graders of the functions in a file, and close them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.made: list[PythonGrader] = []

    def __call__(self, reward: str | dict[str, Any], **settings: Any) -> PythonGrader:
        named = {"reward": f"{self.file}:{reward}"} if isinstance(reward, str) else {"rewards": reward}
        task = PythonTask.model_validate({"path": "unused", "workers": 1, **named, **settings})
        self.made.append(PythonGrader(task))
        return self.made[-1]


@pytest.fixture
def grader(file: Path) -> Iterator[Graders]:
    made = Graders(file)
    yield made
    for each in made.made:
        each.close()


def graded(
    grader: PythonGrader, texts: list[str], finish_reasons: list[FinishReason] | None = None, prompt: Prompt = PROMPT
) -> list[float]:
    found = grader.rewards([prompt] * len(texts), texts, finish_reasons or ["stop"] * len(texts))
    assert grader.take_notes() == []
    return found


def test_a_batch_one_at_a_time_and_coroutines_give_the_same_forms(grader: Graders) -> None:
    assert graded(grader("length"), ["", "abc"]) == [0.0, 3.0]
    assert graded(grader("one", batched=False), ["4", "5"]) == [1.0, 0.0]
    assert graded(grader("slow"), ["a", "b"]) == [1.0, 1.0]
    assert graded(grader("one_slow", batched=False), ["a", "bb"]) == [1.0, 2.0]


def test_coroutines_of_one_group_wait_at_the_same_time(grader: Graders) -> None:
    """Ten waits of 0.3 s fit in a limit of 2.5 s only if they overlap."""
    assert graded(grader("one_slow", batched=False, time_limit=2.5), ["a"] * 10) == [1.0] * 10


def test_named_components_are_added_up_and_measured(grader: Graders) -> None:
    judge = grader("judge")
    assert graded(judge, ["4", "5", "6", "7"]) == [1.5, 0.5, 0.5, 0.5]
    metrics = judge.take_metrics()
    assert metrics["task/judge/mean"] == 0.75
    assert metrics["task/judge/std"] == pytest.approx(0.1875**0.5)
    assert metrics["task/judge/form/mean"] == 0.5 and metrics["task/judge/form/std"] == 0.0
    assert metrics["task/judge/right/mean"] == 0.25
    assert metrics["task/errors"] == 0.0
    assert "task/judge/mean" not in judge.take_metrics()  # nothing was graded since


def test_several_rewards_have_weights_and_are_measured_before_them(grader: Graders, file: Path) -> None:
    both = grader(
        {"long": {"function": f"{file}:length", "weight": 0.1}, "right": {"function": f"{file}:one", "batched": False}}
    )
    assert graded(both, ["4", "four"]) == pytest.approx([1.1, 0.4])
    metrics = both.take_metrics()
    assert metrics["task/long/mean"] == 2.5 and metrics["task/right/mean"] == 0.5


def test_rewards_are_normalised_by_group_then_scaled_and_clipped(grader: Graders) -> None:
    normal = grader("length", normalise="group", scale=10.0, clip=[-1.0, 20.0])
    other = Prompt(prompt_id="b", text="b", token_ids=(1,), answer="")
    found = normal.rewards([PROMPT, PROMPT, other, other], ["a", "bbb", "cc", "cc"], ["stop"] * 4)
    assert found == pytest.approx([-1.0, 10 / 2**0.5, 0.0, 0.0], rel=1e-6)


def test_two_groups_of_one_row_are_normalised_apart(grader: Graders) -> None:
    """The groups have equal prompts, but not the same object."""
    again = Prompt(
        prompt_id=PROMPT.prompt_id, text=PROMPT.text, token_ids=(1,), answer="4", metadata=dict(PROMPT.metadata)
    )
    assert again == PROMPT
    normal = grader("length", normalise="group")
    found = normal.rewards([PROMPT, PROMPT, again, again], ["a", "a", "bbb", "bbb"], ["stop"] * 4)
    assert found == [0.0] * 4


def test_a_function_gets_prompts_and_all_fields_of_the_row(grader: Graders) -> None:
    assert graded(grader("seen"), ["a", "b"], ["stop", "length"]) == [1.0, 1.0]


def test_what_a_function_does_to_its_arguments_stays_with_the_call(grader: Graders) -> None:
    spoil = grader("spoil")
    assert graded(spoil, ["a", "b"]) == [0.0, 1.0]
    assert graded(spoil, ["a", "b"]) == [0.0, 1.0]


def test_a_worker_imports_nothing_heavy_and_keeps_its_module(grader: Graders) -> None:
    assert graded(grader("modules"), ["a"]) == [1.0]
    calls = grader("calls")
    assert [graded(calls, ["a"]) for _ in range(3)] == [[1.0], [2.0], [3.0]]


def test_a_worker_has_no_input(grader: Graders) -> None:
    assert graded(grader("reads_input", time_limit=5.0), ["a"]) == [0.0]


def test_texts_of_any_kind_arrive_unchanged(grader: Graders, file: Path) -> None:
    file.write_text("def hashed(p, c, m): return [sum(map(ord, text)) % 9973 for text in c]")
    texts = ["", "\0\n", "\u00e9\U0001f600", "\ud800", "x" * 2_000_000]
    assert graded(grader("hashed"), texts) == [float(sum(map(ord, text)) % 9973) for text in texts]


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("lenght", "has no attribute 'lenght'. Did you mean length?"),
        ("wrong", "too many positional arguments. Expected: def wrong(prompts, completions, metadata): return"),
        ("text", "is str, which cannot be called. Expected: def text("),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_anything_is_sampled(
    grader: Graders, reward: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        grader(reward).check_golds(["4"])
    assert words in str(caught.value)
    assert "task.reward" in str(caught.value)


def test_a_reward_of_a_table_is_named_by_its_key(grader: Graders, file: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.rewards\.long\.function.* has no attribute 'lenght'"):
        grader({"long": {"function": f"{file}:lenght"}}).check_golds([])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_module", "fails with ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f(:", "SyntaxError"),
        ("import sys; print('bye'); sys.exit(4)", "fails with SystemExit: 4"),
        ("import os; print('bye', flush=True); os._exit(4)", "exit status 4. It printed: bye"),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused(grader: Graders, file: Path, source: str, words: str) -> None:
    file.write_text(source)
    with pytest.raises(ConfigError) as caught:
        grader("f").check_golds([])
    assert words in str(caught.value)


def test_nothing_is_imported_where_nothing_is_graded(grader: Graders) -> None:
    assert grader("lenght").check_golds(["1", "2"], will_grade=False) == [None, None]


def test_a_killed_run_takes_its_workers_along(file: Path) -> None:
    """SIGKILL leaves a run no chance to close its workers: they see the connection end."""
    script = f"""
import os, signal, subprocess, sys
from betterhalf.config.schema import PythonTask
from betterhalf.tasks.python_grader import PythonGrader
grader = PythonGrader(PythonTask(path="unused", reward={f"{file}:length"!r}, workers=1))
grader.check_golds([])
print(grader._pool._workers[0]._running.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    pid = json.loads(done.stdout)
    for _ in range(200):
        if not _lives(pid):
            return
        subprocess.run(["sleep", "0.05"], check=True)
    pytest.fail("the worker is still there")


def _lives(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
