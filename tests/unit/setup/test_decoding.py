"""The graded text is what the model wrote, special tokens included, without the frame around it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from betterhalf.config.schema import MathTask, RunConfig
from betterhalf.models.loading import load_model
from betterhalf.runs.collect import sample_groups
from betterhalf.runs.stopwatch import Stopwatch
from betterhalf.setup.decoding import completion_texts
from betterhalf.tasks.build import build_task
from betterhalf.types import Completion, FinishReason

WORDS = ("<pad>", "<s>", "</s>", "<tool>", "ok", "hm", "\\boxed{4}", "\\boxed{5}", ".", "<|User|>")
TEXT = "hm </think> \\boxed{4}"


def tokenizer_with(*, think_is_special: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer with words as tokens, and `</think>` special as in DeepSeek-R1-Distill, or not as in Qwen3."""
    vocabulary = {word: number for number, word in enumerate((*WORDS, "<unk>"))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_tokens(
        [AddedToken("</think>", special=think_is_special), AddedToken("<think>", special=think_is_special)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def completion(tokenizer: Any, text: str, finish_reason: FinishReason = "stop") -> Completion:
    token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    logprobs = (0.0,) * len(token_ids)
    return Completion(token_ids=token_ids, behavior_logprobs=logprobs, finish_reason=finish_reason, policy_version=0)


@pytest.mark.parametrize("think_is_special", [False, True])
def test_a_mark_that_the_template_names_is_graded_though_the_tokenizer_calls_it_special(
    think_is_special: bool, tmp_path: Path
) -> None:
    tokenizer = tokenizer_with(think_is_special=think_is_special)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "2+2", "answer": "4"}))
    task = build_task(MathTask(path=str(path), template="r1_distill"), tokenizer)
    written = (f"{TEXT} </s>", "hm \\boxed{4} </s>", "hm </think> \\boxed{5} </s>")
    siblings = tuple(completion(tokenizer, text) for text in written)
    parts: Any = SimpleNamespace(
        config=RunConfig(),
        model=SimpleNamespace(tokenizer=tokenizer),
        task=task,
        engine=SimpleNamespace(generate=lambda requests, sampling: [siblings], wake=lambda: None),
    )
    clock = Stopwatch(torch.device("cpu"))
    (group,) = sample_groups(parts, [task.prompt(0)], 3, step=1, policy_version=0, first_index=0, clock=clock)
    task.close()
    assert group.rewards == (1.0, 0.0, 0.0)
    assert [rollout.text for rollout in group.rollouts] == [text.removesuffix(" </s>") for text in written]


@pytest.mark.parametrize(
    ("written", "finish_reason", "text"),
    [
        ("ok </s>", "stop", "ok"),
        ("ok <tool>", "length", "ok <tool>"),
        ("<tool> ok </s>", "stop", "<tool> ok"),
        ("<s> ok <pad> <pad>", "length", "ok"),
        ("ok </s> <pad>", "stop", "ok"),
        ("ok .", "stop", "ok ."),
        ("</s>", "stop", ""),
        ("<pad> <pad>", "length", ""),
        ("ok </think>", "stop", "ok"),
        ("ok </think>", "length", "ok </think>"),
    ],
)
def test_only_the_frame_is_taken_off(written: str, finish_reason: FinishReason, text: str) -> None:
    tokenizer = tokenizer_with(think_is_special=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    assert completion_texts(tokenizer, [completion(tokenizer, written, finish_reason)]) == [text]


def test_the_demo_models_end_mark_is_an_ordinary_token_and_stays() -> None:
    tokenizer = load_model(RunConfig().model).tokenizer
    assert completion_texts(tokenizer, [completion(tokenizer, "7=09.")]) == ["7=09."]
