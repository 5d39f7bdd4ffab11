"""Checks of a cluster that start nothing: each message names the fix."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from betterhalf.cluster import process, session
from betterhalf.cluster.placement import placement_of
from betterhalf.cluster.process import log_tail
from betterhalf.cluster.ray_start import check_session
from betterhalf.config.cluster import ClusterConfig
from betterhalf.errors import InputError, MissingExtraError


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ray be installed, whether it is or not."""
    monkeypatch.setattr("betterhalf.cluster.ray_start.require_ray", lambda: None)
    monkeypatch.setattr("betterhalf.cluster.ray_start.use_token", lambda: None)
    monkeypatch.setattr("betterhalf.cluster.head._other_server", lambda address: None)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find_spec(name))
    with pytest.raises(MissingExtraError, match=r"pip install betterhalf\[ray\]"):
        check_session(ClusterConfig(backend="ray"))


def test_a_folder_of_that_name_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(MissingExtraError, match=r"pip install betterhalf\[ray\]"):
        check_session(ClusterConfig(backend="ray"))


def test_a_package_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text('raise ImportError("libfoo.so: no such file")')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(InputError, match=r"ray/__init__\.py cannot be imported \(ImportError: libfoo.*force-reinstall"):
        check_session(ClusterConfig(backend="ray"))


def test_a_silent_address_is_refused_at_once(installed: None) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(InputError, match=rf"no Ray cluster answers at {address} .*leave out cluster\.address"):
        check_session(ClusterConfig(backend="ray", address=address))


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes | None], str]]:
    """Start a server with one answer, or that never answers, and return its address."""
    with contextlib.ExitStack() as stack:

        def start(answer: bytes | None) -> str:
            # Only a server that never answers uses up the limit.
            monkeypatch.setattr("betterhalf.cluster.head._TCP_SECONDS", 0.5 if answer is None else 30.0)
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def serve() -> None:
                connection = stack.enter_context(server.accept()[0])
                if answer is not None and connection.recv(4096):
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)

            threading.Thread(target=serve, daemon=True).start()
            return f"127.0.0.1:{server.getsockname()[1]}"

        yield start


# The first frame of a head of Ray 2.60: 36 bytes of kind 4, without flags, of stream 0.
SETTINGS = bytes([0, 0, 36, 4, 0, 0, 0, 0, 0]) + bytes(36)


def test_an_address_that_answers_as_ray_does_passes_the_check(
    installed: None, answering: Callable[[bytes | None], str]
) -> None:
    check_session(ClusterConfig(backend="ray", address=answering(SETTINGS)))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it speaks another protocol"),
        (b"", "it ends the connection"),
        (None, "it does not answer within 0.5 seconds"),
    ],
)
def test_what_is_not_ray_is_refused_within_seconds(
    installed: None, answering: Callable[[bytes | None], str], answer: bytes | None, words: str
) -> None:
    with pytest.raises(InputError, match=rf"is not the head of a Ray cluster: {words}\. Give the port of `ray start"):
        check_session(ClusterConfig(backend="ray", address=answering(answer)))


def test_gpus_that_a_local_ray_lacks_are_refused(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    settings: dict[str, Any] = {"backend": "ray", "trainers": 2, "engines": 1, "trainer": {"gpus": 1}}
    check_session(ClusterConfig.model_validate(settings))
    with pytest.raises(InputError, match=r"need 3 GPUs, and this host has 2\. Lower them, share GPUs"):
        check_session(ClusterConfig.model_validate({**settings, "engine": {"gpus": 1}}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"engine": {"cpus": 3}},
            r"cluster\.engine\.cpus=3, and this host has 2 CPUs\. Lower it \(cluster\.engine\.th",
        ),
        ({"trainer": {"cpus": 1000}}, r"cluster\.trainer\.cpus=1000, and this host has 2 CPUs\. Lower it"),
        (
            {"trainers": 10, "engines": 7},
            r"needs 17 CPUs for its 10 ranks and 7 engines, and this host has 2: more",
        ),
    ],
)
def test_cpus_that_a_local_ray_lacks_are_refused(
    installed: None, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("betterhalf.cluster.ray_start.usable_cores", lambda: 2)
    check_session(ClusterConfig.model_validate({"backend": "ray", "trainers": 8, "engines": 8}))
    with pytest.raises(InputError, match=message):
        check_session(ClusterConfig.model_validate({"backend": "ray", **settings}))


def test_a_process_that_fits_on_no_host_is_refused_although_all_hosts_together_have_its_cpus() -> None:
    placement = placement_of(ClusterConfig.model_validate({"backend": "ray", "engine": {"cpus": 6}}))
    hosts = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 5.0}]
    require_host = session._require_a_host
    require_host(placement, [*hosts, {"CPU": 6.0}])
    with pytest.raises(InputError, match=r"needs 6 CPUs and 0 GPUs on one host, .*: at most 5 CPUs and 1 GPU\. Lower"):
        require_host(placement, hosts)


@pytest.mark.extra
@pytest.mark.parametrize(("slow", "seconds", "starts"), [(2, 60.0, True), (10**6, 0.01, False)])
def test_a_ray_that_starts_too_slowly_is_started_again_until_the_time_limit(
    slow: int, seconds: float, starts: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("ray._private.worker", reason="needs Ray; scripts/install --ray")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        calls.append(options)
        if len(calls) <= slow:
            raise RuntimeError("The current node timed out during startup. This could happen because ...")

    ray = types.SimpleNamespace(init=init, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    cluster = ClusterConfig(backend="ray", start_seconds=seconds)
    with contextlib.nullcontext() if starts else pytest.raises(InputError, match="Ray cannot start on this host"):
        folder = session._started(cluster)
        assert Path(calls[-1]["_temp_dir"]) == folder.path
        folder.remove()
    assert calls and (not starts or len(calls) == 3)
    assert calls[0]["_system_config"] == {"worker_niceness": 0}
    assert not any(Path(call["_temp_dir"]).exists() for call in calls)


@pytest.mark.extra
def test_a_process_that_ray_ended_for_want_of_memory_says_what_to_do() -> None:
    exceptions = pytest.importorskip("ray.exceptions", reason="needs Ray; scripts/install --ray")
    ended = object.__new__(process.RayProcess)
    ended.role, ended._about = "rank 0", None
    message = ended._end_message(exceptions.OutOfMemoryError("Task was killed"))
    assert message.startswith("rank 0 ended because its host is short of memory: free some, or start fewer processes")
    assert ended._end_message(RuntimeError()).startswith("rank 0 ended. It ended before")


def test_the_end_of_a_log_leaves_out_the_marks_of_ray(tmp_path: Any) -> None:
    log = tmp_path / "worker.err"
    log.write_text(":job_id:01\n:actor_name:Host\n" + "".join(f"line {number}\n" for number in range(20)) + "\n")
    assert log_tail(log).splitlines() == [f"  line {number}" for number in range(8, 20)]
    log.write_text(":job_id:01\n")
    assert log_tail(log) == "  (empty)"
    assert log_tail(tmp_path / "missing") == "  (no log)"
