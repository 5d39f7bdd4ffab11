"""Checks of requests, sequences and scores."""

from __future__ import annotations

import math

import pytest

from betterhalf.errors import EngineNumericsError, InputError
from betterhalf.rollout.requests import check_requests, check_sequences, require_finite_scores, stop_ids
from betterhalf.types import GenerateRequest


def request(*token_ids: int, prompt_id: str = "") -> GenerateRequest:
    return GenerateRequest(token_ids=token_ids, group_size=1, key=(0, 0, 0), prompt_id=prompt_id)


def test_prompts_that_leave_room_for_one_token_pass() -> None:
    check_requests([request(0), request(*[22] * 15)], 16, 23)
    check_requests([], 16, 23)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (request(), r"prompt 1 has 0 tokens, but the model's context of 16 must hold it and one token more"),
        (request(*[1] * 16), r"prompt 1 has 16 tokens"),
        (request(*[1] * 16, prompt_id="p7"), r"prompt p7 has 16 tokens"),
        (request(1, 23), r"prompt 1 holds a token outside the model's vocabulary of 23"),
        (request(-1), r"prompt 1 holds a token outside"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_named(wrong: GenerateRequest, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_requests([request(1), wrong], 16, 23)


def test_sequences_of_two_tokens_up_to_the_whole_context_can_be_scored() -> None:
    check_sequences([(0, 22), (1,) * 16], 16, 23)
    for wrong in ((), (1,), (1,) * 17):
        with pytest.raises(InputError, match=f"sequence 1 has {len(wrong)} tokens; the engine scores 2 to 16"):
            check_sequences([(1, 2), wrong], 16, 23)
    for token in (-1, 23):
        with pytest.raises(InputError, match="sequence 0 holds a token outside the model's vocabulary of 23"):
            check_sequences([(1, token)], 16, 23)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_named_with_the_reason(bad: float) -> None:
    require_finite_scores([(-1.0, -2.0)], "fp16", lambda: pytest.fail("nothing to explain"))
    with pytest.raises(EngineNumericsError, match="sequence 1: its logprobs are not finite in fp16: it overflows"):
        require_finite_scores([(-1.0,), (-1.0, bad)], "fp16", lambda: "it overflows")


def test_stop_tokens_are_sorted_without_duplicates_and_in_the_vocabulary() -> None:
    assert stop_ids([5, 2, 5], 6) == (2, 5)
    for outside in (-1, 6):
        with pytest.raises(InputError, match=f"stop token {outside} is not in the model's vocabulary of 6 tokens"):
            stop_ids([outside], 6)
