"""Turns are joined to one completion, whatever columns its tokens have."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from betterhalf.runs.turns import COLUMNS, Episode, joined
from betterhalf.token_support import TopTokens
from betterhalf.types import Completion, GenerateRequest, Observation, Prompt

OF_THE_LAST_TURN = {"finish_reason", "policy_version"}
FIRST = Completion(token_ids=(1, 2), behavior_logprobs=(-0.1, -0.2), finish_reason="stop", policy_version=3)
SECOND = Completion(token_ids=(4,), behavior_logprobs=(-0.4,), finish_reason="length", policy_version=3)


def test_every_field_of_a_completion_is_a_column_or_that_of_the_last_turn() -> None:
    """A new field with a value for each token must be joined, or later turns would silently drop it."""
    assert {each.name for each in fields(Completion)} == {*COLUMNS, *OF_THE_LAST_TURN, "observations"}


def test_three_turns_written_out_by_hand() -> None:
    found = joined(joined(FIRST, (9, 9), SECOND), (), FIRST)
    assert found == Completion(
        token_ids=(1, 2, 4, 1, 2),
        behavior_logprobs=(-0.1, -0.2, -0.4, -0.1, -0.2),
        finish_reason="stop",
        policy_version=3,
        observations=(Observation(before=2, token_ids=(9, 9)), Observation(before=3, token_ids=())),
    )
    assert found.with_observations() == (1, 2, 9, 9, 4, 1, 2)


def test_the_most_likely_tokens_of_all_turns_are_kept() -> None:
    def with_top(completion: Completion, first: int) -> Completion:
        ids = torch.arange(first, first + 2 * len(completion.token_ids)).view(-1, 2)
        return replace(completion, top=TopTokens(token_ids_CK=ids, logprobs_CK=-ids.float()))

    found = joined(with_top(FIRST, 0), (9,), with_top(SECOND, 50)).top
    assert found is not None
    assert found.token_ids_CK.tolist() == [[0, 1], [2, 3], [50, 51]]
    assert found.logprobs_CK.tolist() == [[0, -1], [-2, -3], [-50, -51]]
    assert joined(with_top(FIRST, 0), (9,), SECOND).top is None


def test_the_request_of_a_later_turn_continues_the_draws_of_its_sibling() -> None:
    prompt = Prompt(prompt_id="p", text="", token_ids=(5, 6), answer="")
    first = GenerateRequest(token_ids=(5, 6), group_size=4, key=(7, 8, 9), prompt_id="p")
    episode = Episode(prompt=prompt, first=first, sibling=2, completion=FIRST, next_observation=(9, 9))
    expected = replace(
        first, token_ids=(5, 6, 1, 2, 9, 9), group_size=1, first_sibling=2, first_position=2, max_tokens=8
    )
    assert episode.request(10) == expected
    episode.add(SECOND)
    assert episode.request(10).first_position == 3
    assert episode.request(10).max_tokens == 7
    assert episode.request(10).token_ids == (5, 6, 1, 2, 9, 9, 4, 9, 9)
