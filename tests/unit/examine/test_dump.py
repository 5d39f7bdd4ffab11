"""Dumps of other frameworks: lines that are kept, reasons to reject a line, and TRL's shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest

from betterhalf.errors import InputError
from betterhalf.examine.dump import Dump, fits_model, lacks_trainer_logprobs, read_dump, write_dump
from betterhalf.types import Completion, DtypeName

GOOD: dict[str, Any] = {"prompt_token_ids": [5, 6], "token_ids": [7, 8, 9], "behavior_logprobs": [-0.5, -1.25, -3.0]}


def dump_of(tmp_path: Path, *lines: object) -> Dump:
    path = tmp_path / "dump.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return read_dump(path)


def reasons(dump: Dump) -> list[tuple[int, str]]:
    return [(rejection.line, rejection.reason) for rejection in dump.rejected]


def test_a_good_line_is_read_unchanged(tmp_path: Path) -> None:
    extra = {"trainer_logprobs": [-0.5, -1.0, -3.5], "prompt_id": "a", "finish_reason": "length", "temperature": 0.7}
    line = dump_of(tmp_path, GOOD | extra | {"rollout_dtype": "bf16", "reward": 1}).lines[0]
    assert (line.prompt_token_ids, line.completion.token_ids) == ((5, 6), (7, 8, 9))
    assert line.completion.behavior_logprobs == (-0.5, -1.25, -3.0)
    assert line.completion.finish_reason == "length"
    assert line.trainer_logprobs == (-0.5, -1.0, -3.5)
    assert (line.number, line.prompt_id, line.temperature, line.rollout, line.train) == (1, "a", 0.7, "bf16", "dump")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token_ids": []}, "token_ids is empty"),
        ({"prompt_token_ids": []}, "prompt_token_ids is empty"),
        ({"prompt_token_ids": None}, "prompt_token_ids is missing"),
        ({"token_ids": [7, 8.5, 9]}, "token_ids[1] = 8.5 is not a token id"),
        ({"token_ids": [7, True, 9]}, "token_ids[1] = true is not a token id"),
        ({"token_ids": [7, -1, 9]}, "token_ids[1] = -1 is not a token id"),
        ({"token_ids": "789"}, "token_ids is not a list"),
        ({"behavior_logprobs": [-0.5, -1.0]}, "behavior_logprobs has 2 values for 3 token_ids"),
        ({"behavior_logprobs": [-0.5, math.nan, -1.0]}, "behavior_logprobs[1] = NaN is not a finite number"),
        ({"behavior_logprobs": [-math.inf, -1.0, -1.0]}, "behavior_logprobs[0] = -Infinity is not a finite number"),
        ({"behavior_logprobs": [-0.5, None, -1.0]}, "behavior_logprobs[1] = null is not a finite number"),
        ({"behavior_logprobs": [-0.5, 0.2, -1.0]}, "behavior_logprobs[1] = 0.2 is positive, so it is not a logprob"),
        ({"token_ids": [7, 10**30, 9]}, f"token_ids[1] = {10**30} is not a token id"),
        (
            {"behavior_logprobs": [-0.5, -9999.0, -1.0]},
            "behavior_logprobs[1] = -9999.0 is too low for a logprob; it may stand for a missing one",
        ),
        (
            {"trainer_logprobs": [-0.5, -(10**7), -1.0]},
            "trainer_logprobs[1] = -10000000 is too low for a logprob; it may stand for a missing one",
        ),
        ({"trainer_logprobs": [-0.5]}, "trainer_logprobs has 1 values for 3 token_ids"),
        ({"temperature": 0}, "temperature = 0 is not a positive number"),
        ({"rollout_dtype": "fp8"}, f'rollout_dtype = "fp8" is none of {", ".join(get_args(DtypeName))}'),
    ],
)
def test_a_bad_line_is_rejected_by_number_and_reason_and_the_rest_is_kept(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    dump = dump_of(tmp_path, GOOD, GOOD | change, GOOD)
    assert [line.number for line in dump.lines] == [1, 3]
    assert reasons(dump) == [(2, reason)]


def test_lines_that_are_not_objects_are_rejected_and_blank_ones_ignored(tmp_path: Path) -> None:
    dump = dump_of(tmp_path, "{'a': 1}", "", "[1, 2]", GOOD)
    assert [line.number for line in dump.lines] == [4]
    assert [line for line, _ in reasons(dump)] == [1, 3]
    assert reasons(dump)[0][1].startswith("not JSON")
    assert reasons(dump)[1][1] == "not a JSON object"


def test_a_logprob_rounded_above_zero_is_accepted(tmp_path: Path) -> None:
    assert len(dump_of(tmp_path, GOOD | {"behavior_logprobs": [1e-5, 0.0, 0]}).lines) == 1


def test_equal_prompts_without_a_name_get_the_same_one(tmp_path: Path) -> None:
    dump = dump_of(tmp_path, GOOD, GOOD | {"prompt_token_ids": [1]}, GOOD, GOOD | {"prompt_id": 17})
    assert [line.prompt_id for line in dump.lines] == ["line-1", "line-2", "line-1", "17"]


@pytest.mark.parametrize("name", ["rollout_log_probs", "sampling_per_token_logps", "generation_logprobs"])
def test_a_dump_without_behavior_logprobs_names_the_key_and_its_name_in_the_file(tmp_path: Path, name: str) -> None:
    line = {key: value for key, value in GOOD.items() if key != "behavior_logprobs"} | {name: [-1.0, -1.0, -1.0]}
    with pytest.raises(
        InputError, match=rf"holds no behavior_logprobs.*line 1: .*{name} .* is log mu from the engine, rename it"
    ):
        dump_of(tmp_path, line, line)


def test_files_that_are_not_a_dump_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read \\(No such file"):
        read_dump(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="cannot be read \\(Is a directory"):
        read_dump(tmp_path)
    with pytest.raises(InputError, match="is empty"):
        dump_of(tmp_path)
    with pytest.raises(InputError, match="no usable line; line 1: token_ids is empty"):
        dump_of(tmp_path, GOOD | {"token_ids": []})


def test_the_error_for_trls_parquet_log_says_that_it_holds_no_logprobs(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "completions_00001.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "completion": ["b"], "advantage": [0.5]}), path)
    with pytest.raises(InputError, match="Parquet.*only text, no token ids and no logprobs"):
        read_dump(path)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    completion = Completion(
        token_ids=(3, 4), behavior_logprobs=(-0.1234567, -2.5), finish_reason="length", policy_version=0
    )
    write_dump(tmp_path / "d.jsonl", "bf16", ["p1"], [((1, 2), completion)], 0.5)
    line = read_dump(tmp_path / "d.jsonl").lines[0]
    assert line.completion == completion
    assert (line.prompt_id, line.prompt_token_ids, line.rollout, line.temperature) == ("p1", (1, 2), "bf16", 0.5)


def test_lines_that_a_model_cannot_score_are_rejected(tmp_path: Path) -> None:
    dump = dump_of(
        tmp_path,
        GOOD | {"temperature": 1},
        GOOD | {"token_ids": [7, 8, 100]},
        GOOD | {"prompt_token_ids": [1] * 8},
        GOOD | {"temperature": 0.5},
        "no json",
    )
    kept = dump.keep(fits_model(vocabulary=100, context=10, temperature=1.0))
    assert [line.number for line in kept.lines] == [1]
    assert reasons(kept)[:3] == [
        (2, "token id 100 is outside the model's vocabulary of 100"),
        (3, "11 tokens exceed the model's context of 10"),
        (4, "temperature 0.5 differs from 1, at which this dump is scored"),
    ]
    assert kept.rejected[3].line == 5
    with pytest.raises(InputError, match="no line can be used; line 1: token id 9 is outside"):
        dump.keep(fits_model(vocabulary=9, context=4, temperature=1.0))


def test_without_a_model_lines_need_trainer_logprobs(tmp_path: Path) -> None:
    dump = dump_of(tmp_path, GOOD, GOOD | {"trainer_logprobs": [-1.0, -1.0, -1.0]}).keep(lacks_trainer_logprobs)
    assert [line.number for line in dump.lines] == [2]
    assert reasons(dump) == [(1, "no trainer_logprobs, and no MODEL is named to score with")]


# -- TRL


def test_output_of_a_trl_rollout_function_is_read_by_completion_or_by_batch(tmp_path: Path) -> None:
    single = {"prompt_ids": [5, 6], "completion_ids": [7, 8], "logprobs": [-1.0, -2.0]}
    batch = {
        "prompt_ids": [[5, 6], [1]],
        "completion_ids": [[7, 8], [9]],
        "logprobs": [[[-1.0], [-2.0]], [[-3.0]]],
        "temperature": 0.9,
        "answer": ["a", "b"],
    }
    dump = dump_of(tmp_path, single, batch)
    assert [line.completion.token_ids for line in dump.lines] == [(7, 8), (7, 8), (9,)]
    assert [line.completion.behavior_logprobs for line in dump.lines] == [(-1.0, -2.0), (-1.0, -2.0), (-3.0,)]
    assert [line.prompt_token_ids for line in dump.lines] == [(5, 6), (5, 6), (1,)]
    assert [line.temperature for line in dump.lines] == [None, 0.9, 0.9]
    assert not dump.rejected


def test_trl_prompts_given_once_belong_to_all_their_siblings(tmp_path: Path) -> None:
    batch = {"prompt_ids": [[1], [2]], "completion_ids": [[3], [4], [5], [6]], "logprobs": [[-1.0]] * 4}
    assert [line.prompt_token_ids for line in dump_of(tmp_path, batch).lines] == [(1,), (1,), (2,), (2,)]


def test_trl_trainer_inputs_lose_their_padding(tmp_path: Path) -> None:
    inputs = {
        "prompt_ids": [[0, 0, 5], [3, 4, 5]],
        "prompt_mask": [[0, 0, 1], [1, 1, 1]],
        "completion_ids": [[7, 8, 0], [9, 0, 0]],
        "completion_mask": [[1, 1, 0], [1, 0, 0]],
        "sampling_per_token_logps": [[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0]],
        "old_per_token_logps": [[-1.5, -2.5, -9.0], [-3.5, -9.0, -9.0]],
        "advantages": [0.5, -0.5],
        "num_items_in_batch": 3,
        "pixel_values": [[0.5]] * 7,
    }
    lines = dump_of(tmp_path, inputs).lines
    assert [line.prompt_token_ids for line in lines] == [(5,), (3, 4, 5)]
    assert [line.completion.behavior_logprobs for line in lines] == [(-1.0, -2.0), (-3.0,)]
    assert [line.trainer_logprobs for line in lines] == [(-1.5, -2.5), (-3.5,)]


def test_tokens_that_an_environment_wrote_are_read_and_not_scored(tmp_path: Path) -> None:
    row = {
        "prompt_ids": [1],
        "completion_ids": [10, 11, 20, 21, 12],
        "logprobs": [-1.0, -2.0, 0.0, 0.0, -3.0],
        "env_mask": [1, 1, 0, 0, 1],
    }
    (line,) = dump_of(tmp_path, row).lines
    assert (line.prompt_token_ids, line.completion.token_ids) == ((1,), (10, 11, 20, 21, 12))
    assert line.scored == (True, True, False, False, True)
    assert line.completion.behavior_logprobs == (-1.0, -2.0, 0.0, 0.0, -3.0)


def test_the_sampled_token_is_found_among_trls_top_logprobs(tmp_path: Path) -> None:
    row = {
        "prompt_ids": [1],
        "completion_ids": [7, 8],
        "logprobs": [[-0.1, -4.0], [-0.2, -5.0]],
        "logprob_token_ids": [[3, 7], [8, 3]],
    }
    assert dump_of(tmp_path, row).lines[0].completion.behavior_logprobs == (-4.0, -0.2)
    without = {key: value for key, value in row.items() if key != "logprob_token_ids"}
    with pytest.raises(InputError, match="several candidates for a token"):
        dump_of(tmp_path, without)


def test_one_bad_completion_of_a_batch_leaves_the_others(tmp_path: Path) -> None:
    batch = {
        "prompt_ids": [[1], [1], [1], [1]],
        "completion_ids": [[3], [4, 5], [5], [6]],
        "logprobs": [[-1.0], [-1.0], [[-1.0, -2.0]], [None]],
    }
    dump = dump_of(tmp_path, batch)
    assert [line.completion.token_ids for line in dump.lines] == [(3,)]
    assert [reason.partition(":")[0] for _, reason in reasons(dump)] == ["completion 2", "completion 3", "completion 4"]


@pytest.mark.parametrize(
    "record",
    [
        {"completion_ids": 3},
        {"completion_ids": [[1], [2]], "prompt_ids": [[1], [2], [3]], "logprobs": [[-1.0], [-1.0]]},
        {"completion_ids": [1], "prompt_ids": 4, "logprobs": [-1.0]},
        {"completion_ids": [1], "prompt_ids": [4], "logprobs": -1.0},
        {"completion_ids": [1], "prompt_ids": [4], "logprobs": [-1.0], "env_mask": [1, 0]},
        {"completion_ids": [1], "prompt_ids": [4], "logprobs": [-1.0], "completion_mask": 1},
        {"completion_ids": [], "prompt_ids": [4], "logprobs": []},
        {"completion_ids": [1]},
    ],
)
def test_inconsistent_trl_records_are_rejected(tmp_path: Path, record: dict[str, Any]) -> None:
    dump = dump_of(tmp_path, GOOD, record)
    assert len(dump.lines) == 1
    assert [line for line, _ in reasons(dump)] == [2]
