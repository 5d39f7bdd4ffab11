"""The support that a sampler reports on the device is the one that `token_support` writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from betterhalf.config.schema import SamplingConfig
from betterhalf.errors import EngineError
from betterhalf.rollout.engine import require_supports
from betterhalf.rollout.native.engine import NativeEngine
from betterhalf.rollout.native.running_batch import RunningBatch
from betterhalf.rollout.native.scheduler import Capacity
from betterhalf.rollout.sampler import Distribution, draw_at, truncated
from betterhalf.rollout.support import RowSupport, row_support
from betterhalf.token_support import decode, encode, num_words
from betterhalf.types import Completion, GenerateRequest

MakeEngine = Callable[..., NativeEngine]
TRUNCATIONS = {
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 3},
    "min_p": {"min_p": 0.2},
    "all three": {"top_p": 0.8, "top_k": 9, "min_p": 0.02},
    "most of it": {"min_p": 1e-4},
}


@pytest.mark.parametrize("vocabulary", [5, 32, 33, 301])
def test_words_counts_and_masses_equal_the_encoding_in_python(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    scaled = torch.randn(50, vocabulary, generator=generator)
    kept = torch.rand(50, vocabulary, generator=generator) < torch.linspace(0, 1, 50).unsqueeze(1)
    kept[:, 2], kept[-1] = True, True
    found = row_support(scaled, scaled.masked_fill(~kept, -torch.inf))
    masses = (scaled.double().softmax(-1) * kept).sum(-1)
    expected = encode([row.nonzero().squeeze(1).tolist() for row in kept], masses.tolist(), vocabulary)
    assert tuple(found.counts_B.tolist()) == expected.counts
    torch.testing.assert_close(found.masses_B.double(), masses, rtol=1e-5, atol=1e-7)
    rows = zip(found.words_BW.numpy(), expected.counts, strict=True)
    assert b"".join(row[: num_words(count, vocabulary)].tobytes() for row, count in rows) == expected.words


@pytest.mark.parametrize("settings", TRUNCATIONS.values(), ids=list(TRUNCATIONS))
def test_a_draw_reports_the_tokens_that_truncation_left(settings: dict[str, float]) -> None:
    logits = 2 * torch.randn(40, 70, generator=torch.Generator().manual_seed(1))
    keys, positions = torch.arange(40), torch.zeros(40, dtype=torch.int64)
    wanted = Distribution(temperature=0.8, reports_support=True, **settings)  # type: ignore[arg-type]
    drawn = draw_at(logits, keys, positions, wanted)
    assert drawn.support is not None
    assert torch.equal(drawn.support.counts_B, (truncated(logits / 0.8, wanted) > -torch.inf).sum(-1))
    silent = draw_at(logits, keys, positions, Distribution(temperature=0.8, **settings))  # type: ignore[arg-type]
    assert silent.support is None
    assert torch.equal(silent.token_ids, drawn.token_ids) and torch.equal(silent.logprobs, drawn.logprobs)


def test_parts_of_a_batch_are_joined() -> None:
    scaled = torch.randn(9, 40, generator=torch.Generator().manual_seed(2))
    left = truncated(scaled, Distribution(temperature=1.0, top_p=0.6))
    whole = row_support(scaled, left)
    parts = RowSupport.joined([row_support(scaled[:4], left[:4]), row_support(scaled[4:], left[4:])])
    assert torch.equal(whole.counts_B, parts.counts_B) and torch.equal(whole.words_BW, parts.words_BW)
    torch.testing.assert_close(whole.masses_B, parts.masses_B)


STOPS = (5, 11)


def requests(*, with_support: bool = True) -> list[GenerateRequest]:
    return [
        GenerateRequest(
            token_ids=tuple((3 * index + k * k) % 23 for k in range(4 + 5 * (index % 3))),
            group_size=3,
            key=(0, 1, index),
            with_support=with_support,
        )
        for index in range(4)
    ]


def from_scores(engine: NativeEngine, prompt: tuple[int, ...], one: Completion, sampling: SamplingConfig) -> None:
    """Require the support that the engine's prefill gives, except where rounding decides."""
    assert one.support is not None and len(one.support.counts) == len(one.token_ids)
    tokens = torch.tensor([*prompt, *one.token_ids])
    engine.decoder.reserve(len(tokens))
    hidden = engine.decoder.hidden_rows(tokens, (len(tokens),))[len(prompt) - 1 : -1]
    scaled = engine.decoder.logits(hidden) / sampling.temperature
    wanted = Distribution(temperature=1.0, top_p=sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p)
    left = truncated(scaled, wanted)
    expected = [tuple(row.isfinite().nonzero().squeeze(1).tolist()) for row in left]
    assert decode(one.support) == expected
    logprobs = left.double().log_softmax(-1).gather(1, tokens[len(prompt) :, None]).squeeze(1)
    assert one.behavior_logprobs == pytest.approx(logprobs.tolist(), abs=2e-5)
    masses = [float(row.softmax(-1)[list(ids)].sum()) for row, ids in zip(scaled.double(), expected, strict=True)]
    assert one.support.masses == pytest.approx(masses, abs=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("slots", [2, 256])
@pytest.mark.parametrize("settings", TRUNCATIONS.values(), ids=list(TRUNCATIONS))
def test_completions_carry_the_support_of_every_token(
    make_engine: MakeEngine, settings: dict[str, float], slots: int, lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lag`: with CUDA graphs the host reads a step's output when the next one already runs."""
    monkeypatch.setattr(RunningBatch, "lag", lag)
    sampling = SamplingConfig(max_tokens=12, temperature=0.9, **settings)  # type: ignore[arg-type]
    engine = make_engine(stop_token_ids=STOPS, max_concurrent=slots)
    completions = engine.generate(requests(), sampling)
    assert {one.finish_reason for group in completions for one in group} == {"stop", "length"}
    require_supports(completions, sampling)
    scorer = make_engine(stop_token_ids=STOPS)
    for request, group in zip(requests(), completions, strict=True):
        for one in group:
            from_scores(scorer, request.token_ids, one, sampling)


def test_logits_in_parts_give_the_same_supports(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingConfig(max_tokens=12, top_p=0.7)
    whole = make_engine().generate(requests(), sampling)
    monkeypatch.setattr("betterhalf.rollout.native.running_batch._MAX_LOGITS", 2 * 23)
    parts = make_engine().generate(requests(), sampling)
    for group, others in zip(whole, parts, strict=True):
        for one, other in zip(group, others, strict=True):
            assert one.support is not None and other.support is not None
            assert decode(one.support) == decode(other.support)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_cancelled_request_leaves_no_record(
    make_engine: MakeEngine, lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunningBatch, "lag", lag)
    sampling, room = SamplingConfig(max_tokens=12, top_k=4), Capacity(sequences=12, length=32, tokens=12)
    scheduler = make_engine(stop_token_ids=STOPS).scheduler(sampling, room, with_support=True)
    for request in requests():
        scheduler.add(request)
    found = [some for _ in range(3) for some in scheduler.step()]
    scheduler.cancel(1)
    while scheduler.unfinished:
        found += scheduler.step()
    for some in found:
        for one in some.completions(STOPS, 3):
            require_supports([[one]], sampling)
    assert not scheduler._batch._log._running


def test_nothing_is_recorded_that_was_not_asked_for_or_not_truncated(make_engine: MakeEngine) -> None:
    for asked, sampling in (
        (requests(with_support=False), SamplingConfig(max_tokens=5, top_p=0.7)),
        (requests(), SamplingConfig(max_tokens=5)),
    ):
        assert {one.support for group in make_engine().generate(asked, sampling) for one in group} == {None}


def test_a_completion_without_its_support_is_refused() -> None:
    one = Completion(token_ids=(1, 2), behavior_logprobs=(0.0, 0.0), finish_reason="stop", policy_version=0)
    short = Completion(
        token_ids=(1, 2),
        behavior_logprobs=(0.0, 0.0),
        finish_reason="stop",
        policy_version=0,
        support=encode([[1]], [1.0], 9),
    )
    require_supports([[one]], SamplingConfig())
    for completion, count in ((one, 0), (short, 1)):
        with pytest.raises(EngineError, match=f"2 tokens names the tokens that truncation kept for {count} of them"):
            require_supports([[completion]], SamplingConfig(top_k=3))
