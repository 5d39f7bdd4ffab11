"""Pool of engines that acts as one engine: it spreads requests over engines in processes of their own.

A draw depends on its key (seed, step, prompt, sibling, position) alone, so the pool samples the same tokens as a single
engine, up to rounding that differs between batch shapes. The pool does not depend on Ray: it uses engines through
`EngineHandle`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, cast

from torch import Tensor

from betterhalf.config.schema import SamplingConfig
from betterhalf.errors import EngineDiedError, EngineError, RunError
from betterhalf.precision.contract import SideReport, verify_sync
from betterhalf.rollout.pool_checks import Scored, check_completions, require_equal, require_equal_scores
from betterhalf.rollout.restarts import Restarts
from betterhalf.rollout.together import Steps, reply, run_together
from betterhalf.rollout.weight_group import Delivery
from betterhalf.types import Completion, DtypeName, GenerateRequest
from betterhalf.wire import WeightStream

_T = TypeVar("_T")


class EngineHandle(Protocol):
    """One engine in a process of its own, which answers one call at a time, in order.

    Calls return at once; each future raises as `RolloutEngine` does. A future fails with EngineDiedError if the process
    ends, or does not answer within `cluster.call_seconds`.
    """

    @property
    def name(self) -> str:
        """Name of the engine in messages, with its host and process id."""
        ...

    def generate(
        self, requests: Sequence[GenerateRequest], sampling: SamplingConfig
    ) -> Future[list[tuple[Completion, ...]]]:
        """Sample; see `RolloutEngine.generate`."""
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> Future[list[tuple[float, ...]]]:
        """Score given tokens; see `RolloutEngine.score`."""
        ...

    def load_weights(self, weights: WeightStream) -> Future[dict[str, str]]:
        """Replace the weights, and return the digests of all weights that the engine holds.

        A stream that is not its own `whole` leaves out weights that are the same in every version, which the engine
        already holds.
        """
        ...

    def report(self) -> Future[SideReport]:
        """Report what the engine runs; see `RolloutEngine.report`."""
        ...

    def sleep(self) -> Future[None]:
        """See `RolloutEngine.sleep`."""
        ...

    def wake(self) -> Future[None]:
        """See `RolloutEngine.wake`."""
        ...

    def replace(self) -> Future[None]:
        """End the process if it still runs, and start a new one without weights; the future is done when it is ready.

        The future fails with EngineDiedError if the new process ends, or is not ready within `cluster.start_seconds`.
        """
        ...

    def close(self) -> None:
        """End the process; calling it twice is harmless."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Requests of one call of `generate` that one engine gets."""

    engine: int
    requests: tuple[int, ...]
    """Indices into the requests of the call, in order."""
    tokens: int
    """Tokens that may have to be computed: prompt plus limit of each completion."""


def share_requests(requests: Sequence[GenerateRequest], limit: int, engines: int) -> tuple[Share, ...]:
    """Give each request, longest first, to the engine with the fewest outstanding tokens; ties go to the lowest engine.

    Siblings of a prompt stay together, because they share its prefill. The shares depend on the requests alone, so that
    a replaced engine gets the same requests as the old one, in the same batches.

    Args:
        requests: requests of one call of `generate`.
        limit: maximum number of tokens of a completion.
        engines: number of engines.

    Returns:
        One share for each engine; some may be empty.
    """
    tokens = [_most_tokens(request, limit) for request in requests]
    outstanding = [(0, engine) for engine in range(engines)]
    taken: list[list[int]] = [[] for _ in range(engines)]
    for index in sorted(range(len(requests)), key=lambda index: (-tokens[index], index)):
        before, engine = heapq.heappop(outstanding)
        taken[engine].append(index)
        heapq.heappush(outstanding, (before + tokens[index], engine))
    totals = {engine: total for total, engine in outstanding}
    return tuple(
        Share(engine=engine, requests=tuple(sorted(indices)), tokens=totals[engine])
        for engine, indices in enumerate(taken)
    )


def _most_tokens(request: GenerateRequest, limit: int) -> int:
    own = limit if request.max_tokens is None else min(limit, request.max_tokens)
    return len(request.token_ids) + request.group_size * own


_Act = Callable[[EngineHandle], Steps[_T]]
"""One call of the pool, on one engine."""


class EnginePool:
    """Engine made of several; implements `RolloutEngine`. Its methods are called from one thread at a time.

    An engine that dies is replaced. The new one loads the pool's latest weights, is checked against their digests and
    against the scores of the other engines, and gets the same requests again; results of the others are kept.
    `EngineDiedError` is raised only beyond `max_restarts`, so nothing above the pool restarts an engine.

    Any other error of an engine is raised at once and names the engine. The other engines finish their current requests
    before they answer another call.
    """

    def __init__(
        self,
        engines: Sequence[EngineHandle],
        *,
        max_restarts: int,
        rollout_dtype: DtypeName,
        tell: Callable[[str], None] | None = None,
        delivery: Delivery | None = None,
    ) -> None:
        """Take over started engines without weights.

        Args:
            engines: at least one engine.
            max_restarts: maximum number of replacements between two calls of `take_restarts`, over all engines.
            rollout_dtype: format that the engines compute in; it bounds the differences between their scores.
            tell: receives a note of each replacement; standard error by default.
            delivery: sends weights to all engines at the same time; without it, each loads them by itself.
        """
        assert engines, "config.cluster requires an engine"
        self._engines = tuple(engines)
        self._rollout_dtype: DtypeName = rollout_dtype
        self._restarts = Restarts(max_restarts, tell, setting="cluster.max_restarts")
        self._delivery = delivery
        self._dead: set[int] = set()
        self._empty: set[int] = set()
        self._closed = False
        self._weights: WeightStream | None = None
        self._held: dict[str, str] = {}
        self._scored: Scored | None = None

    # -- sampling and scoring

    def generate(self, requests: Sequence[GenerateRequest], sampling: SamplingConfig) -> list[tuple[Completion, ...]]:
        """See `RolloutEngine.generate`.

        Raises:
            EngineError: an engine returns logprobs that are not finite, another number of completions, or another
                policy version; the message names the engine.
        """
        version = self._require_weights("generate").policy_version
        named = [replace(request, prompt_id=request.prompt_id or str(i)) for i, request in enumerate(requests)]
        shares = [share for share in share_requests(named, sampling.max_tokens, len(self._engines)) if share.requests]
        asked = {share.engine: [named[index] for index in share.requests] for share in shares}

        def sample(mine: list[GenerateRequest]) -> _Act[list[tuple[Completion, ...]]]:
            return lambda engine: _sample(engine, mine, sampling, version)

        found = self._ask({engine: sample(mine) for engine, mine in asked.items()})
        groups = {
            index: group for share in shares for index, group in zip(share.requests, found[share.engine], strict=True)
        }
        return [groups[index] for index in range(len(requests))]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Score the sequences on every engine, so that each is verified, and return the scores of the first.

        Raises:
            WeightSyncError: an engine's scores differ from the first one's by more than the rollout dtype explains.
        """
        self._require_weights("score")
        asked = tuple(tuple(token_ids) for token_ids in sequences)
        found = self._ask_all(lambda engine: reply(engine.score(asked)))
        first = Scored(sequences=asked, scores=found[0], name=self._engines[0].name)
        for index in range(1, len(self._engines)):
            require_equal_scores(first, found[index], self._engines[index].name, self._rollout_dtype)
        if asked and self._scored is None:
            self._scored = first
        return found[0]

    # -- weights

    def load_weights(
        self, weights: Iterable[tuple[str, Tensor]], *, policy_version: int, partial: bool = False
    ) -> None:
        """Load the same weights into all engines at the same time; see `RolloutEngine.load_weights`.

        An engine that does not receive them by `delivery` loads them by itself. The version advances when all engines
        have acknowledged. An engine that dies meanwhile is replaced and loaded from the start. After any other error,
        `generate` and `score` are refused until the next `load_weights`.

        Args:
            weights: a `WeightStream`, which is kept, and read again for an engine that is replaced later.
            policy_version: version of these weights.
            partial: the stream leaves out weights that are the same in every version. An engine that has not loaded
                them gets the whole stream.

        Raises:
            WeightSyncError: an engine holds other weights than were sent; the message names it and the first tensor.
        """
        assert hasattr(weights, "digests"), "an engine that is replaced reads the weights again"
        stream = cast(WeightStream, weights)
        assert stream.policy_version == policy_version
        loaded = self._weights is not None
        self._forget_weights()
        received = self._deliver(stream)

        def take(index: int) -> _Act[dict[str, str]]:
            held = received.get(index)
            if held is not None:
                return lambda engine: _verified(stream, held)
            # Read when the engine loads: by then, `_empty` holds each engine that was replaced meanwhile.
            return lambda engine: _load(engine, stream if loaded and index not in self._empty else stream.whole())

        self._held = self._ask({index: take(index) for index in range(len(self._engines))}, loaded=False)[0]
        self._weights = stream.whole()
        self._empty.clear()

    def _deliver(self, weights: WeightStream) -> Mapping[int, dict[str, str]]:
        alive = [index for index in range(len(self._engines)) if index not in self._dead]
        return self._delivery.deliver(weights, alive) if self._delivery is not None and alive else {}

    def _forget_weights(self) -> None:
        self._weights, self._held, self._scored = None, {}, None

    def _require_weights(self, verb: str) -> WeightStream:
        if self._weights is None:
            raise EngineError(f"the engines hold no weights; call load_weights before {verb}")
        return self._weights

    def digests(self) -> dict[str, str]:
        """Return the digests of the weights that the engines hold, on which all agreed when they were loaded.

        Raises:
            EngineError: the engines hold no weights, for example because the last `load_weights` failed.
        """
        self._require_weights("digests")
        return dict(self._held)

    def report(self) -> SideReport:
        """Return the report on which all engines agree.

        Raises:
            ContractError: engines differ in formats, facts or weights; the message shows each engine's value.
        """
        reports = self._ask_all(lambda engine: reply(engine.report()))
        require_equal({self._engines[index].name: report for index, report in reports.items()})
        path = {} if self._delivery is None else {"transfer": self._delivery.path}
        return replace(reports[0], facts=reports[0].facts | path)

    # -- sharing devices, and the processes

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`. An engine found dead is replaced by the next call that needs it."""
        run_together({index: self._sleep(index) for index in range(len(self._engines)) if index not in self._dead})

    def _sleep(self, index: int) -> Steps[None]:
        engine = self._engines[index]
        try:
            yield engine.sleep()
        except EngineDiedError as error:
            self._note_death(index, error)
        except RunError as error:
            raise _named(error, engine) from error

    def wake(self) -> None:
        """See `RolloutEngine.wake`; an engine that ended during sleep is replaced.

        The new one loads weights only when they are needed: often a weight sync follows, and if a whole host was lost,
        the weights of the last sync may be lost too.
        """
        self._ask_all(lambda engine: reply(engine.wake()), loaded=False)

    def restart(self) -> None:
        """Replace every engine that has ended, and forget the weights of all; see `RolloutEngine.restart`."""
        self._forget_weights()
        self.wake()

    def take_restarts(self) -> int:
        """Return the number of replacements since the last call, for the metrics of the step."""
        return self._restarts.take()

    def close(self) -> None:
        """End all engines, even if one of them fails to end; calling it twice is harmless.

        Another thread may call it: a call in progress then fails with EngineDiedError, and replaces nothing.
        """
        self._closed = True
        with ExitStack() as stack:
            for engine in self._engines:
                stack.callback(engine.close)

    def _ask_all(self, act: _Act[_T], *, loaded: bool = True) -> dict[int, _T]:
        return self._ask(dict.fromkeys(range(len(self._engines)), act), loaded=loaded)

    def _ask(self, acts: Mapping[int, _Act[_T]], *, loaded: bool = True) -> dict[int, _T]:
        """Run acts on some engines at the same time, and replace engines that die; return the results by engine.

        Args:
            acts: act of each engine by its index.
            loaded: True if an engine that was replaced must get the weights of the others first.
        """
        return run_together({index: self._attempts(index, act, loaded=loaded) for index, act in acts.items()})

    def _attempts(self, index: int, act: _Act[_T], *, loaded: bool) -> Steps[_T]:
        engine = self._engines[index]
        while True:
            try:
                if index in self._dead:
                    yield engine.replace()
                    self._dead.discard(index)
                    self._empty.add(index)
                if loaded and index in self._empty and self._weights is not None:
                    yield from self._reload(engine, self._weights)
                    self._empty.discard(index)
                return (yield from act(engine))
            except EngineDiedError as error:
                self._note_death(index, error)
            except RunError as error:
                raise _named(error, engine) from error

    def _note_death(self, index: int, error: EngineDiedError) -> None:
        self._dead.add(index)
        if self._closed:
            raise error
        self._restarts.note(_named(error, self._engines[index]))

    def _reload(self, engine: EngineHandle, weights: WeightStream) -> Steps[None]:
        """Give a new process the weights of the others, and compare its first scores with theirs."""
        yield from _load(engine, weights)
        if self._scored is not None:
            scores = yield engine.score(self._scored.sequences)
            require_equal_scores(self._scored, scores, engine.name, self._rollout_dtype)


_Error = TypeVar("_Error", bound=RunError)


def _named(error: _Error, engine: EngineHandle) -> _Error:
    """Return the error with the engine's name in its message."""
    return error if engine.name in str(error) else type(error)(f"{engine.name}: {error}")


def _load(engine: EngineHandle, weights: WeightStream) -> Steps[dict[str, str]]:
    """Load the weights, and compare their digests, as sent, with those of what the engine holds."""
    held: dict[str, str] = yield engine.load_weights(weights)
    verify_sync(weights.digests(), held)
    return held


def _verified(weights: WeightStream, held: dict[str, str]) -> Steps[dict[str, str]]:
    """Compare the digests of weights that an engine has received, without calling the engine."""
    verify_sync(weights.digests(), held)
    known: Future[dict[str, str]] = Future()
    known.set_result(held)
    return reply(known)


def _sample(
    engine: EngineHandle, requests: list[GenerateRequest], sampling: SamplingConfig, version: int
) -> Steps[list[tuple[Completion, ...]]]:
    groups: list[tuple[Completion, ...]] = yield engine.generate(requests, sampling)
    check_completions(requests, groups, version)
    return groups
