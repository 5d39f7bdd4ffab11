"""Connection to a Ray cluster: a local one that the run starts and stops, or one that it joins.

Only this package imports Ray, and only when it is used.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import betterhalf
from betterhalf.cluster.head import address_probe, local_probe
from betterhalf.cluster.host import Host
from betterhalf.cluster.placement import Placement, Slot
from betterhalf.cluster.process import ASIDE, Process, RayProcess
from betterhalf.cluster.ray_start import (
    SlowStartError,
    check_session,
    join_cluster,
    own_hooks,
    quiet,
    silence_notices,
    start_local,
)
from betterhalf.cluster.session_folder import SessionFolder
from betterhalf.config.schema import ClusterConfig
from betterhalf.errors import ClusterError, InputError
from betterhalf.process import Threads, variables
from betterhalf.words import counted

_KINDS = ("CPU", "GPU")
"""Resources that processes reserve, as Ray names them."""
_SOON_SECONDS = 10.0
"""Seconds to wait for resources before a note says what is missing."""
_WATCH_SECONDS = 1.0
_MISSES = 5
"""Number of failed connections in a row after which the head of a joined cluster counts as lost."""
_FORWARDED = ("HF_", "TRANSFORMERS_", "HUGGINGFACE_", "NCCL_", "GLOO_", "BETTERHALF_")
"""Prefixes of environment variables that every process gets from the controller."""


class Session:
    """A cluster in use. `close` ends every process, and removes every stored object and file of the session."""

    def __init__(self, cluster: ClusterConfig, folder: SessionFolder | None) -> None:
        """Use the cluster to which this process is connected.

        Args:
            cluster: cluster section of the configuration.
            folder: folder of the local Ray; None for a joined cluster.
        """
        import ray

        self._cluster, self._folder = cluster, folder
        self._group: Any = None
        self._processes: list[RayProcess] = []
        self._node = str(ray.get_runtime_context().get_node_id())
        self._lost: ClusterError | None = None
        self._closed = threading.Event()
        self._why_lost = local_probe() if folder is not None else address_probe(ray.get_runtime_context().gcs_address)
        threading.Thread(target=self._watch, name="cluster watch", daemon=True).start()

    def place(self, placement: Placement, tell: Callable[[str], None] = lambda note: None) -> None:
        """Reserve all slots.

        Args:
            placement: the slots.
            tell: receives a note if the cluster has the resources, but other work uses them.

        Raises:
            InputError: the cluster has fewer CPUs or GPUs than the slots need, or no host has those of one process,
                which is known at once; or they are not free within `cluster.start_seconds`. The message lists what is
                needed, what exists and what is free.
        """
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        _require_resources(placement, ray.cluster_resources(), "has")
        _require_a_host(placement, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        # PACK keeps ranks together; a strategy that spreads them would send every all-gather over the network.
        group = placement_group([dict(bundle) for bundle in placement.bundles], strategy="PACK")
        seconds = self._cluster.start_seconds
        at_once = min(_SOON_SECONDS, seconds)
        if group.wait(at_once):
            self._group = group
            return
        tell(
            f"waiting up to {seconds:g} s for {_words(placement.totals())}; the Ray cluster has "
            f"{_words(ray.available_resources())} free"
        )
        if not group.wait(seconds - at_once):
            free = ray.available_resources()
            remove_placement_group(group)
            _require_resources(placement, free, f"had free after {seconds:g} s")
            raise InputError(
                f"the {len(placement.bundles)} processes of the run do not fit on the hosts of the cluster: each needs "
                "its CPUs and GPUs on one host. Lower them, or add hosts."
            )
        self._group = group

    def start(
        self, build: Callable[..., object], slot: Slot, name: str, died: Callable[[str], Exception], **arguments: Any
    ) -> Process:
        """Start a process that holds `build(**arguments)`, without waiting for it; Ray never restarts it by itself.

        Args:
            build: builds the object in the process; every call raises its error if it fails.
            slot: reserved resources of the process.
            name: role and index, such as `rank 0`.
            died: builds, from a message, the error of a call that the process can no longer answer.
            arguments: keyword arguments of `build`.

        Raises:
            ClusterError: the cluster was lost.
        """
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._require_open()
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=slot.bundle)
        remote = (
            ray.remote(concurrency_groups={ASIDE: 1})(Host)
            .options(
                num_cpus=slot.cpus,
                num_gpus=slot.gpus,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=place,
                runtime_env={"env_vars": _environment(slot.threads)},
            )
            .remote(folder=os.getcwd())
        )
        process = RayProcess(remote, name, died, self._node)
        remote.build.remote(build, arguments)
        self._processes.append(process)
        return process

    def hosts(self) -> dict[str, list[str]]:
        """Return host name -> roles, such as `rank 0`, of the processes that run there."""
        found: dict[str, list[str]] = {}
        for process in self._processes:
            if not process.ended and process.host is not None:
                found.setdefault(process.host, []).append(process.role)
        return {host: sorted(roles) for host, roles in sorted(found.items())}

    def store(self, value: object) -> object:
        """Put a value into the object store, and return its reference; a process that is passed it gets the value."""
        import ray

        return ray.put(value)

    def _require_open(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _watch(self) -> None:
        """Notice when the cluster's head has ended: Ray's own calls would wait forever."""
        misses = 0
        while not self._closed.wait(_WATCH_SECONDS):
            why = self._why_lost()
            misses = 0 if why is None else misses + 1
            # A process that has ended does not come back; a network connection may.
            if misses < (1 if self._folder is not None else _MISSES):
                continue
            self._lost = ClusterError(
                f"the Ray cluster was lost: {why}. Everything up to the last checkpoint is kept; continue with "
                "--resume, on another cluster if this one does not come back"
            )
            for process in list(self._processes):
                process.lose(self._lost)
            return

    def close(self) -> None:
        """Leave the cluster, and stop it if the run started it; calling it twice is harmless."""
        if self._closed.is_set():
            return
        self._closed.set()
        try:
            self._leave()
        finally:
            # An interrupt may end the wait for Ray's processes.
            if self._folder is not None:
                self._folder.remove()

    def _leave(self) -> None:
        """End the run's processes, and the Ray that the run started."""
        import ray

        for process in self._processes:
            process.end()
        # With the head lost, Ray would wait a minute for it and then end this process. A local head may be ending just
        # now, as SIGTERM may have gone to the whole process group; its placement group ends with it.
        joined = self._folder is None
        if joined and self._group is not None and self._lost is None and self._why_lost() is None:
            from ray.util.placement_group import remove_placement_group

            with contextlib.suppress(Exception):  # the cluster may have ended meanwhile
                remove_placement_group(self._group)
        with quiet():
            ray.shutdown()


def open_session(cluster: ClusterConfig) -> Session:
    """Join the cluster at `cluster.address`, or start a local one.

    A local one may declare more CPUs than the host has, because Ray only counts them. An address is first tried with a
    plain TCP connection: with an unreachable one, `ray.init` ends the process after two minutes with `SystemExit`.

    Raises:
        InputError: see `check_session` and `join_cluster`; or a local Ray does not start, or this process is already
            connected to a cluster.
        MissingExtraError: Ray is not installed.
    """
    check_session(cluster)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without this, a call after the end of a session would start another Ray.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    with own_hooks():
        import ray

        if ray.is_initialized():
            raise InputError(
                "this process is connected to a Ray cluster already; call ray.shutdown() first, and name the cluster "
                "with cluster.address"
            )
        silence_notices()
        if cluster.address is None:
            return Session(cluster, _started(cluster))
        join_cluster(cluster.address)
        return Session(cluster, None)


def _started(cluster: ClusterConfig) -> SessionFolder:
    """Start a local Ray, trying again if its processes start too slowly, and return its folder.

    Raises:
        InputError: it does not start within `cluster.start_seconds`.
    """
    deadline = time.monotonic() + cluster.start_seconds
    while True:
        folder = SessionFolder()
        try:
            with folder.marked():
                start_local(cluster, folder.path)
            return folder
        except SlowStartError as error:
            folder.remove()
            if time.monotonic() > deadline:
                raise InputError(str(error)) from error
        except BaseException:
            folder.remove()
            raise


def _require_resources(placement: Placement, found: Mapping[str, float], verb: str) -> None:
    needed = placement.totals()
    if not _holds(found, needed):
        processes = f"{counted(len(placement.ranks), 'rank')} and {counted(len(placement.engines), 'engine')}"
        raise InputError(
            f"the run needs {_words(needed)} for its {processes}, and the Ray cluster {verb} {_words(found)}. Lower "
            "cluster.trainers, cluster.engines or their cpus and gpus, or add hosts."
        )


def _require_a_host(placement: Placement, hosts: Sequence[Mapping[str, float]]) -> None:
    """Require a host for each bundle, which Ray would otherwise wait for until `cluster.start_seconds` have passed."""
    for bundle in placement.bundles:
        if not any(_holds(host, bundle) for host in hosts):
            largest = {kind: max((host.get(kind, 0.0) for host in hosts), default=0.0) for kind in _KINDS}
            raise InputError(
                f"one process needs {_words(bundle)} on one host, and no host of the Ray cluster has that: at most "
                f"{_words(largest)}. Lower the cpus and gpus of cluster.trainer and cluster.engine, or add hosts."
            )


def _holds(found: Mapping[str, float], needed: Mapping[str, float]) -> bool:
    return all(needed.get(kind, 0.0) <= found.get(kind, 0.0) + 1e-6 for kind in _KINDS)


def _words(resources: Mapping[str, float]) -> str:
    """Return CPUs and GPUs in words, including `0 GPUs`."""
    return " and ".join(counted(round(resources.get(kind, 0.0), 4), kind) for kind in _KINDS)


def _environment(threads: int) -> dict[str, str]:
    """Return the environment variables of a process with this number of threads."""
    chosen = Threads(count=threads, waiting="sleep", wake_microseconds=None, idle_cores=None, reason="")
    forwarded = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
    return {**forwarded, **variables(chosen), "PYTHONPATH": _python_path()}


def _python_path() -> str:
    """Return PYTHONPATH with the folder of this package first, so that every process runs the same code."""
    own = str(Path(betterhalf.__file__).resolve().parents[1])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != own]
    return os.pathsep.join([own, *paths])
