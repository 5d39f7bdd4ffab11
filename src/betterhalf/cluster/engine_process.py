"""One engine in a process of its own: the same native or vLLM engine, with the same methods, as in one process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch

from betterhalf.cluster.placement import Slot
from betterhalf.cluster.process import Process
from betterhalf.cluster.session import Session
from betterhalf.cluster.weight_versions import SentWeights, StoredPart, StoredWeights, read_parts
from betterhalf.config.schema import RunConfig, SamplingConfig
from betterhalf.distributed.group import Membership
from betterhalf.errors import EngineDiedError, EngineError
from betterhalf.models.description import describe_model
from betterhalf.precision.contract import SideReport
from betterhalf.precision.device import choose_device
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine, receiver_of
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.rollout.weight_group import HandleReceiver, Layout, WeightReceiver
from betterhalf.types import Completion, GenerateRequest
from betterhalf.wire import WeightStream


class EngineProcess:
    """One engine. It is built when weights arrive, because only the weights show whether the head is tied."""

    def __init__(self, config: RunConfig) -> None:
        """Read the model's configuration files.

        Raises:
            InputError: this host lacks the model, or the device.
        """
        self._config = config
        self._stop_token_ids = describe_model(config.model).stop_token_ids
        self._precision = build_precision(config.precision, choose_device(config), exact=config.exact)
        self._engine: RolloutEngine | None = None
        self._receiver: WeightReceiver | None = None

    def ready(self) -> None:
        """Return once the process can be used."""

    def load_weights(
        self, parts: Sequence[StoredPart], policy_version: int, model_config: Any, partial: bool
    ) -> dict[str, str]:
        """Read the parts from the object store one by one, load them, and return the digests of what the engine holds.

        An error part-way leaves the engine without weights: it refuses to sample before a complete load.

        Args:
            parts: all weights, or those that can change.
            policy_version: number of applied updates in the weights.
            model_config: transformers configuration of the model.
            partial: True if some weights are left out; see `RolloutEngine.load_weights`.
        """
        engine = self._built(model_config)
        # On a GPU the engine may pass the weights to its own processes by handles of GPU memory.
        weights = ((name, tensor.to(self._precision.device)) for name, tensor in read_parts(parts))
        engine.load_weights(weights, policy_version=policy_version, partial=partial)
        return engine.digests()

    def _built(self, model_config: Any) -> RolloutEngine:
        if self._engine is None:
            self._engine = build_engine(self._config, model_config, self._stop_token_ids, self._precision)
        return self._engine

    # -- weights that bypass the object store; see `cluster.delivery`

    def prepare(self, layout: Layout, model_config: Any) -> None:
        """Build and start the engine, and check names and shapes; see `WeightReceiver.prepare`."""
        engine = self._built(model_config)
        self._receiver = self._receiver or receiver_of(self._config, engine, self._precision.device)
        self._receiver.prepare(layout)

    def join(self, membership: Membership) -> None:
        """Join a weight group; see `WeightReceiver.join`."""
        self._prepared.join(membership)

    def receive(self, layout: Layout, policy_version: int) -> dict[str, str]:
        """Receive and load all weights, and return the digests of what the engine holds."""
        self._prepared.receive(layout, policy_version=policy_version)
        return self._loaded("digests").digests()

    def leave(self) -> None:
        """Leave the weight group; does nothing outside of a group."""
        if self._receiver is not None:
            self._receiver.leave()

    def give_up(self) -> None:
        """Leave the weight group; called with `aside=True`, while the engine joins or receives."""
        if self._receiver is not None:
            self._receiver.give_up()

    @property
    def _prepared(self) -> WeightReceiver:
        assert self._receiver is not None, "join and receive before prepare"
        return self._receiver

    def begin_update(self) -> None:
        """See `HandleReceiver.begin_update`."""
        self._by_handles.begin_update()

    def update(self, info: dict[str, Any]) -> None:
        """See `HandleReceiver.update`."""
        self._by_handles.update(info)

    def finish_update(self, wire_dtype: torch.dtype, policy_version: int) -> dict[str, str]:
        """End an update by handles, and return the digests of what the engine holds."""
        self._by_handles.finish_update(wire_dtype, policy_version=policy_version)
        return self._loaded("digests").digests()

    def abandon_update(self) -> None:
        """See `HandleReceiver.abandon_update`."""
        self._by_handles.abandon_update()

    @property
    def _by_handles(self) -> HandleReceiver:
        engine: object = self._engine
        assert isinstance(engine, HandleReceiver), "the configuration allows handles for such engines alone"
        return engine

    def generate(self, requests: Sequence[GenerateRequest], sampling: SamplingConfig) -> list[tuple[Completion, ...]]:
        """See `RolloutEngine.generate`."""
        return self._loaded("generate").generate(requests, sampling)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """See `RolloutEngine.score`."""
        return self._loaded("score").score(sequences)

    def report(self) -> SideReport:
        """See `RolloutEngine.report`."""
        return self._loaded("report").report()

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`; without weights there is nothing to free."""
        if self._engine is not None:
            self._engine.sleep()

    def wake(self) -> None:
        """See `RolloutEngine.wake`."""
        if self._engine is not None:
            self._engine.wake()

    def _loaded(self, verb: str) -> RolloutEngine:
        if self._engine is None:
            raise EngineError(f"the engine holds no weights; call load_weights before {verb}")
        return self._engine


class ClusterEngine:
    """One engine in a process of a session, which `replace` replaces; implements `rollout.pool.EngineHandle`."""

    def __init__(self, config: RunConfig, session: Session, slot: Slot, index: int) -> None:
        """Start the process, without waiting for it."""
        self._config, self._session, self._slot, self._index = config, session, slot, index
        self._process = self._start()

    def _start(self) -> Process:
        name = f"engine {self._index}"
        return self._session.start(EngineProcess, self._slot, name, EngineDiedError, config=self._config)

    @property
    def name(self) -> str:
        """See `EngineHandle.name`."""
        return self._process.name

    def _call(self, method: str, *arguments: Any) -> Future[Any]:
        return self._process.call(method, *arguments, seconds=self._config.cluster.call_seconds)

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: SamplingConfig
    ) -> Future[list[tuple[Completion, ...]]]:
        """See `EngineHandle.generate`."""
        return self._call("generate", requests, sampling)

    def score(self, sequences: Sequence[Sequence[int]]) -> Future[list[tuple[float, ...]]]:
        """See `EngineHandle.score`."""
        return self._call("score", sequences)

    def load_weights(self, weights: WeightStream) -> Future[dict[str, str]]:
        """See `EngineHandle.load_weights`; the weights are those of a `TrainerGroup`."""
        assert isinstance(weights, StoredWeights | SentWeights), "an engine of a cluster reads from the object store"
        partial = weights.whole() is not weights
        return self._call("load_weights", weights.parts, weights.policy_version, weights.model_config, partial)

    def call(self, method: str, *arguments: Any, seconds: float, aside: bool = False) -> Future[Any]:
        """Call a method of `EngineProcess`; see `Process.call`."""
        return self._process.call(method, *arguments, seconds=seconds, aside=aside)

    @property
    def process(self) -> Process:
        """Process of the engine; `replace` changes it."""
        return self._process

    def report(self) -> Future[SideReport]:
        """See `EngineHandle.report`."""
        return self._call("report")

    def sleep(self) -> Future[None]:
        """See `EngineHandle.sleep`."""
        return self._call("sleep")

    def wake(self) -> Future[None]:
        """See `EngineHandle.wake`."""
        return self._call("wake")

    def replace(self) -> Future[None]:
        """See `EngineHandle.replace`."""
        self._process.end()
        try:
            self._process = self._start()
        except Exception as error:
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed
        return self._process.call("ready", seconds=self._config.cluster.start_seconds)

    def close(self) -> None:
        """See `EngineHandle.close`."""
        self._process.end()


def start_engines(config: RunConfig, session: Session, slots: Sequence[Slot]) -> tuple[ClusterEngine, ...]:
    """Start all engines of a run, without waiting for them."""
    return tuple(ClusterEngine(config, session, slot, index) for index, slot in enumerate(slots))
