"""Processes under a local Ray: calls, errors, time limits, crashes, the loss of the head, and nothing left behind."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.processes import descendants, left_after, shared_memory

from betterhalf.cluster.placement import Placement, placement_of
from betterhalf.cluster.process import Process
from betterhalf.cluster.session import Session, open_session
from betterhalf.config.cluster import ClusterConfig
from betterhalf.errors import InputError, LossScaleError, TrainerDiedError

pytestmark = [
    pytest.mark.extra,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray; scripts/install --ray"),
]

CLUSTER = ClusterConfig(backend="ray", trainers=2, engines=1, start_seconds=120.0)
_SECONDS = 120.0
"""Time limit of calls that should end long before."""


class Subject:
    """Object of a process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def facts(self) -> tuple[int, str, str, int]:
        return self.number, os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"], os.getpid()

    def niceness(self) -> int:
        return os.getpriority(os.PRIO_PROCESS, 0)

    def add(self, *numbers: int) -> int:
        return self.number + sum(numbers)

    def fail(self) -> None:
        raise LossScaleError("at its floor")

    def fail_unportably(self) -> None:
        raise Unportable(1, 2)

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def crash(self) -> None:
        print("the last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)  # the signal stops the process within microseconds, but not always in this call


class Unportable(Exception):
    """Error that cannot be unpickled."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left} {right}")


Start = Callable[..., Process]


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    before = shared_memory()
    opened = open_session(CLUSTER)
    opened.place(placement_of(CLUSTER))
    pids = descendants(os.getpid())
    folder = opened._folder
    assert pids and folder is not None and folder.path.exists()
    yield opened
    pids |= descendants(os.getpid())
    opened.close()
    opened.close()
    assert not ray.is_initialized()
    assert left_after(pids, 20.0) == set()
    assert not folder.path.exists()
    assert shared_memory() <= before


@pytest.fixture
def start(session: Session) -> Iterator[Start]:
    """Start a process in the slot of a rank; all are ended at the end of the test."""
    started: list[Process] = []

    def one(rank: int = 0, **arguments: int) -> Process:
        slot = placement_of(CLUSTER).ranks[rank]
        name = f"rank {rank}"
        started.append(session.start(Subject, slot, name, TrainerDiedError, **(arguments or {"number": 5})))
        return started[-1]

    yield one
    for process in started:
        process.end()


def test_a_process_has_the_threads_of_its_slot_and_reads_stored_objects(session: Session, start: Start) -> None:
    process = start()
    number, threads, waiting, pid = process.call("facts", seconds=_SECONDS).result()
    assert (number, threads, waiting) == (5, "1", "PASSIVE")
    assert process.name.endswith(f"process {pid})") and process.name.startswith("rank 0 (host ")
    stored = session.store(30)
    assert process.call("add", stored, 2, seconds=_SECONDS).result() == 37


def test_a_process_has_the_priority_of_the_controller(start: Start) -> None:
    assert start().call("niceness", seconds=_SECONDS).result() == os.getpriority(os.PRIO_PROCESS, 0)


def test_errors_arrive_as_they_were_raised_and_the_process_goes_on(start: Start) -> None:
    process = start()
    error = process.call("fail", seconds=_SECONDS).exception()
    assert type(error) is LossScaleError and str(error) == "at its floor"
    assert 'raise LossScaleError("at its floor")' in error.__notes__[0]
    unportable = process.call("fail_unportably", seconds=_SECONDS).exception()
    assert type(unportable) is RuntimeError and str(unportable) == "Unportable: 1 2"
    assert process.call("add", 1, seconds=_SECONDS).result() == 6 and not process.ended


def test_an_error_of_the_start_is_raised_by_every_call(start: Start) -> None:
    process = start(letter=1)
    for _ in range(2):
        assert "unexpected keyword argument 'letter'" in str(process.call("add", seconds=_SECONDS).exception())


def test_a_crash_fails_every_call_with_the_end_of_the_log_and_leaves_other_processes_alone(start: Start) -> None:
    first, second = start(0), start(1)
    pid = first.call("facts", seconds=_SECONDS).result()[3]
    calls = [first.call("crash", seconds=_SECONDS), first.call("add", 1, seconds=_SECONDS)]
    for call in calls:
        error = call.exception(timeout=30)
        assert type(error) is TrainerDiedError
        assert f"process {pid}) ended. Its log ends with:" in str(error) and "the last words" in str(error)
    assert type(first.call("add", 1).exception(timeout=1)) is TrainerDiedError and first.ended
    assert second.call("add", 1, seconds=_SECONDS).result() == 6


def test_a_process_that_exceeds_its_time_limit_is_ended_even_if_it_is_stopped(start: Start) -> None:
    hung, stopped = start(0), start(1)
    pids = [process.call("facts", seconds=_SECONDS).result()[3] for process in (hung, stopped)]
    calls = [hung.call("sleep", 600, seconds=0.2), stopped.call("stop", seconds=0.2)]
    for call, verb in zip(calls, ("sleep", "stop"), strict=True):
        assert f"did not answer '{verb}' within 0.2 seconds and was ended" in str(call.exception(timeout=30))
    assert left_after(set(pids), 10.0) == set()


def test_a_call_aside_runs_beside_the_others(start: Start) -> None:
    process = start()
    process.call("add", seconds=_SECONDS).result()
    long = process.call("sleep", 600)
    assert process.call("add", 1, seconds=_SECONDS, aside=True).result() == 6
    process.end()
    assert "rank 0" in str(long.exception(timeout=10)) and "was ended" in str(long.exception())


def test_a_slot_can_be_used_again_after_its_process_ended(start: Start) -> None:
    for number in (1, 2):
        process = start(0, number=number)
        assert process.call("add", seconds=_SECONDS).result() == number
        process.end()


def test_resources_that_do_not_exist_are_refused_at_once(session: Session) -> None:
    slots = placement_of(CLUSTER)
    asked = Placement(ranks=slots.ranks, engines=slots.engines, bundles=({"CPU": 1.0, "GPU": 512.0},))
    started = time.monotonic()
    with pytest.raises(InputError, match=r"needs 1 CPU and 512 GPUs for its 2 ranks and 1 engine, .*has \d+ CPUs and"):
        session.place(asked)
    assert time.monotonic() - started < 5


def test_a_second_session_in_one_process_is_refused(session: Session) -> None:
    with pytest.raises(InputError, match=r"connected to a Ray cluster already; call ray\.shutdown"):
        open_session(CLUSTER)


SCRIPT = """
import os, signal, sys, time
from betterhalf.errors import ClusterError
sys.path.insert(0, sys.argv[1])
import test_ray_session as tests
handler, hook = signal.getsignal(signal.SIGTERM), sys.excepthook
session = tests.open_session(tests.CLUSTER)
assert (signal.getsignal(signal.SIGTERM), sys.excepthook) == (handler, hook)
import ray
ray.cloudpickle.register_pickle_by_value(tests)
session.place(tests.placement_of(tests.CLUSTER))
slots = tests.placement_of(tests.CLUSTER).ranks
process = session.start(tests.Subject, slots[0], "rank 0", tests.TrainerDiedError, number=1)
process.call("add").result()
if sys.argv[2] == "wait":
    print("ready", *tests.descendants(os.getpid()), flush=True)
    process.call("sleep", 600).result()
waiting = process.call("sleep", 600)
os.kill(ray._private.worker._global_node.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)
started = time.monotonic()
error = waiting.exception(timeout=30)
assert type(error) is ClusterError and "gcs_server ended" in str(error), error
assert time.monotonic() - started < 10
assert type(process.call("add").exception()) is ClusterError
try:
    session.start(tests.Subject, slots[1], "rank 1", tests.TrainerDiedError, number=1)
except ClusterError:
    session.close()
    print("closed", flush=True)
"""


def script(what: str, folder: Path) -> subprocess.Popen[str]:
    """Run the script above in a process of its own, which uses `folder` for temporary files."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )


JOIN = """
import os, signal, socket, subprocess, sys, time
sys.path.insert(0, sys.argv[1])
import test_ray_session as tests
import ray
ray.cloudpickle.register_pickle_by_value(tests)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=3"]
command += [f"--temp-dir={os.environ['TMPDIR']}", "--include-dashboard=false", "--disable-usage-stats"]
head = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
cluster = tests.ClusterConfig(backend="ray", address=f"127.0.0.1:{port}", trainers=2, engines=1, start_seconds=60.0)
try:
    for _ in range(120):
        try:
            session = tests.open_session(cluster)
            break
        except tests.InputError as error:
            assert f"127.0.0.1:{port}" in str(error)
            time.sleep(0.5)
    place = tests.placement_of(cluster)
    more = tests.Placement(ranks=place.ranks, engines=place.engines, bundles=(*place.bundles, {"CPU": 1.0}))
    try:
        session.place(more)
    except tests.InputError as error:
        assert "the run needs 4 CPUs" in str(error) and "has 3 CPUs and 0 GPUs" in str(error), error
        print("refused", flush=True)
    session.place(place)
    process = session.start(tests.Subject, place.ranks[0], "rank 0", tests.TrainerDiedError, number=5)
    number, threads, _, pid = process.call("facts").result()
    assert (number, threads) == (5, "1")
    raylet = ray.nodes()[0]["NodeManagerPort"]
    session.close()
    assert tests.left_after({pid}, 10.0) == set() and head.poll() is None
    print("left", flush=True)
    started = time.monotonic()
    try:
        tests.open_session(tests.ClusterConfig(backend="ray", address=f"127.0.0.1:{raylet}"))
    except tests.InputError as error:
        assert "is not the head of a Ray cluster: it does not know Ray's requests" in str(error), error
        assert time.monotonic() - started < 5
        print("not a head", flush=True)
finally:
    for pid in tests.descendants(head.pid) | {head.pid}:
        os.kill(pid, signal.SIGKILL)
"""


def test_a_running_cluster_is_joined_and_left_as_it_was(short_folder: Path) -> None:
    command = [sys.executable, "-c", JOIN, str(Path(__file__).parent)]
    environment = {**os.environ, "TMPDIR": str(short_folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    expected = "refused\nleft\nnot a head\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, ""), done.stderr[-3000:]


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder whose path is short enough for sockets."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="bh", dir="/tmp") as folder:
        yield Path(folder)


def test_the_loss_of_the_head_fails_every_call_within_seconds(short_folder: Path) -> None:
    ended = script("lose", short_folder)
    out, err = ended.communicate(timeout=200)
    assert (ended.returncode, out) == (0, "closed\n"), err
    assert list(short_folder.iterdir()) == []


def test_after_kill_9_of_the_controller_every_process_ends_and_the_next_run_removes_the_folder(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = script("wait", short_folder)
    assert controller.stdout is not None
    pids = {int(pid) for pid in controller.stdout.readline().split()[1:]}
    assert len(pids) > 3
    before = shared_memory()
    controller.kill()
    controller.communicate()
    assert left_after(pids, 10.0) == set()
    assert shared_memory() <= before
    (left,) = short_folder.glob("betterhalf-ray-*")
    monkeypatch.setattr("tempfile.tempdir", str(short_folder))
    from betterhalf.cluster.session_folder import SessionFolder

    mine, other = SessionFolder(), SessionFolder()
    assert not left.exists() and mine.path.exists() and other.path.exists()
    for folder in (mine, other):
        folder.remove()
