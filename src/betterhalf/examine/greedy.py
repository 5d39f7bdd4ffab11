"""Completions for a census without an engine: greedy, by the `generate` of transformers, in FP32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from betterhalf.examine.subject import POLICY_VERSION, Subject
from betterhalf.models.files import quiet
from betterhalf.types import Completion, FinishReason, Prompt

MAX_TOKENS = 16
"""Maximum length of a completion: without an engine each token is a pass of the whole module on a batch of one."""


def greedy_completions(
    subject: Subject, prompts: Sequence[Prompt], advance: Callable[[], None] = lambda: None
) -> list[Completion]:
    """Continue each prompt by its most likely tokens, up to `MAX_TOKENS`, or `sampling.max_tokens` if that is less.

    Where the module cannot continue a prompt (the `generate` of some architectures needs packages of their own), the
    prompt's own second half follows it in place of a completion.

    Args:
        subject: model and settings.
        prompts: [P].
        advance: called after each prompt.

    Returns:
        [P] completions. Their behavior logprobs are 0: no engine sampled them.
    """
    completions = []
    for prompt in prompts:
        completions.append(_continued(subject, prompt))
        advance()
    return completions


def _continued(subject: Subject, prompt: Prompt) -> Completion:
    try:
        token_ids = _generate(subject, prompt.token_ids)
    except Exception:  # code of any architecture, which can raise anything
        return _completion(prompt.token_ids[len(prompt.token_ids) // 2 :], "length")
    stopped = token_ids[-1] in subject.model.stop_token_ids
    return _completion(token_ids, "stop" if stopped else "length")


@torch.no_grad()
def _generate(subject: Subject, prompt: Sequence[int]) -> tuple[int, ...]:
    model = subject.model
    stops = list(model.stop_token_ids)
    settings: dict[str, Any] = {"eos_token_id": stops, "pad_token_id": stops[0]} if stops else {}
    limit = min(MAX_TOKENS, subject.config.sampling.max_tokens)
    wanted = GenerationConfig(do_sample=False, max_new_tokens=limit, **settings)  # type: ignore[no-untyped-call]
    ids = torch.tensor([list(prompt)], device=model.module.device)
    with quiet():
        out = model.module.generate(ids, attention_mask=torch.ones_like(ids), generation_config=wanted)
    return tuple(out[0, len(prompt) :].tolist())


def _completion(token_ids: tuple[int, ...], finish_reason: FinishReason) -> Completion:
    return Completion(
        token_ids=token_ids,
        behavior_logprobs=(0.0,) * len(token_ids),
        finish_reason=finish_reason,
        policy_version=POLICY_VERSION,
    )
