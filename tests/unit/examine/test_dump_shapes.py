"""Rollouts of verl, OpenRLHF and prime-rl as their code holds them: boundaries, padding, masks, and missing sides."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from betterhalf.errors import InputError
from betterhalf.examine.dump import Dump, DumpLine, lacks_trainer_logprobs, read_dump

# Two responses: prompts padded on the left, responses on the right; the second has a token of a tool at its place 1.
VERL: dict[str, Any] = {
    "prompts": [[0, 5, 6], [4, 5, 6]],
    "responses": [[7, 8, 0], [9, 3, 2]],
    "attention_mask": [[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
    "response_mask": [[1, 1, 0], [1, 0, 1]],
    "rollout_log_probs": [[-0.5, -1.5, 0.0], [-0.25, 0.0, -2.0]],
    "old_log_probs": [[-0.5, -1.0, -9.0], [-0.5, -9.0, -2.5]],
    "advantages": [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]],
}
# One sequence of prompt 5, 6 and completion 7, 8, and padding; per-action tensors cover all tokens but the first.
OPENRLHF: dict[str, Any] = {
    "sequences": [[5, 6, 7, 8, 0]],
    "attention_mask": [[1, 1, 1, 1, 0]],
    "action_mask": [[0, 1, 1, 0]],
    "rollout_log_probs": [[0.0, -0.5, -1.5, 0.0]],
    "action_log_probs": [[0.0, -0.75, -1.25, 0.0]],
}
PRIME: dict[str, Any] = {
    "schema_version": 1,
    "step": 3,
    "token_ids": [5, 6, 7, 8, 9],
    "position_ids": [0, 1, 2, 3, 4],
    "loss_mask": [False, False, True, False, True],
    "inference_logprobs": [0.0, 0.0, -0.5, 0.0, -1.5],
    "trainer_logprobs": [None, -3.0, -0.75, -4.0, -1.25],
    "is_masked": [False, False, False, False, True],
    "env_name": "reverse-text",
}


def dump_of(tmp_path: Path, *records: object) -> Dump:
    path = tmp_path / "dump.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_dump(path)


def content(line: DumpLine) -> tuple[object, ...]:
    behavior = line.completion.behavior_logprobs
    return line.prompt_token_ids, line.completion.token_ids, line.scored, behavior, line.trainer_logprobs


VERL_LINES = [
    ((5, 6), (7, 8), (True, True), (-0.5, -1.5), (-0.5, -1.0)),
    ((4, 5, 6), (9, 3, 2), (True, False, True), (-0.25, 0.0, -2.0), (-0.5, 0.0, -2.5)),
]


def test_a_batch_of_verl_loses_its_padding_and_keeps_a_tool_s_token_unscored(tmp_path: Path) -> None:
    assert [content(line) for line in dump_of(tmp_path, VERL).lines] == VERL_LINES


def test_verl_s_tensors_are_read_from_a_file_of_torch_save(tmp_path: Path) -> None:
    path = tmp_path / "batch.pt"
    torch.save({name: torch.tensor(value) for name, value in VERL.items()}, path)
    lines = read_dump(path).lines
    assert [content(line)[:3] for line in lines] == [expected[:3] for expected in VERL_LINES]
    assert lines[1].trainer_logprobs == (-0.5, 0.0, -2.5)


def test_several_batches_in_one_file_of_tensors_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "batches.pt"
    torch.save([{name: torch.tensor(value) for name, value in VERL.items()}] * 2, path)
    assert [line.number for line in read_dump(path).lines] == [1, 1, 2, 2]


def test_an_experience_of_openrlhf_is_split_where_the_actions_begin(tmp_path: Path) -> None:
    (line,) = dump_of(tmp_path, OPENRLHF).lines
    assert content(line) == ((5, 6), (7, 8), (True, True), (-0.5, -1.5), (-0.75, -1.25))


def test_a_token_export_of_prime_rl_is_split_at_the_first_trained_token(tmp_path: Path) -> None:
    (line,) = dump_of(tmp_path, PRIME).lines
    expected = ((5, 6), (7, 8, 9), (True, False, True), (-0.5, 0.0, -1.5), (-0.75, 0.0, -1.25))
    assert content(line) == expected


class Foreign:
    """An object that only a pickle can hold."""


def test_a_pickle_of_other_objects_is_refused_without_being_loaded(tmp_path: Path) -> None:
    plain, zipped = tmp_path / "dataproto.pkl", tmp_path / "batch.pt"
    plain.write_bytes(pickle.dumps(Foreign()))
    torch.save(Foreign(), zipped)
    for path in (plain, zipped):
        with pytest.raises(InputError, match="could run any code.*torch.save"):
            read_dump(path)


def without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (without(VERL, "rollout_log_probs"), "behavior_logprobs is missing; verl keeps them.*calculate_log_probs=True"),
        (without(VERL, "attention_mask"), "attention_mask is missing"),
        (without(OPENRLHF, "rollout_log_probs"), "behavior_logprobs is missing; OpenRLHF keeps them"),
        (without(OPENRLHF, "action_mask"), "action_mask is missing"),
        (OPENRLHF | {"action_mask": [[0, 0, 0, 0]]}, "no token is left to score"),
        (OPENRLHF | {"action_mask": [[1, 1, 1, 1, 1]]}, "so there is no prompt"),
        (PRIME | {"loss_mask": [True] * 5}, "prompt_token_ids is empty"),
        (
            {"input": "2+2=", "output": "4", "gts": "4", "score": 1.0, "step": 1},
            "text without token ids.*rollout_data_dir",
        ),
    ],
)
def test_a_missing_side_is_named_with_the_framework_s_key(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        dump_of(tmp_path, record)


def test_without_old_log_probs_a_model_has_to_score(tmp_path: Path) -> None:
    dump = dump_of(tmp_path, without(VERL, "old_log_probs"))
    assert [line.trainer_logprobs for line in dump.lines] == [None, None]
    with pytest.raises(InputError, match="no trainer_logprobs, and no MODEL"):
        dump.keep(lacks_trainer_logprobs)
