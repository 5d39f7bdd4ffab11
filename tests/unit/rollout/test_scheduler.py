"""Requests that join and leave the native engine's batch between steps."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from betterhalf.config.schema import SamplingConfig
from betterhalf.errors import EngineError, EngineNumericsError, InputError
from betterhalf.rollout.native.engine import NativeEngine
from betterhalf.rollout.native.running_batch import RunningBatch
from betterhalf.rollout.native.scheduler import Capacity, Scheduler
from betterhalf.types import Completion, GenerateRequest

MakeEngine = Callable[..., NativeEngine]
STOPS = (5, 11)
SAMPLING = SamplingConfig(max_tokens=12)
ROOM = Capacity(sequences=4, length=32, tokens=12)


def requests(count: int = 4, group_size: int = 3) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            token_ids=tuple((3 * index + k * k) % 23 for k in range(4 + 5 * (index % 3))),
            group_size=group_size,
            key=(0, 1, index),
        )
        for index in range(count)
    ]


Found = dict[tuple[int, int], Completion]


def run(scheduler: Scheduler, found: Found, steps: int = 1000) -> None:
    """Run up to `steps` steps, and store the completions by (request, sibling)."""
    for _ in range(steps):
        if not scheduler.unfinished:
            return
        for some in scheduler.step():
            for sequence, completion in zip(some.sequences, some.completions(STOPS, 3), strict=True):
                place = sequence.request, sequence.sibling
                assert place not in found
                found[place] = completion


def require_same(found: Found, group: tuple[Completion, ...], number: int) -> None:
    """Require the same tokens, and logprobs that differ by rounding in another batch shape alone."""
    for sibling, expected in enumerate(group):
        one = found[number, sibling]
        assert (one.token_ids, one.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert one.behavior_logprobs == pytest.approx(expected.behavior_logprobs, abs=2e-5)


@pytest.fixture(params=[0, 1])
def lag(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps by which the host lags behind, as with CUDA graphs."""
    monkeypatch.setattr(RunningBatch, "lag", request.param)
    return int(request.param)


@pytest.mark.usefixtures("lag")
@pytest.mark.parametrize("slots", [2, 4, 256])
def test_a_request_added_late_gets_the_tokens_of_one_present_from_the_start(
    make_engine: MakeEngine, slots: int
) -> None:
    asked = requests()
    expected = make_engine(stop_token_ids=STOPS).generate(asked, SAMPLING)
    scheduler = make_engine(stop_token_ids=STOPS, max_concurrent=slots).scheduler(SAMPLING, ROOM)
    found: Found = {}
    for number, request in enumerate(asked):
        assert scheduler.add(request) == number
        run(scheduler, found, steps=3)
    run(scheduler, found)
    assert len(found) == 12
    for number, group in enumerate(expected):
        require_same(found, group, number)


@pytest.mark.usefixtures("lag")
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("cancelled", [0, 1, 3])
def test_a_cancelled_request_leaves_and_the_others_are_not_affected(
    make_engine: MakeEngine, cancelled: int, steps: int
) -> None:
    """Four slots for twelve sequences: siblings of the cancelled request are running, waiting, or both."""
    asked = requests()
    expected = make_engine(stop_token_ids=STOPS).generate(asked, SAMPLING)
    scheduler = make_engine(stop_token_ids=STOPS, max_concurrent=4).scheduler(SAMPLING, ROOM)
    found: Found = {}
    for request in asked:
        scheduler.add(request)
    run(scheduler, found, steps=steps)
    before = set(found)
    scheduler.cancel(cancelled)
    run(scheduler, found)
    assert not [place for place in set(found) - before if place[0] == cancelled]
    for number in {0, 1, 2, 3} - {cancelled}:
        require_same(found, expected[number], number)


@pytest.mark.usefixtures("lag")
def test_the_slots_of_a_cancelled_request_are_used_by_the_next(make_engine: MakeEngine) -> None:
    engine = make_engine(stop_token_ids=STOPS, max_concurrent=3)
    scheduler = engine.scheduler(SAMPLING, ROOM)
    first, second = requests(2)
    scheduler.add(first)
    scheduler.step()
    number = scheduler.add(second)
    scheduler.step()
    table = engine._table
    assert table is not None and {s.request for s in table.sequences} == {0} and table.free == 0
    scheduler.cancel(0)
    assert table.active == 0 and scheduler.unfinished
    scheduler.step()
    assert {s.request for s in table.sequences} == {1} and table.free == 0
    found: Found = {}
    run(scheduler, found)
    require_same(found, make_engine(stop_token_ids=STOPS).generate([first, second], SAMPLING)[1], number)


@pytest.mark.usefixtures("lag")
def test_cancelling_everything_leaves_an_idle_scheduler_that_takes_new_requests(make_engine: MakeEngine) -> None:
    engine = make_engine(stop_token_ids=STOPS, max_concurrent=2)
    scheduler = engine.scheduler(SAMPLING, ROOM)
    assert not scheduler.unfinished and scheduler.step() == []
    for request in requests(2):
        scheduler.add(request)
    scheduler.step()
    for number in (1, 0, 0):
        scheduler.cancel(number)
    assert not scheduler.unfinished and scheduler.step() == []
    found: Found = {}
    number = scheduler.add(requests(3)[2])
    run(scheduler, found)
    require_same(found, make_engine(stop_token_ids=STOPS).generate(requests(3), SAMPLING)[2], number)


def test_nothing_is_returned_of_two_requests_cancelled_after_their_last_step(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All end in a step that is only launched; the first cancellation reads its result."""
    monkeypatch.setattr(RunningBatch, "lag", 1)
    asked = requests(3)
    expected = make_engine().generate(asked, SAMPLING)
    scheduler = make_engine().scheduler(SAMPLING, Capacity(sequences=9, length=32, tokens=12))
    found: Found = {}
    for request in asked:
        scheduler.add(request)
    run(scheduler, found, steps=11)
    assert not found
    scheduler.cancel(0)
    scheduler.cancel(1)
    run(scheduler, found)
    assert {place: one.token_ids for place, one in found.items()} == {
        (2, sibling): one.token_ids for sibling, one in enumerate(expected[2])
    }


def random_request(draw: random.Random, index: int) -> GenerateRequest:
    length, group_size = draw.randrange(1, 20), draw.choice([0, 1, 2, 4, 7])
    prompt = tuple(draw.randrange(23) for _ in range(length))
    return GenerateRequest(token_ids=prompt, group_size=group_size, key=(0, 1, index))


@pytest.mark.usefixtures("lag")
@pytest.mark.parametrize("seed", range(6))
def test_arrivals_and_cancellations_in_any_order_leave_the_other_completions_as_they_are(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Groups larger than the slots, completions of one token, prompts run ahead, and batches that drain meanwhile."""
    draw = random.Random(seed)
    monkeypatch.setattr("betterhalf.rollout.native.queue._PREFILL_TOKENS", draw.choice([1, 12, 4096]))
    sampling, slots = SamplingConfig(max_tokens=draw.choice([1, 2, 9])), draw.choice([1, 2, 5, 64])
    asked = [random_request(draw, index) for index in range(9)]
    expected = make_engine(stop_token_ids=STOPS).generate(asked, sampling)
    scheduler = make_engine(stop_token_ids=STOPS, max_concurrent=slots).scheduler(sampling, ROOM)
    found: Found = {}
    cancelled: set[int] = set()
    for request in asked:
        number = scheduler.add(request)
        run(scheduler, found, steps=draw.choice([0, 0, 1, 3, 30]))
        if draw.random() < 0.4:
            cancelled.add(one := draw.randrange(number + 1))
            before = {place for place in found if place[0] == one}
            scheduler.cancel(one)
            run(scheduler, found, steps=1)
            assert {place for place in found if place[0] == one} == before
    run(scheduler, found)
    for number in set(range(9)) - cancelled:
        require_same(found, expected[number], number)
    queue, table = scheduler._queue, scheduler._batch.table
    assert not queue._waiting and not queue._unrun and not queue._prefixes and not table.active


def test_a_cancelled_prompt_that_has_not_run_never_runs(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ran = make_engine(stop_token_ids=STOPS, max_concurrent=3), []
    prefill = engine.decoder.prefill

    def counted(token_ids: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        ran.extend(lengths)
        return prefill(token_ids, lengths)

    monkeypatch.setattr(engine.decoder, "prefill", counted)
    monkeypatch.setattr("betterhalf.rollout.native.queue._PREFILL_TOKENS", 1)
    scheduler = engine.scheduler(SAMPLING, ROOM)
    for request in requests(3):
        scheduler.add(request)
    scheduler.step()
    scheduler.cancel(1)
    run(scheduler, {})
    assert ran == [4, 14]


def test_a_request_beyond_what_was_reserved_is_refused_and_the_others_go_on(make_engine: MakeEngine) -> None:
    scheduler = make_engine().scheduler(SAMPLING, Capacity(sequences=3, length=16, tokens=12))
    scheduler.add(requests(1)[0])
    with pytest.raises(InputError, match="prompt 1 needs 9 tokens of cache and 12 for its completion"):
        scheduler.add(requests(2)[1])
    with pytest.raises(InputError, match="prompt 1 has 0 tokens"):
        scheduler.add(GenerateRequest(token_ids=(), group_size=1, key=(0, 0, 0)))
    found: Found = {}
    run(scheduler, found)
    assert sorted(found) == [(0, 0), (0, 1), (0, 2)]


def test_a_request_without_siblings_is_counted_and_leaves_nothing_to_do(make_engine: MakeEngine) -> None:
    scheduler = make_engine().scheduler(SAMPLING, ROOM)
    assert scheduler.add(requests(1, group_size=0)[0]) == 0
    assert not scheduler.unfinished


def test_a_request_without_siblings_needs_no_room(make_engine: MakeEngine) -> None:
    short, long = requests(1)[0], GenerateRequest(token_ids=(1,) * 19, group_size=0, key=(0, 1, 1))
    assert make_engine().generate([short, long], SAMPLING) == [*make_engine().generate([short], SAMPLING), ()]


def test_a_failed_step_drops_the_cache(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    scheduler = engine.scheduler(SAMPLING, ROOM)
    scheduler.add(requests(1)[0])
    scheduler.step()
    monkeypatch.setattr(engine.decoder, "decode", lambda *_: torch.full((3, 32), float("nan")))
    with pytest.raises(
        EngineNumericsError, match="prompt 0, sibling 0: the logits of completion token 2 are not finite"
    ):
        scheduler.step()
    assert engine._table is None
    monkeypatch.undo()
    assert engine.generate(requests(), SAMPLING) == make_engine().generate(requests(), SAMPLING)


def test_a_scheduler_given_up_in_the_middle_leaves_no_cache_behind(make_engine: MakeEngine) -> None:
    engine = make_engine()
    scheduler = engine.scheduler(SAMPLING, ROOM)
    scheduler.add(requests(1)[0])
    scheduler.step()
    table = engine._table
    assert table is not None and table.active == 3
    with torch.inference_mode():
        table.cache.values.fill_(float("nan"))
    assert engine.generate(requests(1), SAMPLING) == make_engine().generate(requests(1), SAMPLING)
    kept = engine._table
    engine.generate(requests(1), SAMPLING)
    assert engine._table is kept is not table


def test_a_scheduler_needs_weights(make_engine: MakeEngine) -> None:
    with pytest.raises(EngineError, match="holds no weights"):
        make_engine(load=False).scheduler(SAMPLING, ROOM)
