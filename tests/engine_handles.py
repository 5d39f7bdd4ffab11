"""Handles of engines in threads, with faults that tests choose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from betterhalf.errors import EngineDiedError, EngineError
from betterhalf.precision.contract import SideReport, weights_digests
from betterhalf.types import Completion, GenerateRequest


class Stream:
    """Weights of one version in this process; a `WeightStream`."""

    def __init__(self, policy_version: int = 1, weights: Sequence[tuple[str, Tensor]] | None = None) -> None:
        self.policy_version = policy_version
        self.weights = weights or [("a", torch.full((2, 3), float(policy_version))), ("b", torch.ones(4))]
        self.reads = 0

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.weights)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.reads += 1
        return iter(self.weights)

    def digests(self) -> dict[str, str]:
        return weights_digests(self.weights)

    def changed(self) -> Stream | None:
        return None

    def whole(self) -> Stream:
        return self


class PartialStream(Stream):
    """A stream without the weight "b", which is the same in every version."""

    def __init__(self, whole: Stream) -> None:
        super().__init__(whole.policy_version, [(name, tensor) for name, tensor in whole.weights if name != "b"])
        self._whole = whole

    def digests(self) -> dict[str, str]:
        return self._whole.digests()

    def whole(self) -> Stream:
        return self._whole


class StubEngine:
    """An engine whose completions are a function of key, sibling and weights."""

    def __init__(self) -> None:
        self.weights: list[tuple[str, Tensor]] = []
        self.version: int | None = None

    def generate(self, requests: Sequence[GenerateRequest], sampling: Any) -> list[tuple[Completion, ...]]:
        if self.version is None:
            raise EngineError("the engine holds no weights")
        return [tuple(self._completion(r, r.first_sibling + i) for i in range(r.group_size)) for r in requests]

    def _completion(self, request: GenerateRequest, sibling: int) -> Completion:
        assert self.version is not None
        tokens = (*request.token_ids, *request.key, sibling)
        logprobs = tuple(-1.0 / (2 + token + self.version) for token in tokens)
        return Completion(
            token_ids=tokens, behavior_logprobs=logprobs, finish_reason="stop", policy_version=self.version
        )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        return [tuple(-float(token + (self.version or 0)) for token in ids[1:]) for ids in sequences]

    def load_weights(self, weights: Any, *, policy_version: int, partial: bool = False) -> None:
        self.version, before = None, dict(self.weights) if partial else {}
        self.weights = list((before | dict(weights)).items())
        self.version = policy_version

    def digests(self) -> dict[str, str]:
        return weights_digests(self.weights)

    def report(self) -> SideReport:
        return SideReport(side="engine", dtypes={"compute": "fp16"}, facts={"torch": "2"}, digests=self.digests())

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


@dataclass
class ThreadHandle:
    """One engine in a thread, which answers in order; implements `EngineHandle`."""

    number: int
    build: Callable[[], Any] = StubEngine
    faults: dict[str, list[Callable[[], None] | None]] = field(default_factory=dict)
    """Verb -> what happens in its next calls before they are answered; None for nothing. `replace` is one too."""
    after: Callable[[str, Any], Any] = lambda _verb, answer: answer
    """Changes the answers."""
    calls: list[str] = field(default_factory=list)
    asked: list[list[GenerateRequest]] = field(default_factory=list)
    starts: int = 0
    closed: int = 0
    alive: bool = False

    def __post_init__(self) -> None:
        self._threads: list[ThreadPoolExecutor] = []
        self._start()

    def _start(self) -> None:
        self.starts += 1
        self._threads.append(ThreadPoolExecutor(1))
        self.alive, self.engine = True, self.build()

    @property
    def name(self) -> str:
        return f"engine {self.number} (host h, process {100 * self.starts + self.number})"

    def _call(self, verb: str, act: Callable[[Any], Any]) -> Future[Any]:
        self.calls.append(verb)
        waiting = self.faults.get(verb, [])
        fault = waiting.pop(0) if waiting else None

        def answer() -> Any:
            try:
                if not self.alive:
                    raise EngineDiedError("the process ended before it was asked")
                if fault is not None:
                    fault()
                return self.after(verb, act(self.engine))
            except EngineDiedError:
                self.alive = False
                raise

        return self._threads[-1].submit(answer)

    def generate(self, requests: Sequence[GenerateRequest], sampling: Any) -> Future[Any]:
        self.asked.append(list(requests))
        return self._call("generate", lambda engine: engine.generate(requests, sampling))

    def score(self, sequences: Sequence[Sequence[int]]) -> Future[Any]:
        return self._call("score", lambda engine: engine.score(sequences))

    def load_weights(self, weights: Any) -> Future[Any]:
        def load(engine: Any) -> dict[str, str]:
            partial = {"partial": True} if weights.whole() is not weights else {}
            engine.load_weights(weights, policy_version=weights.policy_version, **partial)
            found: dict[str, str] = engine.digests()
            return found

        return self._call("load_weights", load)

    def report(self) -> Future[Any]:
        return self._call("report", lambda engine: engine.report())

    def sleep(self) -> Future[Any]:
        return self._call("sleep", lambda engine: engine.sleep())

    def wake(self) -> Future[Any]:
        return self._call("wake", lambda engine: engine.wake())

    def replace(self) -> Future[Any]:
        self._start()
        return self._call("replace", lambda _engine: None)

    def close(self) -> None:
        self.closed += 1
        for threads in self._threads:
            threads.shutdown(wait=False)


def dies(message: str = "the process ended, signal 9") -> Callable[[], None]:
    def die() -> None:
        raise EngineDiedError(message)

    return die


def fails(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def meets(barrier: threading.Barrier, then: Callable[[], None] | None = None) -> Callable[[], None]:
    """Return a fault that waits until as many engines have arrived as the barrier expects."""

    def meet() -> None:
        barrier.wait(10)
        if then is not None:
            then()

    return meet


def with_logprob(groups: list[tuple[Completion, ...]], value: float) -> list[tuple[Completion, ...]]:
    """Replace the last logprob of the last completion."""
    last = groups[-1][-1]
    spoiled = replace(last, behavior_logprobs=(*last.behavior_logprobs[:-1], value))
    return [*groups[:-1], (*groups[-1][:-1], spoiled)]
