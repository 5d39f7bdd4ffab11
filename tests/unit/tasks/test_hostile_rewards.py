"""Rewards that hang, fork, exit, print, raise and return nonsense: all counted, none ends a run, no process remains."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from betterhalf.config.schema import PythonTask
from betterhalf.errors import RewardError
from betterhalf.tasks.python_grader import PythonGrader
from betterhalf.types import Prompt

HOSTILE = Path(__file__).parent / "hostile_rewards.py"
SIBLINGS = 3

TIMEOUTS = (
    *("hang", "spin", "ignore_signals", "stop_itself", "fork_and_hang", "hang_in_float", "hang_in_a_coroutine"),
)
CRASHES = ("exit_at_once", "kill_itself", "segfault", "close_everything")
CHEAP = {
    **dict.fromkeys(
        (
            *("exit_politely", "raise_an_error", "raise_an_interrupt", "recurse", "raise_what_cannot_be_shown"),
            *("raise_in_a_coroutine", "use_all_memory"),
        ),
        "task/exceptions",
    ),
    **dict.fromkeys(("nan", "infinite", "huge_number"), "task/not_finite"),
    **dict.fromkeys(("too_short", "too_long", "endless", "empty"), "task/wrong_length"),
    **dict.fromkeys(
        ("none", "text", "texts", "functions", "locks", "table", "nested", "bad_name", "no_components"),
        "task/wrong_type",
    ),
    **dict.fromkeys(("many_components", "large_components"), "task/too_large"),
}
"""Metric that counts each way that costs no worker."""
HARMLESS = (
    *("fine", "fork", "fork_and_raise", "fork_and_leave", "fork_a_daemon", "start_a_program", "print_much"),
    *("print_json", "leave_a_thread"),
)
EXPECTED: dict[str, str] = {
    **dict.fromkeys(TIMEOUTS, "task/timeouts"),
    **dict.fromkeys(CRASHES, "task/crashes"),
    "write_everywhere": "task/too_large",
    **CHEAP,
}
ONE_BAD = {"one_nan": "task/not_finite", "one_none": "task/wrong_type"}
"""Ways in which the first sibling alone fails."""


def config(reward: str = "reward", **settings: object) -> PythonTask:
    return PythonTask.model_validate({"path": "unused", "reward": f"{HOSTILE}:{reward}", **settings})


def graded(grader: PythonGrader, ways: list[str]) -> list[list[float]]:
    """Return the rewards of one group for each way."""
    prompts = [Prompt(prompt_id=way, text="?", token_ids=(1,), answer="") for way in ways]
    flat = [(prompt, way) for prompt, way in zip(prompts, ways, strict=True) for _ in range(SIBLINGS)]
    found = grader.rewards([prompt for prompt, _ in flat], [way for _, way in flat], ["stop"] * len(flat))
    return [found[start : start + SIBLINGS] for start in range(0, len(found), SIBLINGS)]


def descendants(mark: str) -> list[str]:
    """Return the commands of the living processes that inherited an environment variable with this value."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes() and folder.name != str(os.getpid()):
                found.append((folder / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Mark every process that the test starts, and check that none of them outlives it."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("only Linux lists the processes with their environment")
    value = uuid.uuid4().hex
    monkeypatch.setenv("BETTERHALF_TEST", value)
    yield value
    assert descendants(value) == []


def ways_of_500() -> list[str]:
    dear = [*TIMEOUTS, *CRASHES, *HARMLESS, "write_everywhere"]
    cheap = [*CHEAP, *ONE_BAD]
    rest = 500 - 3 * len(dear)
    return [*dear * 3, *(cheap * (rest // len(cheap) + 1))[:rest]]


def test_every_way_is_expected_to_do_something() -> None:
    from tests.unit.tasks.hostile_rewards import WAYS

    assert set(WAYS) == {*EXPECTED, *ONE_BAD, *HARMLESS, "print_a_gigabyte"}
    assert set(ways_of_500()) == set(WAYS) - {"print_a_gigabyte"}


@pytest.mark.timeout(240)
def test_500_hostile_rewards_are_counted_and_leave_no_process(mark: str) -> None:
    grader = PythonGrader(config(time_limit=2.0, workers=4, error_reward=-1.0))
    ways = ways_of_500()
    try:
        found = graded(grader, ways)
        metrics = grader.take_metrics()
        assert descendants(mark)
    finally:
        grader.close()
    for way, rewards in zip(ways, found, strict=True):
        first = -1.0 if way in EXPECTED or way in ONE_BAD else 0.5
        rest = -1.0 if way in EXPECTED else 0.5
        assert rewards == [first, *[rest] * (SIBLINGS - 1)], way
    counts: Counter[str] = Counter()
    for way in ways:
        counts.update({EXPECTED[way]: SIBLINGS} if way in EXPECTED else {ONE_BAD[way]: 1} if way in ONE_BAD else {})
    assert {name: metrics[name] for name in counts} == counts
    assert metrics["task/errors"] == sum(counts.values())
    assert metrics["task/printed_bytes"] > 3 * 2**26
    assert grader.timeouts == counts["task/timeouts"]


@pytest.mark.parametrize("way", TIMEOUTS)
def test_a_reward_that_never_returns_ends_at_its_limit(mark: str, way: str) -> None:
    grader = PythonGrader(config(time_limit=1.0, workers=1))
    try:
        grader.check_golds([])
        started = time.monotonic()
        assert graded(grader, [way]) == [[0.0] * SIBLINGS]
        assert 1.0 <= time.monotonic() - started < 8
        assert "took more than 1 s" in grader.take_notes()[0]
        # The children of the worker ended with it.
        assert all("worker_janitor" in each for each in descendants(mark))
    finally:
        grader.close()


def test_a_gigabyte_of_output_is_drained_and_its_first_bytes_are_shown_once(
    mark: str, capfd: pytest.CaptureFixture[str]
) -> None:
    grader = PythonGrader(config(time_limit=120.0, workers=1))
    try:
        assert graded(grader, ["print_a_gigabyte"]) == [[0.5] * SIBLINGS]
        assert grader.take_metrics()["task/printed_bytes"] == 2**30
        (note,) = grader.take_notes()
        assert "printed 1073741824 bytes" in note and note.count("x" * 4096) == 1 and len(note) < 4500
        graded(grader, ["print_json"])
        assert grader.take_notes() == []
        assert grader.take_metrics()["task/printed_bytes"] == 18
    finally:
        grader.close()
    assert capfd.readouterr() == ("", "")


def test_an_interrupt_ends_the_workers_at_once(mark: str) -> None:
    grader = PythonGrader(config(time_limit=600.0, workers=2))
    try:
        grader.check_golds([])
        started = time.monotonic()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            graded(grader, ["hang", "fork_and_hang", "spin"])
        assert time.monotonic() - started < 30
        assert descendants(mark) == []
    finally:
        grader.close()


def test_each_kind_of_failure_is_shown_once_with_the_line_that_raised() -> None:
    grader = PythonGrader(config(workers=1))
    try:
        graded(grader, ["raise_an_error", "raise_an_error", "nan", "exit_at_once"])
        raised, not_finite, ended = grader.take_notes()
        assert "ZeroDivisionError: division by zero" in raised
        assert f"{HOSTILE}, line " in raised and "in raise_an_error" in raised
        assert "failed for 3 of 3 completions of prompt raise_an_error" in raised and "task/exceptions" in raised
        assert "a reward is nan" in not_finite
        assert "ended the worker with exit status 0" in ended
        graded(grader, ["raise_an_error", "nan"])
        assert grader.take_notes() == []
    finally:
        grader.close()


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("nan", "a reward is nan"),
        ("too_short", "2 rewards for 3 completions"),
        ("raise_an_error", "ZeroDivisionError"),
        ("segfault", "SIGSEGV"),
        ("texts", "'1.0' \\(str\\), not a number"),
    ],
)
def test_a_failure_stops_the_run_if_that_is_configured(way: str, words: str) -> None:
    grader = PythonGrader(config(on_error="stop", workers=1))
    try:
        assert graded(grader, ["fine"]) == [[0.5] * SIBLINGS]
        with pytest.raises(RewardError, match=f"prompt {way}: .*{words}.*task.on_error=score"):
            graded(grader, [way])
    finally:
        grader.close()
