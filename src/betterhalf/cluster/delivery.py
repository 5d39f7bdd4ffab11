"""Transfer of weights from ranks to engines that bypasses the object store: NCCL broadcast, or handles of GPU memory.

The controller calls both ends at the same time and moves no weights itself. If a transfer fails, each engine loads the
weights from the object store by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, Protocol

from betterhalf.cluster.engine_process import ClusterEngine
from betterhalf.cluster.process import Process
from betterhalf.cluster.trainer_group import TrainerGroup
from betterhalf.cluster.weight_versions import Sent, SentWeights
from betterhalf.config.schema import RunConfig
from betterhalf.config.transfer import PATHS
from betterhalf.distributed.group import Membership
from betterhalf.errors import ClusterError, EngineError, InputError, MissingExtraError, TrainerDiedError
from betterhalf.rollout.handles import merged
from betterhalf.rollout.restarts import to_standard_error
from betterhalf.rollout.weight_group import Delivery, WireWeight
from betterhalf.types import TransferName
from betterhalf.wire import WeightStream

_FAILURES = 2
"""Failures in a row after which the object store takes over for the rest of the run."""
_GRACE_SECONDS = 60.0
"""Seconds within which an engine that was told to give up must answer, before its process is ended."""
_STORE = PATHS["object_store"]
_FATAL = (TrainerDiedError, ClusterError)
"""Errors that another path would not avoid."""


class Path(Protocol):
    """One way of sending weights."""

    def send(self, weights: SentWeights, engines: Sequence[ClusterEngine]) -> list[dict[str, str]]:
        """Send all weights to all engines, and return the digests of what each engine holds.

        Raises:
            Exception: any failure; each engine can then load other weights, or has ended.
        """
        ...


class Courier:
    """Delivery by one path, with the object store as the fallback; implements `weight_group.Delivery`."""

    def __init__(
        self, way: Path, name: str, engines: Sequence[ClusterEngine], tell: Callable[[str], None] | None = None
    ) -> None:
        """Deliver by `way`; each call names some of `engines`.

        Args:
            way: path to try.
            name: name of the path in words.
            engines: all engines of the pool.
            tell: receives a note of each failure; standard error by default.
        """
        self._way, self._name, self._engines = way, name, tuple(engines)
        self._tell = tell or to_standard_error
        self._failures = 0
        self.path = name
        """See `Delivery.path`."""

    def deliver(self, weights: WeightStream, engines: Sequence[int]) -> Mapping[int, dict[str, str]]:
        """See `Delivery.deliver`."""
        assert isinstance(weights, SentWeights), "a run that delivers weights has them sent by rank 0"
        if self._failures >= _FAILURES:
            return {}
        try:
            held = self._way.send(weights, [self._engines[index] for index in engines])
        except (*_FATAL, InputError, MissingExtraError):
            raise
        except Exception as error:
            self._note(error)
            return {}
        self._failures, self.path = 0, self._name
        return dict(zip(engines, held, strict=True))

    def _note(self, error: Exception) -> None:
        self._failures += 1
        self.path = f"{_STORE}, because {self._name} failed"
        span = "for this weight sync" if self._failures < _FAILURES else "for the rest of the run"
        why = str(error).strip() or type(error).__name__
        self._tell(f"note: the weights could not be sent by {self._name}: {why}\nThe object store is used {span}.")


class StoreOnly:
    """Delivery through the object store alone; implements `weight_group.Delivery`."""

    path = _STORE

    def deliver(self, weights: WeightStream, engines: Sequence[int]) -> Mapping[int, dict[str, str]]:
        """Deliver nothing: every engine loads by itself."""
        return {}


class Broadcast:
    """Broadcast by rank 0 to all workers of all engines, in one group; implements `Path`.

    The group is opened before the first sync, and again after a process was replaced or a sync failed. All members give
    up a sync that does not finish within half of `cluster.collective_seconds`.
    """

    def __init__(self, config: RunConfig, trainer: TrainerGroup) -> None:
        """Store the settings; the first `send` opens the group."""
        self._trainer = trainer
        # Half, because the other ranks wait for rank 0 in a collective while it sends.
        self._limit, self._start_limit = config.cluster.collective_seconds / 2, config.cluster.start_seconds
        self._workers = config.engine.devices
        # With overlap, an engine may have to load weights that the trainer no longer holds.
        self._keep = config.pipeline.max_staleness > 0
        self._layout: tuple[WireWeight, ...] = ()
        self._members: tuple[Process, ...] = ()

    def send(self, weights: SentWeights, engines: Sequence[ClusterEngine]) -> list[dict[str, str]]:
        """See `Path.send`."""
        present = (self._trainer.first, *(engine.process for engine in engines))
        if self._members != present:
            self._open(weights.model_config, engines)
            self._members = present
        try:
            calls = self._each(engines, "receive", self._layout, weights.policy_version)
            with self._watched(engines, calls):
                sent: Sent = self._trainer.on_all("send_weights", self._keep)[0]
                if sent.failure is not None:
                    raise EngineError(f"rank 0 could not send: {sent.failure}")
            held: list[dict[str, str]] = [call.result() for call in calls]
        except BaseException:
            self._members = ()
            raise
        weights.note(sent)
        return held

    def _open(self, model_config: Any, engines: Sequence[ClusterEngine]) -> None:
        """Make rank 0 and all workers join a new group."""
        first, self._members = self._trainer.first, ()
        self._layout = self._trainer.on_all("wire_layout")[0]
        _results(self._each(engines, "leave"))
        _results([engine.call("prepare", self._layout, model_config, seconds=self._start_limit) for engine in engines])
        host, port = first.call("address", seconds=self._limit).result()
        size = 1 + self._workers * len(engines)

        def place(rank: int) -> Membership:
            return Membership(rank=rank, world_size=size, host=host, port=port, seconds=self._limit)

        calls = [
            engine.call("join", place(1 + index * self._workers), seconds=self._limit + _GRACE_SECONDS)
            for index, engine in enumerate(engines)
        ]
        with self._watched(engines, calls):
            first.call("join_engines", place(0), seconds=self._limit + _GRACE_SECONDS).result()
        _results(calls)

    def _each(self, engines: Sequence[ClusterEngine], method: str, *arguments: Any) -> list[Future[Any]]:
        return [engine.call(method, *arguments, seconds=self._limit + _GRACE_SECONDS) for engine in engines]

    @contextmanager
    def _watched(self, engines: Sequence[ClusterEngine], calls: Sequence[Future[Any]]) -> Iterator[None]:
        """Wait for the calls at the end of the context, and raise the first failure.

        After a failure, all members give up. A sync that exceeds the time limit counts as a failure.
        """
        first, failures, lock = self._trainer.first, [], threading.Lock()

        def fail(error: BaseException) -> None:
            with lock:
                failures.append(error)
                if len(failures) > 1:
                    return
            # No time limit: the call may wait for a checkpoint to be written, which is no reason to end the rank.
            first.call("leave_engines", aside=True)
            for engine, call in zip(engines, calls, strict=True):
                if not call.done():
                    engine.call("give_up", seconds=_GRACE_SECONDS, aside=True)

        def late() -> None:
            fail(EngineError(f"it took longer than {self._limit:g} s, half of cluster.collective_seconds"))

        for call in calls:
            call.add_done_callback(lambda done: fail(error) if (error := done.exception()) is not None else None)
        timer = threading.Timer(self._limit, late)
        timer.daemon = True
        timer.start()
        try:
            yield
        except Exception as error:
            fail(error)
            if isinstance(error, _FATAL):
                raise
        except BaseException as error:
            fail(error)
            raise
        finally:
            wait(calls, timeout=None if not failures else _GRACE_SECONDS)
            timer.cancel()
        if failures:
            raise failures[0]


class Handles:
    """Handles of GPU memory from each rank to the engine on its GPU, part by part; implements `Path`."""

    def __init__(self, config: RunConfig, trainer: TrainerGroup) -> None:
        """Store the settings."""
        self._trainer, self._cluster = trainer, config.cluster

    def send(self, weights: SentWeights, engines: Sequence[ClusterEngine]) -> list[dict[str, str]]:
        """See `Path.send`."""
        layout: tuple[WireWeight, ...] = self._trainer.on_all("wire_layout")[0]
        self._ask(engines, "prepare", layout, weights.model_config)
        try:
            self._ask(engines, "begin_update")
            sent = self._parts(engines)
            held = self._ask(engines, "finish_update", layout[0].dtype, weights.policy_version)
        except _FATAL:
            raise
        except Exception:
            wait([engine.call("abandon_update", seconds=self._cluster.call_seconds) for engine in engines])
            raise
        weights.note(sent)
        return held

    def _parts(self, engines: Sequence[ClusterEngine]) -> Sent:
        """Send all parts; the ranks read their weights to the end even if an engine fails."""
        try:
            while shown := [info for info in self._trainer.on_all("next_handles", self._cluster.engines) if info]:
                self._ask(engines, "update", merged(shown))
        except _FATAL:
            raise
        except Exception:
            self._trainer.on_all("end_handles")
            raise
        sent: list[Sent] = self._trainer.on_all("end_handles")
        return sent[0]

    def _ask(self, engines: Sequence[ClusterEngine], method: str, *arguments: Any) -> list[Any]:
        calls = [engine.call(method, *arguments, seconds=self._cluster.call_seconds) for engine in engines]
        wait(calls)
        return _results(calls)


def _results(calls: Sequence[Future[Any]]) -> list[Any]:
    """Wait for all calls, and return their results; raise the first error, in the order of the calls."""
    wait(calls)
    errors = [error for call in calls if (error := call.exception()) is not None]
    if errors:
        raise errors[0]
    return [call.result() for call in calls]


_WAYS: dict[TransferName, Callable[[RunConfig, TrainerGroup], Path]] = {"nccl": Broadcast, "ipc": Handles}
"""`config.transfer` -> implementation of its path."""


def open_delivery(config: RunConfig, trainer: TrainerGroup, engines: Sequence[ClusterEngine]) -> Delivery:
    """Return the delivery that `config.transfer` names."""
    if config.transfer == "object_store":
        return StoreOnly()
    return Courier(_WAYS[config.transfer](config, trainer), PATHS[config.transfer], engines)
