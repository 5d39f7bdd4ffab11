"""Arms of a sanity run in worker processes: the same numbers as sequentially, and no process left behind."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.load import resolved_json
from betterhalf.config.schema import RunConfig
from betterhalf.errors import EngineError, InputError, RunError
from betterhalf.run_dir import RunDir, read_json, read_jsonl, write_json_atomic
from betterhalf.runs import job_process, side_by_side
from betterhalf.runs import sanity as sanity_module
from betterhalf.runs.job_process import public_name
from betterhalf.runs.sanity import arm_config, sanity, train_side_by_side
from betterhalf.runs.side_by_side import Job, Plan, plan_runs, run_jobs
from betterhalf.runs.train import require_same_config
from betterhalf.tasks.row import RowError

Configured = Callable[..., RunConfig]
SANITY = {"candidates": 16, "samples": 8, "evaluation_samples": 4, "pass_accuracy": 0.2}
TWO = Plan(at_once=2, threads=1, reason="a test")
ROOT = Path(__file__).parents[2]


def without_times(path: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.startswith(("time/", "system/"))}
        for row in read_jsonl(path)
    ]


def test_side_by_side_the_arms_have_the_same_numbers_as_one_after_the_other(
    small_config: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    results = {}
    for at_once in (1, 2):
        run = tmp_path / str(at_once)
        results[at_once] = sanity(small_config(sanity={**SANITY, "arms_at_once": at_once}), str(run))
        assert list(results[at_once]["arms"]) == ["fp16", "bf16"]
    for name in ("fp16", "bf16"):
        one, two = (tmp_path / str(at_once) / "arms" / name for at_once in (1, 2))
        assert without_times(one / "metrics.jsonl") == without_times(two / "metrics.jsonl") != []
        first, second = (results[at_once]["arms"][name] for at_once in (1, 2))
        assert {**first, "seconds": 0} == {**second, "seconds": 0}
        assert read_json(two / "environment.json")["threads"]["count"] == 1


def test_changed_data_that_is_allowed_is_allowed_in_the_arms_too(small_config: Configured, tmp_path: Path) -> None:
    rows = [{"problem": f"1+2+3+1+1+2+1+{i}=", "answer": 11 + i} for i in range(1, 5)]
    data, run = tmp_path / "data.jsonl", tmp_path / "run"

    def run_sanity(resume: bool, **task: Any) -> None:
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        settings = small_config(
            training={"steps": 1, "prompts_per_step": 2, "group_size": 2, "optimizer_steps": 1},
            sanity={"candidates": 4, "samples": 2, "evaluation_samples": 1, "lower": 0, "upper": 1, "arms_at_once": 2},
        ).model_dump()
        settings["task"] = {"type": "math", "path": str(data), "template": "none", **task}
        sanity(RunConfig.model_validate(settings), str(run), resume=resume)

    run_sanity(resume=False)
    for name in ("fp16", "bf16"):
        (run / "arms" / name / "summary.json").unlink()
    rows[2] = {"problem": "1+1+1+1+1+1+1+1=", "answer": 8}
    with pytest.raises(InputError, match="1 of 4 prompts"):
        run_sanity(resume=True)
    run_sanity(resume=True, allow_changed_data=True)
    assert read_json(run / "config.json")["task"]["allow_changed_data"] is False
    assert all((run / "arms" / name / "summary.json").exists() for name in ("fp16", "bf16"))


def arm_job(config: RunConfig, path: Path, name: str = "fp16") -> Job:
    return Job(kind="arm", name=name, config=config, folder=path / name, threads=1)


def test_an_error_of_an_arm_is_raised_as_what_it_was(small_config: Configured, tmp_path: Path) -> None:
    config = small_config()
    run = RunDir.create(tmp_path / "run", resume=False)
    configs = {name: arm_config(config, name, tmp_path / "missing.jsonl") for name in ("fp16", "bf16")}
    with pytest.raises(InputError, match=r"missing\.jsonl"):
        train_side_by_side(run, configs, dict.fromkeys(configs, 1), at_once=2)


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ({"error": "EngineError", "message": "words"}, EngineError),
        ({"error": "SomethingNew", "message": "words"}, RunError),
        ({"error": "OSError", "message": "words", "errno": 28, "filename": "/x"}, OSError),
    ],
)
def test_errors_travel_by_name(event: dict[str, Any], kind: type[Exception]) -> None:
    raised = side_by_side._raised(event)
    assert type(raised) is kind and "words" in str(raised)


def test_an_arm_that_is_killed_is_named_with_its_last_words(small_config: Configured, tmp_path: Path) -> None:
    lines: side_by_side._Lines = queue.SimpleQueue()
    worker = side_by_side._Worker(arm_job(small_config(), tmp_path), lines, "sanity.arms_at_once")
    assert worker.take("a warning\n") == {"output": "a warning"}
    os.kill(worker.pid, signal.SIGKILL)
    while lines.get(timeout=60)[1] is not None:
        pass
    event = worker.take(None)
    assert event is not None and event["error"] == "RunError"
    assert re.search(r"arm fp16 ended with signal SIGKILL.*arms_at_once=1.*\n  a warning", event["message"])
    worker._tail.clear()
    silent = worker.take(None)
    assert silent is not None and silent["message"].endswith("set sanity.arms_at_once=1.")
    worker.end()


LEAVES_A_CHILD = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
os._exit(5)
"""


def test_a_worker_that_leaves_a_process_behind_still_ends(
    small_config: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves_a_child.py").write_text(LEAVES_A_CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(side_by_side, "_MODULE", "leaves_a_child")
    shown, failed = list[dict[str, Any]](), list[Exception]()
    run_jobs(
        *([arm_job(small_config(), tmp_path)], lambda job, event: shown.append(event)),
        at_once=1,
        limit_key="",
        failed=lambda job, error: failed.append(error),
    )
    child = int(shown[0]["output"])
    assert type(failed[0]) is RunError and "exit status 5" in str(failed[0])
    wait_for(lambda: not alive(child))


TAKES_JOBS = """
import json, os, sys
for line in sys.stdin:
    job = json.loads(line)
    if job["name"] == "killed":
        os.kill(os.getpid(), 9)
    print(os.getpid(), os.environ["OMP_NUM_THREADS"], flush=True)
    last = {"error": "EngineError", "message": "words"} if job["name"] == "fails" else {"finished": True}
    print("\\x1e" + json.dumps(last), flush=True)
"""


def test_a_worker_takes_one_job_after_another_and_the_others_go_on_after_a_crash(
    small_config: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "takes_jobs.py").write_text(TAKES_JOBS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(side_by_side, "_MODULE", "takes_jobs")
    done, ended = dict[str, list[str]](), dict[str, str]()
    jobs = [arm_job(small_config(), tmp_path, name) for name in ("a", "fails", "b", "killed", "c")]
    run_jobs(
        *([*jobs, replace(jobs[0], name="d", threads=2)],),
        lambda job, event: done.__setitem__(job.name, event["output"].split()),
        at_once=1,
        limit_key="sweep.runs_at_once",
        failed=lambda job, error: ended.__setitem__(job.name, f"{type(error).__name__}: {error}"),
        finished=lambda job: ended.__setitem__(job.name, "finished"),
    )
    assert list(ended) == ["a", "fails", "b", "killed", "c", "d"]
    assert ended["fails"] == "EngineError: words" and "SIGKILL" in ended["killed"]
    assert [ended[name] for name in "abcd"] == ["finished"] * 4
    assert done["a"] == done["fails"] == done["b"] != done["c"]  # one process until the crash
    assert [done[name][1] for name in ("a", "c", "d")] == ["1", "1", "2"]


def test_a_worker_is_replaced_after_some_jobs(
    small_config: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "takes_jobs.py").write_text(TAKES_JOBS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(side_by_side, "_MODULE", "takes_jobs")
    monkeypatch.setattr(side_by_side, "_JOBS_PER_PROCESS", 2)
    processes = dict[str, str]()
    run_jobs(
        *([arm_job(small_config(), tmp_path, name) for name in "abc"],),
        lambda job, event: processes.__setitem__(job.name, event["output"].split()[0]),
        at_once=1,
        limit_key="",
        failed=lambda job, error: pytest.fail(str(error)),
    )
    assert processes["a"] == processes["b"] != processes["c"]


def test_an_error_of_a_private_class_travels_as_its_nearest_public_one() -> None:
    assert public_name(RowError("it is too long", "shorten it")) == "InputError"
    assert public_name(EngineError("words")) == "EngineError"


def test_arms_end_with_the_process_that_started_them(small_config: Configured, tmp_path: Path) -> None:
    config = small_config(training={"steps": 500}, sanity={**SANITY, "arms_at_once": 2, "lower": 0.0, "upper": 1.0})
    write_json_atomic(tmp_path / "config.json", resolved_json(config))
    command = [sys.executable, "-m", "betterhalf.cli", "sanity", str(tmp_path / "config.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    run = tmp_path / "run"
    parent = subprocess.Popen([*command, f"run_dir={run}"], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: all((run / "arms" / name / "metrics.jsonl").exists() for name in ("fp16", "bf16")))
        children = children_of(parent.pid)
        assert len(children) == 2
        parent.send_signal(signal.SIGKILL)
        parent.wait(60)
        wait_for(lambda: not any(alive(child) for child in children))
    finally:
        parent.kill()
        parent.wait(60)


def wait_for(happened: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_plan_follows_the_machine_and_the_settings(
    small_config: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(count: int = 2, parameters: int = 10**6, **changes: Any) -> tuple[int, int]:
        config = small_config(device="cpu", **changes)
        wanted = config.sanity.arms_at_once
        found = plan_runs(config, count, parameters, wanted=wanted, key="sanity.arms_at_once")
        assert found.reason
        return found.at_once, found.threads

    monkeypatch.setattr(side_by_side, "chosen_threads", lambda: None)
    monkeypatch.setattr(side_by_side, "usable_cores", lambda: 8)
    assert plan() == (2, 4)
    assert plan(count=3) == (3, 2)
    assert plan(count=0) == (1, 8)
    assert plan(parameters=10**13) == (1, 8)
    assert plan(sanity={"arms_at_once": 1}) == (1, 8)
    assert plan(sanity={"arms_at_once": 5}) == (2, 4)
    assert plan(engine={"type": "vllm"}) == (1, 8)
    monkeypatch.setattr(side_by_side, "usable_cores", lambda: 1)
    assert plan() == (1, 1)
    assert plan(sanity={"arms_at_once": 2}) == (2, 1)
    monkeypatch.setattr(side_by_side, "choose_device", lambda config: type("Device", (), {"type": "cuda"}))
    assert plan() == (1, 1)


def test_a_container_s_memory_limits_the_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(side_by_side, "_MEMORY_LIMIT", limit)
    unlimited = side_by_side._fit_in_memory(10**6)
    for text, fit in (("max\n", unlimited), (f"{3 * side_by_side.BYTES_BESIDE}\n", 2)):
        limit.write_text(text)
        assert side_by_side._fit_in_memory(10**6) == fit


def test_a_plan_says_what_was_chosen() -> None:
    assert TWO.described(("fp16", "bf16")) == "fp16 and bf16: 2 side by side, 1 thread each (a test)"
    one = Plan(at_once=1, threads=2, reason="why")
    assert one.described(("a", "b", "c")) == "3 arms: sequentially, 2 threads each (why)"
    assert TWO.described(("bf16",)) == "bf16: alone, 1 thread (a test)"


def test_an_arm_that_is_left_when_a_run_is_resumed_keeps_its_threads(
    small_config: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "chosen_threads", lambda: None)
    monkeypatch.setattr(side_by_side, "usable_cores", lambda: 2)
    trained: list[tuple[dict[str, int], int]] = []

    def train(run: RunDir, configs: dict[str, RunConfig], threads: dict[str, int], at_once: int) -> None:
        assert [configs[name].precision.preset for name in threads] == list(threads)
        trained.append((threads, at_once))
        for name in threads:
            finish(name)

    def finish(name: str) -> None:
        run.arm(name).path.mkdir(parents=True, exist_ok=True)
        write_json_atomic(run.arm(name).summary, {"passed": True})

    monkeypatch.setattr(sanity_module, "train_side_by_side", train)
    run = RunDir.create(tmp_path / "run", resume=False)
    finish("fp16")
    for _ in range(2):  # the second time no arm is left
        arms = sanity_module._run_arms(run, small_config(device="cpu"), tmp_path / "perfectible.jsonl", 10**6)
        assert list(arms) == ["fp16", "bf16"]
    assert trained == [({"bf16": 1}, 2)]

    # One at a time, as after running out of memory: the arm keeps its number of threads.
    run.arm("bf16").summary.unlink()
    write_json_atomic(run.arm("bf16").environment, {"threads": {"count": 1}})
    one = small_config(device="cpu", sanity={"arms_at_once": 1})
    sanity_module._run_arms(run, one, tmp_path / "perfectible.jsonl", 10**6)
    assert trained[1:] == [({"bf16": 1}, 1)]


def test_an_arm_that_fails_in_an_unexpected_way_says_so_in_one_sentence(
    small_config: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("why")

    monkeypatch.setattr(sanity_module, "run_arm", fails)
    event = job_process.outcome(json.loads(arm_job(small_config(), tmp_path).line()))
    words = "the arm fp16 failed: ZeroDivisionError: why. Please report this"
    assert event["error"] == "RunError" and event["message"].startswith(words)


def test_the_number_of_arms_at_once_may_change_when_a_run_is_resumed(small_config: Configured, tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", resume=False)
    write_json_atomic(run.config, resolved_json(small_config()))
    require_same_config(run, small_config(sanity={"arms_at_once": 1}))
    with pytest.raises(InputError, match=r"sanity\.samples"):
        require_same_config(run, small_config(sanity={"samples": 9}))
