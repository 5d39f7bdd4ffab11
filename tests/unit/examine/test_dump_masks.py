"""Masks inside completions, in every shape of dump: tokens of the environment are read but not scored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from betterhalf.config.schema import RunConfig
from betterhalf.errors import InputError
from betterhalf.examine.dump import Dump, read_dump
from betterhalf.examine.dump_masks import KNOWN_MASKS
from betterhalf.examine.probe import probe
from betterhalf.examine.subject import Subject, engine_in, open_subject
from betterhalf.types import GenerateRequest

SCORING_MASKS = [name for name in KNOWN_MASKS if name not in ("attention_mask", "prompt_mask")]

Row = dict[str, Any]

CONFIG = RunConfig.model_validate(
    {
        "sampling": {"max_tokens": 8},
        "probe": {"bootstrap": 20},
        "logging": {"console": "quiet"},
        "precision": {"pairs": ["fp32/fp32"]},
    }
)


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    with open_subject("demo", CONFIG) as opened:
        yield opened


@pytest.fixture(scope="module")
def conversation(subject: Subject) -> Row:
    """Return two turns sampled in FP32 with tokens of an environment between them, and a mask of the model's tokens."""
    prompt = list(subject.prompts(1)[0].token_ids)
    environment = [prompt[0], *prompt[1:4], 7]
    with engine_in(subject, "fp32") as engine:

        def turn(context: list[int], number: int) -> tuple[list[int], list[float]]:
            request = GenerateRequest(token_ids=tuple(context), group_size=1, key=(0, 0, number))
            ((completion,),) = engine.generate([request], CONFIG.sampling)
            return list(completion.token_ids), list(completion.behavior_logprobs)

        first, first_logprobs = turn(prompt, 0)
        second, second_logprobs = turn([*prompt, *first, *environment], 1)
    return {
        "prompt": prompt,
        "tokens": [*first, *environment, *second],
        "logprobs": [first_logprobs, second_logprobs],
        "mask": [1] * len(first) + [0] * len(environment) + [1] * len(second),
    }


def row_of(conversation: Row, placeholder: object) -> Row:
    hole = [placeholder] * conversation["mask"].count(0)
    first, second = conversation["logprobs"]
    return {
        "prompt_token_ids": conversation["prompt"],
        "token_ids": conversation["tokens"],
        "behavior_logprobs": [*first, *hole, *second],
        "rollout_dtype": "fp32",
    }


# -- every shape: the row in the schema, and its mask, as another framework would write them


def completion_only(row: Row, name: str, mask: list[Any]) -> Row:
    return row | {name: mask}


def whole_sequence(row: Row, name: str, mask: list[Any]) -> Row:
    return row | {name: [0] * len(row["prompt_token_ids"]) + mask}


def padded_at_the_end(row: Row, name: str, mask: list[Any]) -> Row:
    padded = {"token_ids": [0, 0, 0], "behavior_logprobs": [None, 0.0, -math.inf]}
    return row | {key: row[key] + padding for key, padding in padded.items()} | {name: [*mask, 0, 0, 0]}


def trl_rollout(row: Row, name: str, mask: list[Any]) -> Row:
    return {
        "prompt_ids": row["prompt_token_ids"],
        "completion_ids": row["token_ids"],
        "logprobs": row["behavior_logprobs"],
        "rollout_dtype": "fp32",
        name: mask,
    }


def trl_batch(row: Row, name: str, mask: list[Any]) -> Row:
    """Return two padded rows of different lengths, with logprobs in the shape of vLLM."""
    prompt, tokens = row["prompt_token_ids"], row["token_ids"]
    short = mask.index(0)
    return {
        "prompt_ids": [[0, 0, *prompt], [0, 0, *prompt]],
        "prompt_mask": [[0, 0] + [1] * len(prompt)] * 2,
        "completion_ids": [[*tokens, 0], tokens[:short] + [0] * (len(tokens) + 1 - short)],
        "sampling_per_token_logps": [
            [[value] for value in [*row["behavior_logprobs"], None]],
            [[value] for value in row["behavior_logprobs"][:short]] + [[]] * (len(tokens) + 1 - short),
        ],
        "rollout_dtype": "fp32",
        name: [[*mask, 0], mask[:short] + [0] * (len(tokens) + 1 - short)],
    }


def trl_batch_of_whole_sequences(row: Row, name: str, mask: list[Any]) -> Row:
    batch = trl_batch(row, name, mask)
    return batch | {name: [[0] * len(batch["prompt_ids"][0]) + one for one in batch[name]]}


SHAPES: list[Callable[[Row, str, list[Any]], Row]] = [
    *(completion_only, whole_sequence, padded_at_the_end, trl_rollout, trl_batch, trl_batch_of_whole_sequences),
]


def dump_of(tmp_path: Path, *rows: Row) -> Dump:
    path = tmp_path / "dump.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_dump(path)


@pytest.mark.parametrize("placeholder", [0.0, -math.inf, math.nan, None, 5.0])
def test_an_environments_tokens_leave_the_mismatch_of_fp32_at_rounding(
    conversation: Row, tmp_path: Path, placeholder: object
) -> None:
    row = row_of(conversation, placeholder)
    variants = list(product(SCORING_MASKS, SHAPES, (int, float, bool)))
    rows = [shape(row, name, list(map(kind, conversation["mask"]))) for name, shape, kind in variants]
    (tmp_path / "dump.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    found = probe("demo", CONFIG, str(tmp_path / "run"), from_dump=str(tmp_path / "dump.jsonl"))
    (pair,) = found["pairs"]
    own, first = sum(conversation["mask"]), conversation["mask"].index(0)
    batches = sum(shape in (trl_batch, trl_batch_of_whole_sequences) for _, shape, _ in variants)
    assert pair["k3"] < 1e-11
    assert [length for length, _ in pair["completions"]].count(own) == len(rows)
    assert [length for length, _ in pair["completions"]].count(first) == batches
    assert pair["tokens"] == own * len(rows) + first * batches
    assert max(abs(log_ratio) for _, log_ratio in pair["completions"]) < 1e-4
    assert found["max_tokens"] == own
    assert not (tmp_path / "run" / "rejected.jsonl").exists()


def test_the_token_table_holds_sampled_tokens_at_their_places_in_the_completion(
    conversation: Row, tmp_path: Path
) -> None:
    path = tmp_path / "dump.jsonl"
    path.write_text(json.dumps(completion_only(row_of(conversation, None), "loss_mask", conversation["mask"])) + "\n")
    probe("demo", CONFIG, str(tmp_path / "run"), from_dump=str(path))
    rows = pyarrow.parquet.read_table(tmp_path / "run" / "tokens.parquet").to_pylist()
    places = [place for place, own in enumerate(conversation["mask"]) if own]
    assert [row["position"] for row in rows] == places
    assert [row["token_id"] for row in rows] == [conversation["tokens"][place] for place in places]
    assert [row["behavior_logprob"] for row in rows] == [*conversation["logprobs"][0], *conversation["logprobs"][1]]
    assert all(abs(row["trainer_logprob"] - row["behavior_logprob"]) < 1e-4 for row in rows)


# -- by hand

GOOD: Row = {"prompt_token_ids": [5, 6], "token_ids": [7, 8, 9, 4], "behavior_logprobs": [-0.5, None, -3.0, None]}


def test_two_masks_of_a_row_are_intersected(tmp_path: Path) -> None:
    row = GOOD | {"response_mask": [1, 0, 1, 1], "loss_mask": [0, 0, 1, 1, 1, 0]}
    (line,) = dump_of(tmp_path, row | {"trainer_logprobs": [-1.0, "x", -2.0, None]}).lines
    assert (line.completion.token_ids, line.scored) == ((7, 8, 9), (True, False, True))
    assert line.completion.behavior_logprobs == (-0.5, 0.0, -3.0)
    assert line.trainer_logprobs == (-1.0, 0.0, -2.0)


@pytest.mark.parametrize(
    ("change", "prompt"),
    [
        ({"prompt_token_ids": [0, 0, 5, 6], "prompt_mask": [0, 0, 1, 1]}, (5, 6)),
        ({"prompt_token_ids": [5, 6, 0], "prompt_mask": [1, 1, 0]}, (5, 6)),
        ({"prompt_mask": [0, 0]}, (5, 6)),
        ({"prompt_token_ids": [3, 5, 6], "prompt_mask": [0, 0, 1]}, (3, 5, 6)),
        ({"prompt_token_ids": [5, 6, 5], "prompt_mask": [1, 0, 1]}, (5, 6, 5)),
        ({"prompt_token_ids": [0, 3, 5, 6], "attention_mask": [0, 0, 1, 1, 1, 1, 1, 0]}, (5, 6)),
        ({"attention_mask": [1, 1, 1, 0]}, (5, 6)),
    ],
)
def test_padding_of_the_prompt_is_distinguished_from_prompts_that_are_not_trained_on(
    tmp_path: Path, change: Row, prompt: tuple[int, ...]
) -> None:
    (line,) = dump_of(tmp_path, GOOD | {"response_mask": [1, 0, 1, 0]} | change).lines
    assert line.prompt_token_ids == prompt
    assert (line.completion.token_ids, line.scored) == ((7, 8, 9), (True, False, True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"loss_mask": [1, 2, 1, 0]}, "loss_mask[1] = 2 is neither 0 nor 1"),
        ({"loss_mask": [1, 0.5, 1, 0]}, "loss_mask[1] = 0.5 is neither 0 nor 1"),
        ({"loss_mask": [1, None, 1, 0]}, "loss_mask[1] = null is neither 0 nor 1"),
        ({"loss_mask": [1, "0", 1, 0]}, 'loss_mask[1] = "0" is neither 0 nor 1'),
        ({"loss_mask": [[1, 0, 1, 0]]}, "loss_mask has 1 values for 2 prompt tokens and 4 token_ids"),
        ({"action_mask": [1, 0, 1]}, "action_mask has 3 values for 2 prompt tokens and 4 token_ids"),
        ({"action_mask": [1, 0, 1, 0, 0]}, "action_mask has 5 values for 2 prompt tokens and 4 token_ids"),
        ({"prompt_mask": [1, 1, 1]}, "prompt_mask has 3 values for 2 prompt tokens"),
        ({"env_mask": 1}, "env_mask is not a list"),
        ({"env_mask": [0, 0, 0, 0]}, "no token is left to score after applying env_mask"),
        (
            {"env_mask": [1, 0, 0, 0], "loss_masks": [0, 0, 1, 0]},
            "no token is left to score after applying loss_masks and env_mask",
        ),
        ({"attention_mask": [1, 1, 1, 0, 1, 0]}, "attention_mask has a zero between ones of the completion"),
        ({"attention_mask": [0, 0, 1, 1, 1, 1]}, "prompt_token_ids is empty"),
    ],
)
def test_an_impossible_mask_is_refused_with_row_and_field(tmp_path: Path, change: Row, reason: str) -> None:
    dump = dump_of(tmp_path, GOOD | {"response_mask": [1, 0, 1, 0]}, GOOD | change)
    assert [line.number for line in dump.lines] == [1]
    ((line, said),) = [(rejection.line, rejection.reason) for rejection in dump.rejected]
    assert line == 2 and reason in said


@pytest.mark.parametrize("shape", ["schema", "trl", "batch"])
@pytest.mark.parametrize("name", ["mask", "final_response_mask", "MASKED", "sample_mask"])
def test_an_unknown_key_that_looks_like_a_mask_is_refused_by_name(tmp_path: Path, name: str, shape: str) -> None:
    row = GOOD | {"response_mask": [1, 0, 1, 0]}
    if shape != "schema":
        row = trl_rollout(row, "response_mask", [1, 0, 1, 0])
    if shape == "batch":
        row = {key: [value] for key, value in row.items() if key != "rollout_dtype"}
    assert len(dump_of(tmp_path, row | {name: None, "pixel_attention_mask": [3]}).lines) == 1
    with pytest.raises(InputError, match=f"line 1: {name} looks like a mask, .*response_mask, loss_mask, "):
        dump_of(tmp_path, row | {name: [1, 0, 1, 0]})


def test_among_several_candidates_only_sampled_tokens_are_looked_up(tmp_path: Path) -> None:
    row = {
        "prompt_ids": [1],
        "completion_ids": [7, 20, 8],
        "logprobs": [[-0.1, -4.0], [], [-0.2, -5.0]],
        "logprob_token_ids": [[3, 7], None, [8, 3]],
        "env_mask": [1, 0, 1],
    }
    (line,) = dump_of(tmp_path, row).lines
    assert line.completion.behavior_logprobs == (-4.0, 0.0, -0.2)
