"""Grading in processes that are killed when they take too long."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest

from betterhalf.errors import RewardError
from betterhalf.tasks.math_grader import MathGrader
from betterhalf.types import Prompt


def prompt(answer: str) -> Prompt:
    return Prompt(prompt_id=answer, text="", token_ids=(1,), answer=answer)


@pytest.fixture
def grader() -> Iterator[MathGrader]:
    grader = MathGrader("chat", seconds=1.0, workers=1)
    yield grader
    grader.close()


def test_answers_are_graded_in_their_order(grader: MathGrader) -> None:
    prompts = [prompt(r"\frac{1}{2}"), prompt("3"), prompt("3"), prompt(r"\sqrt{8}")]
    texts = [r"\boxed{0.5}", r"\boxed{4}", "3", r"\boxed{2\sqrt2}"]
    assert grader.rewards(prompts, texts, ["stop"] * 4) == [1.0, 0.0, 0.0, 1.0]
    assert grader.timeouts == 0


def test_a_stuck_worker_is_killed_counted_and_replaced(grader: MathGrader) -> None:
    """Power towers keep Python inside one integer multiplication, which no alarm interrupts."""
    started = time.perf_counter()
    texts = [r"\boxed{10^{10^{10}}}", r"\boxed{6/2}", r"\boxed{10^{10^{10}}}"]
    assert grader.rewards([prompt("3")] * 3, texts, ["stop"] * 3) == [0.0, 1.0, 0.0]
    assert grader.timeouts == 2  # both siblings that said so, though it was tried once
    assert time.perf_counter() - started < 30
    assert grader.rewards([prompt("3")], [r"\boxed{9/3}"], ["stop"]) == [1.0]


def test_a_worker_that_dies_costs_one_completion_and_is_counted() -> None:
    """The comparison replaces its own process by one that ends at once."""
    end_at_once = shutil.which("false")
    assert end_at_once is not None
    grader = MathGrader("chat", seconds=10.0, workers=1, equal=os.execl)
    try:
        assert grader.rewards([prompt(end_at_once)], [r"\boxed{1}"], ["stop"]) == [0.0]
        assert grader.timeouts == 1
    finally:
        grader.close()


def test_truncated_completions_start_no_worker(grader: MathGrader) -> None:
    assert grader.rewards([prompt("3")] * 2, [r"\boxed{3}", r"\boxed{6/2}"], ["length"] * 2) == [0.0, 0.0]
    assert running(grader) == []


def test_equal_text_starts_no_worker(grader: MathGrader) -> None:
    assert grader.rewards([prompt("x+1")], [r"\boxed{x + 1}"], ["stop"]) == [1.0]
    assert running(grader) == []


def test_closing_twice_is_harmless_and_grading_goes_on_after(grader: MathGrader) -> None:
    grader.close()
    grader.close()
    assert grader.rewards([prompt("3")], [r"\boxed{6/2}"], ["stop"]) == [1.0]


def test_an_answer_that_cannot_be_read_scores_nothing_and_is_counted(grader: MathGrader) -> None:
    texts = [r"\boxed{+\times}", r"\boxed{+\times}", r"\boxed{4}", "3"]
    assert grader.rewards([prompt("3")] * 4, texts, ["stop"] * 4) == [0.0] * 4
    assert (grader.unparsed_answers, grader.timeouts) == (2, 0)


COMPARISONS = """
import pickle, sys
from betterhalf.tasks.math_equal import UnparsedAnswerError

def bare_type_error(gold, candidate):
    return len(3)

def missing_package(gold, candidate):
    import no_such_package

def leaves(gold, candidate):
    sys.exit("bye")

def always_no(gold, candidate):
    return False

def no_verdict(gold, candidate):
    return None

def too_much(gold, candidate):
    raise MemoryError

def unreadable(gold, candidate):
    raise UnparsedAnswerError(candidate)
"""


@pytest.fixture
def comparing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], MathGrader]]:
    """Make a grader with one of COMPARISONS, from a module that workers can import."""
    (tmp_path / "comparisons_for_a_test.py").write_text(COMPARISONS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    made: list[MathGrader] = []

    def make(name: str) -> MathGrader:
        equal = getattr(import_module("comparisons_for_a_test"), name)
        made.append(MathGrader("chat", seconds=10.0, workers=1, equal=equal))
        return made[-1]

    yield make
    for grader in made:
        grader.close()
    sys.modules.pop("comparisons_for_a_test", None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bare_type_error", r"failed in a worker: TypeError: object of type 'int' has no len\(\)"),
        ("missing_package", "failed in a worker: ModuleNotFoundError: No module named 'no_such_package'"),
        ("leaves", "failed in a worker: SystemExit: bye"),
        ("no_verdict", "returned None for '3' and '4'; make it return True or False"),
    ],
)
def test_a_comparison_that_fails_is_an_error(comparing: Callable[[str], MathGrader], name: str, words: str) -> None:
    with pytest.raises(RewardError, match=words):
        comparing(name).rewards([prompt("3")], [r"\boxed{4}"], ["stop"])


def test_a_comparison_may_run_out_of_memory_or_find_no_answer(comparing: Callable[[str], MathGrader]) -> None:
    for name, counts in (("too_much", (1, 0)), ("unreadable", (0, 1))):
        grader = comparing(name)
        assert grader.rewards([prompt("3")], [r"\boxed{4}"], ["stop"]) == [0.0]
        assert (grader.timeouts, grader.unparsed_answers) == counts


def test_a_comparison_that_no_worker_can_import_is_an_error() -> None:
    grader = MathGrader("chat", seconds=10.0, workers=1, equal=lambda gold, candidate: True)
    try:
        with pytest.raises(RewardError, match="no attribute .*<lambda>.*name a function that can be imported"):
            grader.rewards([prompt("3")], [r"\boxed{4}"], ["stop"])
    finally:
        grader.close()


def test_workers_that_miss_a_package_are_an_error_that_names_it(
    grader: MathGrader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "math_verify.py").write_text("import a_package_that_is_missing", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError) as caught:
        grader.rewards([prompt("3")], [r"\boxed{6/2}"], ["stop"])
    error = "ModuleNotFoundError: No module named 'a_package_that_is_missing'"
    assert str(caught.value) == f"the grader's workers cannot start ({error}); install the package that is missing"


def test_workers_that_cannot_start_are_found_before_an_answer_needs_one(
    grader: MathGrader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "math_verify.py").write_text("raise ValueError('broken')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match=r"\(ValueError: broken\); check that `import math_verify` works"):
        grader.check_golds(["5"])


def test_a_grader_that_says_no_to_equal_answers_is_found_before_the_run(comparing: Callable[[str], MathGrader]) -> None:
    for name, words in (
        ("always_no", "does not find 1/2 and 0.5 equal; install the versions"),
        ("too_much", "cannot compare 1/2 and 0.5 within 10 s .*; raise task.reward_seconds"),
        ("unreadable", "does not find 1/2 and 0.5 equal"),
        ("missing_package", "No module named 'no_such_package'; install what it needs$"),
        ("bare_type_error", "; fix the comparison$"),
    ):
        with pytest.raises(RewardError, match=words):
            comparing(name).check_golds(["5"])


SCRIPT = """
from betterhalf.tasks.math_grader import MathGrader
from betterhalf.types import Prompt

grader = MathGrader("chat", seconds=600.0, workers=2)
grader.check_golds(["3"])
print("ready", flush=True)
prompt = Prompt(prompt_id="0", text="", token_ids=(1,), answer="3")
print(grader.rewards([prompt] * 2, [r"\\boxed{6/2}", r"\\boxed{TEXT}"], ["stop"] * 2))
grader.close()
"""


def started(folder: Path, text: str) -> subprocess.Popen[str]:
    """Start a script that grades as it is, without a guard of its main module."""
    script = folder / "script.py"
    script.write_text(SCRIPT.replace("TEXT", text), encoding="utf-8")
    return subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)


def test_a_script_grades_without_a_guard_of_its_main_module(tmp_path: Path) -> None:
    assert started(tmp_path, "9/3").communicate(timeout=120)[0] == "ready\n[1.0, 1.0]\n"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_the_run_even_inside_one_multiplication(tmp_path: Path, number: int) -> None:
    """A multiplication of huge numbers holds Python's lock, so that no thread of the worker can end it."""
    with started(tmp_path, "10^{10^{10}}") as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        time.sleep(3.0)
        workers = children(run.pid)
        run.send_signal(number)
        run.wait(timeout=20)
    assert len(workers) == 3  # with the janitor
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(folder.name))
    return found


def running(grader: MathGrader) -> list[int]:
    """Return the ids of the worker processes."""
    return [worker._running.process.pid for worker in grader._pool._workers if worker._running is not None]


def test_an_idle_worker_that_is_killed_is_replaced(grader: MathGrader) -> None:
    assert grader.rewards([prompt("3")], [r"\boxed{6/2}"], ["stop"]) == [1.0]
    (worker,) = running(grader)
    os.kill(worker, signal.SIGKILL)
    time.sleep(0.5)
    assert grader.rewards([prompt("3")], [r"\boxed{9/3}"], ["stop"]) == [1.0]
    assert grader.timeouts == 0


def test_golds_are_checked_once_each_and_in_their_order(grader: MathGrader) -> None:
    golds = ["5", "#### 5", r"\frac{1}{0}", "5", "{", r"\frac{1}{0}", r"\log_2 8", "#### "]
    reasons = grader.check_golds(golds)
    assert [reason is None for reason in reasons] == [True, True, False, True, False, False, True, False]
    assert "divide by zero" in str(reasons[2])
    assert reasons[2] == reasons[5]


SIMPLE = ["5", r"\frac{17}{2}", r"\text{even}", "x^2 + 1"]


def test_simple_golds_start_no_worker_where_nothing_will_be_graded(grader: MathGrader) -> None:
    assert grader.check_golds(SIMPLE, will_grade=False) == [None] * 4
    assert running(grader) == []


def test_the_grader_is_tried_out_once_and_its_workers_stay(grader: MathGrader) -> None:
    assert grader.check_golds(SIMPLE) == [None] * 4
    workers = running(grader)
    assert len(workers) == 1
    assert grader.check_golds(SIMPLE) == [None] * 4
    assert running(grader) == workers


def test_a_gold_that_takes_too_long_is_named(grader: MathGrader) -> None:
    (reason,) = grader.check_golds([r"\frac{1}{10^{10^{10}}} + \log 2"])
    assert "takes more than 1 s" in str(reason)


def test_gold_fields_are_read_before_they_are_compared(grader: MathGrader) -> None:
    golds = ["6 / 2 = 3\n#### 3", "The answer is 3", "1e+22"]
    texts = [r"\boxed{3}", r"\boxed{3}", r"\boxed{10^{22}}"]
    assert grader.rewards([prompt(gold) for gold in golds], texts, ["stop"] * 3) == [1.0] * 3
