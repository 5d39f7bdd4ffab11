"""Several engines answer as one: requests are shared, engines that end are replaced, and disagreement is refused."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.engine_handles import PartialStream, Stream, StubEngine, ThreadHandle, dies, fails, meets, with_logprob

from betterhalf.config.schema import RunConfig, SamplingConfig
from betterhalf.errors import (
    ContractError,
    EngineDiedError,
    EngineError,
    EngineNumericsError,
    InputError,
    WeightSyncError,
)
from betterhalf.precision.contract import SideReport
from betterhalf.rollout.build import capabilities
from betterhalf.rollout.engine import RolloutEngine, take_restarts
from betterhalf.rollout.pool import EnginePool, share_requests
from betterhalf.types import Completion, GenerateRequest

SAMPLING = SamplingConfig(max_tokens=8)


def request(length: int, index: int, group_size: int = 2, **others: Any) -> GenerateRequest:
    return GenerateRequest(
        token_ids=tuple(range(1, length + 1)), group_size=group_size, key=(0, 1, index), prompt_id="", **others
    )


REQUESTS = [request(length, index) for index, length in enumerate((3, 9, 1, 5, 4, 7, 2))]
EXPECTED = [[(*r.token_ids, *r.key, sibling) for sibling in range(2)] for r in REQUESTS]
"""Tokens of a `StubEngine`."""

Make = Callable[..., tuple[EnginePool, list[ThreadHandle]]]


@pytest.fixture
def make() -> Iterator[Make]:
    """Return make(engines, max_restarts=3, load=True, **fields of each handle) -> pool and handles."""
    made: list[EnginePool] = []

    def build(
        engines: int = 2, *, max_restarts: int = 3, load: bool = True, **fields: Any
    ) -> tuple[EnginePool, list[ThreadHandle]]:
        handles = [ThreadHandle(number, **fields) for number in range(engines)]
        pool = EnginePool(handles, max_restarts=max_restarts, rollout_dtype="fp16", tell=NOTES.append)
        made.append(pool)
        if load:
            pool.load_weights(Stream(1), policy_version=1)
        return pool, handles

    NOTES.clear()
    yield build
    for pool in made:
        pool.close()


NOTES: list[str] = []


def tokens(groups: list[tuple[Completion, ...]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


# -- shares


def test_the_longest_request_goes_to_the_engine_with_the_fewest_tokens() -> None:
    """Totals with siblings of at most 8 tokens: 19, 25, 17, 21; in order of length 25 | 21, 19 | 17 on two engines."""
    shares = share_requests([request(length, 0) for length in (3, 9, 1, 5)], 8, 2)
    assert [(s.engine, s.requests, s.tokens) for s in shares] == [(0, (1, 2), 42), (1, (0, 3), 40)]


def test_every_request_is_given_once_and_no_engine_has_more_than_one_request_too_many() -> None:
    asked = [request(1 + (7 * i * i) % 23, i, group_size=1 + i % 3) for i in range(40)]
    costs = [len(r.token_ids) + r.group_size * 16 for r in asked]
    for engines in (1, 2, 3, 7, 64):
        shares = share_requests(asked, 16, engines)
        assert [share.engine for share in shares] == list(range(engines))
        assert sorted(index for share in shares for index in share.requests) == list(range(40))
        assert all(share.requests == tuple(sorted(share.requests)) for share in shares)
        assert [share.tokens for share in shares] == [sum(costs[i] for i in share.requests) for share in shares]
        spread = max(share.tokens for share in shares) - min(share.tokens for share in shares)
        assert spread <= max(costs)


def test_a_request_with_its_own_limit_counts_that() -> None:
    (share,) = share_requests([request(3, 0, group_size=2, max_tokens=2)], 8, 1)
    assert share.tokens == 3 + 2 * 2


def test_equal_requests_alternate_from_the_lowest_engine() -> None:
    shares = share_requests([request(4, index) for index in range(5)], 8, 2)
    assert [share.requests for share in shares] == [(0, 2, 4), (1, 3)]


# -- sampling


@pytest.mark.parametrize("engines", [1, 2, 3, 9])
def test_completions_come_in_request_order_from_any_number_of_engines(make: Make, engines: int) -> None:
    pool, handles = make(engines)
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == EXPECTED
    assert all("generate" in handle.calls for handle in handles[: len(REQUESTS)])
    assert all("generate" not in handle.calls for handle in handles[len(REQUESTS) :])
    assert pool.generate([], SAMPLING) == []


def test_engines_sample_at_the_same_time(make: Make) -> None:
    pool, handles = make(3)
    barrier = threading.Barrier(3)
    for handle in handles:
        handle.faults["generate"] = [meets(barrier)]
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == EXPECTED


def test_a_pool_of_native_engines_samples_what_one_samples(
    make_engine: Callable[..., Any], wire: Callable[..., Any], make: Make
) -> None:
    weights = wire(torch.float32)
    alone = make_engine(load=False)
    alone.load_weights(weights, policy_version=4)
    asked = [
        replace(r, token_ids=tuple((3 * r.key[2] + k * k) % 23 for k in range(len(r.token_ids)))) for r in REQUESTS
    ]
    expected = alone.generate(asked, SamplingConfig(max_tokens=12))
    results = []
    for kills in (0, 1):
        pool, handles = make(2, load=False, build=lambda: make_engine(load=False))
        pool.load_weights(Stream(4, weights), policy_version=4)
        pool.score([(1, 2, 3, 4)])
        handles[1].faults["generate"] = [dies()] * kills
        results.append(pool.generate(asked, SamplingConfig(max_tokens=12)))
        assert pool.digests() == alone.digests() and handles[1].starts == 1 + kills
    assert tokens(results[0]) == tokens(expected)
    for ours, theirs in zip(sum(results[0], ()), sum(expected, ()), strict=True):
        assert ours.behavior_logprobs == pytest.approx(theirs.behavior_logprobs, abs=2e-5)
    assert results[1] == results[0], "a replaced engine gives the same bits"


def test_a_prompt_without_a_name_is_named_by_its_index_in_the_call(make: Make) -> None:
    pool, handles = make(2)
    pool.generate(REQUESTS, SAMPLING)
    assert sorted(r.label(-1) for handle in handles for r in handle.asked[0]) == [f"prompt {i}" for i in range(7)]


def test_bad_input_keeps_its_type_and_message(make: Make) -> None:
    pool, handles = make(2)
    handles[1].faults["generate"] = [fails(InputError("prompt 3 is too long; drop it"))]
    with pytest.raises(InputError, match="^prompt 3 is too long; drop it$"):
        pool.generate(REQUESTS, SAMPLING)


def test_nothing_is_sampled_before_weights_are_loaded(make: Make) -> None:
    pool, handles = make(2, load=False)
    for use in (lambda: pool.generate(REQUESTS, SAMPLING), lambda: pool.score([(1, 2)]), pool.digests):
        with pytest.raises(EngineError, match="hold no weights; call load_weights"):
            use()
    assert handles[0].calls == []


# -- engines that end


def test_only_the_requests_of_an_engine_that_ends_are_asked_again(make: Make) -> None:
    pool, handles = make(3)
    dead = handles[1].name
    handles[1].faults["generate"] = [dies("the process ended, signal 9")]
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == EXPECTED
    assert [len(handle.asked) for handle in handles] == [1, 2, 1]
    assert handles[1].asked[0] == handles[1].asked[1]
    assert handles[1].calls == ["load_weights", "generate", "replace", "load_weights", "generate"]
    assert [handle.starts for handle in handles] == [1, 2, 1]
    (note,) = NOTES
    assert note == (f"note: {dead}: the process ended, signal 9\nRestarting the engine (1 of 3); no step is lost.")
    assert take_restarts(pool) == 1 and take_restarts(pool) == 0


def test_an_engine_that_ended_between_two_calls_is_replaced_by_the_next(make: Make) -> None:
    pool, handles = make(2)
    handles[0].alive = False
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == EXPECTED
    assert [handle.starts for handle in handles] == [2, 1]


def test_engines_that_end_together_are_replaced_together(make: Make) -> None:
    pool, handles = make(2)
    barrier = threading.Barrier(2)
    for handle in handles:
        handle.faults = {"generate": [dies()], "replace": [meets(barrier)]}
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == EXPECTED
    assert pool.take_restarts() == 2


def test_a_new_process_that_ends_while_it_is_loaded_counts_again(make: Make) -> None:
    pool, handles = make(2)
    handles[0].faults = {"generate": [dies()], "replace": [dies(), None], "load_weights": [dies()]}
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == EXPECTED
    assert handles[0].calls[1:] == [
        "generate",
        "replace",
        "replace",
        "load_weights",
        "replace",
        "load_weights",
        "generate",
    ]
    assert pool.take_restarts() == 3


def test_the_limit_counts_all_engines_until_the_next_step(make: Make) -> None:
    pool, handles = make(2, max_restarts=2)
    handles[0].faults["generate"] = [dies()]
    handles[1].faults["generate"] = [dies()]
    pool.generate(REQUESTS, SAMPLING)
    handles[1].faults["generate"] = [dies("the process ran out of memory")]
    with pytest.raises(EngineDiedError) as caught:
        pool.generate(REQUESTS, SAMPLING)
    assert str(caught.value) == (
        "the engine died 3 times in one step (cluster.max_restarts=2); engine 1 (host h, process 201): the process ran "
        "out of memory"
    )
    assert pool.take_restarts() == 2
    handles[0].faults["generate"] = [dies(), dies()]
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == EXPECTED


def test_without_restarts_the_first_death_is_raised_as_it_is(make: Make) -> None:
    pool, handles = make(2, max_restarts=0)
    handles[0].faults["generate"] = [dies("gone")]
    with pytest.raises(EngineDiedError, match=r"^engine 0 \(host h, process 100\): gone$"):
        pool.generate(REQUESTS, SAMPLING)
    assert NOTES == []


def test_an_engine_that_cannot_be_started_again_ends_the_call(make: Make) -> None:
    pool, handles = make(2)
    handles[0].faults = {"generate": [dies()], "replace": [fails(EngineError("not ready within 600 s"))]}
    with pytest.raises(EngineError, match=r"engine 0 .*: not ready within 600 s"):
        pool.generate(REQUESTS, SAMPLING)
    assert pool.take_restarts() == 1
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == EXPECTED, "the next call starts it again"


def test_an_engine_that_ends_while_a_call_is_given_up_is_replaced_later(make: Make) -> None:
    pool, handles = make(2)
    failed = threading.Event()
    handles[0].faults["generate"] = [meets_event(failed, dies())]
    handles[1].faults["generate"] = [fails(EngineError("logits are not finite"))]
    with pytest.raises(EngineError, match="not finite"):
        pool.generate(REQUESTS, SAMPLING)
    failed.set()
    assert pool.take_restarts() == 0, "nobody replaces it behind the caller's back"
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == EXPECTED
    assert [handle.starts for handle in handles] == [2, 1]


def meets_event(event: threading.Event, then: Callable[[], None]) -> Callable[[], None]:
    def wait() -> None:
        assert event.wait(10)
        then()

    return wait


# -- values that cannot be


def test_nan_in_one_engine_names_it_and_is_not_retried(make: Make) -> None:
    pool, handles = make(2)
    held = threading.Event()
    handles[0].faults["generate"] = [meets_event(held, lambda: None)]
    handles[1].faults["generate"] = [fails(EngineError("prompt 1, sibling 0: the logprob is not finite in fp16; fix"))]
    with pytest.raises(EngineError, match=r"^engine 1 \(host h, process 101\): prompt 1, sibling 0: .* not finite"):
        pool.generate(REQUESTS, SAMPLING)  # raised although engine 0 still samples
    held.set()
    assert [handle.starts for handle in handles] == [1, 1] and NOTES == []


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_logprob_that_is_not_finite_is_refused_even_if_the_engine_returns_it(make: Make, value: float) -> None:
    pool, handles = make(2)
    handles[1].after = lambda verb, answer: with_logprob(answer, value) if verb == "generate" else answer
    with pytest.raises(
        EngineNumericsError, match=r"engine 1 .*: prompt 5, sibling 1: a behavior logprob is not finite"
    ):
        pool.generate(REQUESTS, SAMPLING)


def test_a_missing_completion_and_a_stale_version_are_refused(make: Make) -> None:
    pool, handles = make(2)
    handles[0].after = lambda verb, answer: [group[:1] for group in answer] if verb == "generate" else answer
    with pytest.raises(EngineError, match=r"engine 0 .*: the engine returned \[1, 1, 1.*for \[2, 2, 2"):
        pool.generate(REQUESTS, SAMPLING)

    def stale(verb: str, answer: Any) -> Any:
        return [tuple(replace(c, policy_version=0) for c in g) for g in answer] if verb == "generate" else answer

    handles[0].after = stale
    with pytest.raises(EngineError, match=r"engine 0 .*policy version 0 where the pool loaded version 1"):
        pool.generate(REQUESTS, SAMPLING)


# -- weights


def test_weights_are_loaded_into_all_engines_at_the_same_time(make: Make) -> None:
    pool, handles = make(3)
    barrier, stream = threading.Barrier(3), Stream(2)
    for handle in handles:
        handle.faults["load_weights"] = [meets(barrier)]
    pool.load_weights(stream, policy_version=2)
    assert stream.reads == 3 and pool.digests() == stream.digests()
    assert {c.policy_version for group in pool.generate(REQUESTS, SAMPLING) for c in group} == {2}


def test_an_engine_that_ends_in_a_sync_is_loaded_from_the_start_and_the_others_once(make: Make) -> None:
    pool, handles = make(2)
    handles[1].faults["load_weights"] = [dies("the process ended in the middle of a sync")]
    stream = Stream(2)
    pool.load_weights(stream, policy_version=2)
    assert [handle.calls.count("load_weights") for handle in handles] == [2, 3]
    assert {c.policy_version for group in pool.generate(REQUESTS, SAMPLING) for c in group} == {2}
    assert all(handle.engine.digests() == stream.digests() for handle in handles)


def test_what_changed_is_loaded_by_engines_that_have_the_rest_and_all_by_others(make: Make) -> None:
    pool, handles = make(3)
    second, third = Stream(2), Stream(3)
    part = PartialStream(second)
    handles[1].faults["load_weights"] = [dies("in the middle of a sync")]
    pool.load_weights(part, policy_version=2, partial=True)
    assert (part.reads, second.reads) == (2, 1), "the engine that was replaced reads all"
    assert all(handle.engine.digests() == second.digests() == pool.digests() for handle in handles)
    handles[2].faults["generate"] = [dies()]
    pool.generate(REQUESTS, SAMPLING)
    assert (part.reads, second.reads) == (2, 2), "as does one that is replaced later"
    handles[0].faults["load_weights"] = [fails(EngineError("it did not arrive"))]
    with pytest.raises(EngineError, match="did not arrive"):
        pool.load_weights(PartialStream(third), policy_version=3, partial=True)
    part, third = PartialStream(third), third
    before = third.reads
    pool.load_weights(part, policy_version=3, partial=True)
    assert (part.reads, third.reads - before) == (0, 3), "after a failure no engine is sure to have the rest"
    assert all(handle.engine.digests() == third.digests() for handle in handles)


def test_after_a_sync_that_failed_nothing_is_sampled_before_the_next(make: Make) -> None:
    pool, handles = make(2)
    handles[1].faults["load_weights"] = [fails(EngineError("weight 'a' did not arrive"))]
    with pytest.raises(EngineError, match=r"engine 1 .*: weight 'a' did not arrive"):
        pool.load_weights(Stream(2), policy_version=2)
    with pytest.raises(EngineError, match="hold no weights"):
        pool.generate(REQUESTS, SAMPLING)
    pool.load_weights(Stream(2), policy_version=2)
    assert {c.policy_version for group in pool.generate(REQUESTS, SAMPLING) for c in group} == {2}


def test_an_engine_with_other_weights_is_named_with_the_first_tensor(make: Make) -> None:
    pool, handles = make(2)
    spoil = lambda verb, answer: answer | {"b": "0" * 16} if verb == "load_weights" else answer  # noqa: E731
    handles[1].after = spoil
    with pytest.raises(WeightSyncError, match=r"engine 1 .*1 of 2 parameters differ.* the first is b .*held 0000"):
        pool.load_weights(Stream(2), policy_version=2)
    with pytest.raises(EngineError, match="hold no weights"):
        pool.generate(REQUESTS, SAMPLING)
    handles[1].after = lambda _verb, answer: answer
    pool.load_weights(Stream(2), policy_version=2)
    handles[1].faults["generate"], handles[1].after = [dies()], spoil
    with pytest.raises(WeightSyncError, match=r"engine 1 \(host h, process 201\).*the first is b"):
        pool.generate(REQUESTS, SAMPLING)


# -- scores


def test_scores_are_those_of_the_first_engine_and_all_are_asked(make: Make) -> None:
    pool, handles = make(3)
    assert pool.score([(5, 1, 2), (3, 4)]) == [(-2.0, -3.0), (-5.0,)]
    assert all(handle.calls == ["load_weights", "score"] for handle in handles)
    assert pool.score([]) == []


def test_an_engine_whose_scores_differ_is_refused_by_the_bound_of_its_format(make: Make) -> None:
    """FP16 rounds by at most 2^-11, so 64 unit roundoffs of tokens of logprob -2 and -3 are 0.03125 nats."""
    pool, handles = make(2)
    shift = 0.0311
    handles[1].after = lambda verb, answer: [tuple(x + shift for x in s) for s in answer] if verb == "score" else answer
    pool.score([(5, 1, 2)])
    shift = 0.0314
    with pytest.raises(WeightSyncError, match=r"engine 1 .* and engine 0 .* differ by 0.0314 nats.*at most 0.0312"):
        pool.score([(5, 1, 2)])
    shift = math.nan
    with pytest.raises(WeightSyncError, match="differ by nan"):
        pool.score([(5, 1, 2)])


def test_a_replaced_engine_is_scored_before_it_samples(make: Make) -> None:
    pool, handles = make(2)
    pool.score([(5, 1, 2)])
    handles[0].faults["generate"] = [dies()]
    pool.generate(REQUESTS, SAMPLING)
    assert handles[0].calls[-4:] == ["replace", "load_weights", "score", "generate"]

    handles[0].faults["generate"] = [dies()]
    handles[0].after = lambda verb, answer: [(-9.0, -9.0)] if verb == "score" else answer
    with pytest.raises(WeightSyncError, match=r"engine 0 \(host h, process 300\) and engine 0 \(host h, process 100\)"):
        pool.generate(REQUESTS, SAMPLING)


def test_scores_of_older_weights_verify_nobody(make: Make) -> None:
    pool, handles = make(2)
    pool.score([(5, 1, 2)])
    pool.load_weights(Stream(9), policy_version=9)
    handles[0].faults["generate"] = [dies()]
    pool.generate(REQUESTS, SAMPLING)
    assert handles[0].calls[-3:] == ["replace", "load_weights", "generate"]


# -- reports


def reporting(**changes: Any) -> Callable[[str, Any], Any]:
    def change(verb: str, answer: Any) -> Any:
        return replace(answer, **changes) if isinstance(answer, SideReport) else answer

    return change


def test_equal_engines_report_as_one(make: Make) -> None:
    pool, handles = make(3)
    assert pool.report() == handles[0].engine.report()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"dtypes": {"compute": "bf16"}}, r"  compute: fp16 in engine 0 \(.*\), engine 2 \(.*\); bf16 in engine 1 \("),
        ({"facts": {"torch": "3"}}, r"  torch: 2 in engine 0 .*; 3 in engine 1 "),
        ({"facts": {}}, r"  torch: 2 in engine 0 .*; nothing in engine 1 "),
        ({"digests": {"a": "1"}}, r"  weights by digest: \w{12} in engine 0 .*; \w{12} in engine 1 "),
    ],
)
def test_engines_that_differ_are_refused_with_the_region(make: Make, changes: dict[str, Any], line: str) -> None:
    pool, handles = make(3)
    handles[1].after = reporting(**changes)
    with pytest.raises(ContractError, match=line) as caught:
        pool.report()
    assert str(caught.value).count("\n") == 2, "one region"


# -- sleep, restart, close


def test_all_engines_sleep_and_wake(make: Make) -> None:
    pool, handles = make(2)
    pool.sleep()
    pool.wake()
    assert all(handle.calls == ["load_weights", "sleep", "wake"] for handle in handles)


def test_an_engine_that_ends_asleep_is_replaced_at_the_wake_and_not_before(make: Make) -> None:
    """While the engines sleep, the trainer needs the device."""
    pool, handles = make(2)
    handles[0].faults["sleep"] = [dies()]
    pool.sleep()
    pool.sleep()
    assert handles[0].starts == 1 and handles[0].calls.count("sleep") == 1
    pool.wake()
    assert handles[0].calls[-2:] == ["replace", "wake"]
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == EXPECTED
    assert handles[0].calls[-2:] == ["load_weights", "generate"]
    assert pool.take_restarts() == 1


def test_a_sync_after_the_loss_of_a_host_does_not_need_the_weights_that_were_lost_with_it(make: Make) -> None:
    """The host of a rank and an engine ends: the ranks start again, and the object store has forgotten the weights."""
    pool, handles = make(2, load=False)
    lost = Stream(1)
    pool.load_weights(lost, policy_version=1)
    handles[1].alive = False
    lost.weights = []
    pool.wake()
    pool.load_weights(Stream(2), policy_version=2)
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == EXPECTED
    assert handles[1].calls.count("load_weights") == 2


def test_an_engine_that_cannot_sleep_is_named(make: Make) -> None:
    pool, handles = make(2)
    handles[1].faults["sleep"] = [fails(EngineError("no memory on the host"))]
    with pytest.raises(EngineError, match="engine 1 .*: no memory on the host"):
        pool.sleep()


def test_a_restart_replaces_the_dead_and_forgets_the_weights_of_all(make: Make) -> None:
    pool, handles = make(2)
    handles[1].alive = False
    pool.restart()
    assert [handle.starts for handle in handles] == [1, 2]
    with pytest.raises(EngineError, match="hold no weights"):
        pool.generate(REQUESTS, SAMPLING)
    pool.load_weights(Stream(3), policy_version=3)
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == EXPECTED


def test_all_engines_are_closed_even_if_one_cannot_be(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, handles = make(3)
    with monkeypatch.context() as patched:
        patched.setattr(handles[2], "close", fails(RuntimeError("no such process")))
        with pytest.raises(RuntimeError, match="no such process"):
            pool.close()
    assert [handle.closed for handle in handles] == [1, 1, 0]
    pool.close()
    assert [handle.closed for handle in handles] == [2, 2, 1]


def test_a_pool_that_is_closed_while_it_samples_replaces_nothing(make: Make) -> None:
    pool, handles = make(2)
    closed, errors = threading.Event(), []
    for handle in handles:
        handle.faults["generate"] = [meets_event(closed, dies("ended by close"))]

    def sample() -> None:
        try:
            pool.generate(REQUESTS, SAMPLING)
        except EngineDiedError as error:
            errors.append(str(error))

    sampling = threading.Thread(target=sample)
    sampling.start()
    pool.close()
    closed.set()
    sampling.join(10)
    assert errors == ["ended by close"] and NOTES == []
    assert [handle.starts for handle in handles] == [1, 1]


# -- its place in a run


def test_the_pool_is_a_rollout_engine_that_alone_restarts_engines(make: Make) -> None:
    pool, _ = make(1)
    assert {name for name in dir(RolloutEngine) if not name.startswith("_")} <= set(dir(pool))
    engine: RolloutEngine = pool
    assert take_restarts(engine) == 0 and take_restarts(StubEngine()) == 0  # type: ignore[arg-type]
    vllm: dict[str, Any] = {"engine": {"type": "vllm"}}
    assert capabilities(RunConfig.model_validate(vllm)).max_restarts == 3
    assert capabilities(RunConfig.model_validate({**vllm, "cluster": {"backend": "ray"}})).max_restarts == 0
