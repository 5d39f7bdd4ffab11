"""Play episodes of several turns: the environment answers each turn of the model, until every episode has ended.

The first turn is sampled like any completion, siblings together. A later turn is a request of its own, whose prompt is
everything before it. Sampled tokens are never tokenized again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from betterhalf import token_support
from betterhalf.metrics.console import show_note
from betterhalf.runs.assembly import Parts
from betterhalf.runs.stopwatch import Stopwatch
from betterhalf.setup.decoding import completion_texts
from betterhalf.tasks.rewards import check_rewards
from betterhalf.tasks.turns import Conversation, Failure, Turns
from betterhalf.token_support import TokenSupport, TopTokens
from betterhalf.types import (
    Completion,
    EpisodeEnd,
    GenerateRequest,
    Observation,
    Prompt,
    Rollout,
    RolloutGroup,
    TokenExperts,
)


def _join_top(first: TopTokens | None, second: TopTokens | None) -> TopTokens | None:
    if first is None or second is None:
        return None
    return TopTokens(
        token_ids_CK=torch.cat([first.token_ids_CK, second.token_ids_CK]),
        logprobs_CK=torch.cat([first.logprobs_CK, second.logprobs_CK]),
    )


def _join_support(first: TokenSupport | None, second: TokenSupport | None) -> TokenSupport | None:
    if first is None or second is None:
        return None
    return token_support.joined((first, second))


def _join_experts(first: TokenExperts | None, second: TokenExperts | None) -> TokenExperts | None:
    """Return the experts of each token when it was first computed: the second turn reads the first one again."""
    if first is None or second is None:
        return None
    read, again = first.experts_NLK, second.experts_NLK
    return TokenExperts(experts_NLK=torch.cat([read, again[read.shape[0] :]]))


COLUMNS: dict[str, Callable[[Any, Any], Any]] = {
    "token_ids": operator.add,
    "behavior_logprobs": operator.add,
    "top": _join_top,
    "support": _join_support,
    "experts": _join_experts,
}
"""Fields of a completion with a value for each token -> the function that joins those of two turns."""


@dataclass(slots=True, kw_only=True)
class Episode:
    """One sibling: its turns so far, and how it ended."""

    prompt: Prompt
    first: GenerateRequest
    """Request of the first turn of all siblings."""
    sibling: int
    completion: Completion
    """All turns so far, with the observations between them; its `finish_reason` is that of the last turn."""
    turns: list[str] = field(default_factory=list)
    """Texts of the turns."""
    end: EpisodeEnd | None = None
    """Reason why it ended; None while it goes on."""
    next_observation: tuple[int, ...] = ()
    """Observation that the next turn follows."""

    def conversation(self) -> Conversation:
        """Return what the environment sees."""
        return Conversation(
            prompt=self.prompt, turns=tuple(self.turns), finish_reason=self.completion.finish_reason, end=self.end
        )

    def request(self, max_tokens: int) -> GenerateRequest:
        """Return the request of the next turn; `max_tokens` limits all turns together."""
        sampled = len(self.completion.token_ids)
        return replace(
            self.first,
            token_ids=(*self.prompt.token_ids, *self.completion.with_observations(), *self.next_observation),
            group_size=1,
            first_sibling=self.sibling,
            first_position=sampled,
            max_tokens=max_tokens - sampled,
        )

    def add(self, turn: Completion) -> None:
        """Append a turn after the observation."""
        self.completion = joined(self.completion, self.next_observation, turn)


def joined(so_far: Completion, observation: tuple[int, ...], turn: Completion) -> Completion:
    """Return the completion of the turns so far, an observation and the next turn."""
    columns = {name: join(getattr(so_far, name), getattr(turn, name)) for name, join in COLUMNS.items()}
    after = Observation(before=len(so_far.token_ids), token_ids=observation)
    return replace(turn, observations=(*so_far.observations, after), **columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """Player of the episodes of one round of sampling."""

    parts: Parts
    turns: Turns
    """Environment of the task."""
    sample: Callable[[list[GenerateRequest]], list[tuple[Completion, ...]]]
    """Sampler of one turn."""
    clock: Stopwatch
    """Counts the environment's time as `reward`."""

    def groups(self, prompts: Sequence[Prompt], requests: Sequence[GenerateRequest]) -> list[RolloutGroup]:
        """Play and grade the episodes of some prompts, whose first turns `requests` ask for."""
        sampled = self.sample(list(requests))
        groups = [
            [
                Episode(prompt=prompt, first=request, sibling=sibling, completion=completion)
                for sibling, completion in enumerate(siblings)
            ]
            for prompt, request, siblings in zip(prompts, requests, sampled, strict=True)
        ]
        episodes = [episode for group in groups for episode in group]
        self._play(episodes)
        with self.clock("reward"):
            rewards = check_rewards(self.turns.rewards_of([each.conversation() for each in episodes]), len(episodes))
        for note in self.turns.take_notes():
            show_note(note, mode=self.parts.config.logging.console)
        rollouts = iter(self._rollouts(episodes, rewards))
        return [
            RolloutGroup(prompt=prompt, rollouts=tuple(next(rollouts) for _ in group))
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def _play(self, episodes: Sequence[Episode]) -> None:
        """Sample turns until every episode has ended."""
        turns = [episode.completion for episode in episodes]
        going = list(episodes)
        while going:
            texts = completion_texts(self.parts.model.tokenizer, turns)
            for episode, text in zip(going, texts, strict=True):
                episode.turns.append(text)
            self._observe(going)
            going = [episode for episode in going if episode.end is None]
            if going:
                limit = self.parts.config.sampling.max_tokens
                turns = [turn for (turn,) in self.sample([episode.request(limit) for episode in going])]
                for episode, turn in zip(going, turns, strict=True):
                    episode.add(turn)

    def _observe(self, episodes: Sequence[Episode]) -> None:
        """Set the next observation, or the end, of episodes that have a new turn."""
        for episode in episodes:
            if episode.completion.finish_reason == "length":
                episode.end = "length"
        asked = [episode for episode in episodes if episode.end is None]
        with self.clock("reward"):
            answers = self.turns.respond([episode.conversation() for episode in asked])
            for episode, answer in zip(asked, answers, strict=True):
                self._answer(episode, answer)

    def _answer(self, episode: Episode, answer: str | Failure | None) -> None:
        if isinstance(answer, Failure):
            episode.end = "failed"
        elif answer is None:
            episode.end = "done"
        elif len(episode.turns) >= self.turns.max_turns:
            episode.end = "turn_limit"
        else:
            episode.next_observation = self.turns.encode(answer, episode.completion.token_ids[-1])
            request = episode.request(self.parts.config.sampling.max_tokens)
            room = request.limit(self.parts.config.sampling.max_tokens, self.parts.model.context_length)
            if room < 1:
                episode.end = "length"
                episode.completion = replace(episode.completion, finish_reason="length")

    def _rollouts(self, episodes: Sequence[Episode], rewards: Sequence[float]) -> list[Rollout]:
        texts = completion_texts(self.parts.model.tokenizer, [episode.completion for episode in episodes])
        return [
            Rollout(
                prompt=episode.prompt,
                completion=episode.completion,
                text=text,
                reward=reward,
                episode_end=episode.end,
            )
            for episode, text, reward in zip(episodes, texts, rewards, strict=True)
        ]
