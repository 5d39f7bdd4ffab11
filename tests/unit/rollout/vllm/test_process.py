"""Requests to the child process, its crashes, and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from betterhalf.errors import EngineDiedError, EngineError, InputError, MissingExtraError
from betterhalf.rollout.vllm.process import ServerProcess

Start = Callable[..., ServerProcess]


def runs(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not runs(pid)


def test_it_answers_in_order_and_sees_its_environment(start: Start) -> None:
    process = start(SHOWN="yes")
    assert process.ask("echo", a=1) == {"a": 1}
    assert process.ask("setting", name="SHOWN") == "yes"
    assert process.ask("echo", a=(2, 3)) == {"a": (2, 3)}


@pytest.mark.parametrize(
    ("verb", "values", "error", "words"),
    [
        ("fail", {"message": "out of luck"}, EngineError, "vLLM failed: out of luck"),
        ("refuse", {}, InputError, "not this model"),
        ("missing", {}, MissingExtraError, "no vLLM here"),
    ],
)
def test_an_error_is_raised_here_and_the_next_request_is_answered(
    start: Start, verb: str, values: dict[str, str], error: type[Exception], words: str
) -> None:
    process = start()
    with pytest.raises(error, match=words):
        process.ask(verb, **values)
    assert process.ask("echo", a=1) == {"a": 1}


@pytest.mark.parametrize(("how", "words"), [(-signal.SIGKILL, "signal SIGKILL"), (7, "exit status 7")])
def test_a_crash_is_explained_and_quotes_the_log(start: Start, how: int, words: str) -> None:
    process = start()
    with pytest.raises(EngineDiedError, match=f"{words}.*before it answered 'die'(.|\n)*last words") as death:
        process.ask("die", how=int(how))
    assert ("If memory ran out, lower engine.max_concurrent" in str(death.value)) == (how == -signal.SIGKILL)
    with pytest.raises(EngineDiedError):
        process.ask("echo")


def test_no_answer_in_time_is_an_error_that_ends_the_process(start: Start) -> None:
    process = start()
    process.ask("echo")
    with pytest.raises(EngineError, match=r"within 0\.1 seconds; allow more with engine\.start_seconds"):
        process.ask("nap", seconds=0.1)
    assert ends_within(process.pid, 10)


def test_close_ends_it_and_may_be_repeated(start: Start) -> None:
    process = start()
    process.ask("echo")
    process.close()
    assert not runs(process.pid)
    process.close()


def test_an_interrupted_request_ends_the_process(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start()
    process.ask("echo")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        process.ask("echo")
    assert ends_within(process.pid, 10)


PARENT = """
import sys, time
from pathlib import Path
from betterhalf.rollout.vllm.process import ServerProcess
process = ServerProcess("fake_vllm_server", {}, Path(sys.argv[1]))
process.ask("echo")
print(process.pid, flush=True)
if sys.argv[2] == "busy":
    process._connection.send(("nap", {}))
time.sleep(60)
"""


@pytest.mark.parametrize("doing", ["idle", "busy"])
def test_it_does_not_outlive_a_killed_parent(fake_module: str, tmp_path: object, doing: str) -> None:
    command = [sys.executable, "-c", PARENT, f"{tmp_path}/log", doing]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert runs(child)
        parent.kill()
    try:
        assert ends_within(child, 10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


FAKE_VLLM = """
import os

class SamplingParams:
    pass

class LLM:
    def __init__(self, **options):
        assert not options.get("mixed_windows"), "all layers must have one sliding window"

    def collective_rpc(self, name):
        return [{}]

    def reset_prefix_cache(self):
        assert False, "a block is still in use"
"""


def test_an_assertion_is_a_refusal_while_vllm_starts_and_a_failure_once_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm.py").write_text(FAKE_VLLM, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), *sys.path)))
    process = ServerProcess("betterhalf.rollout.vllm.server", {}, tmp_path / "log.txt")
    try:
        with pytest.raises(
            InputError, match=r"by an assertion: all layers must have one sliding window.*engine=native"
        ):
            process.ask("start", options={"mixed_windows": True})
        process.ask("start", options={})
        with pytest.raises(EngineError, match="vLLM failed: a block is still in use"):
            process.ask("generate", requests=(), distribution={"temperature": 1.0}, stop_token_ids=())
    finally:
        process.close(grace=0.0)
