"""The perfectible set: the filter, resuming its file, and the tasks that may use it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from betterhalf.config.schema import ArithmeticTask, MathTask, PerfectibleTask
from betterhalf.errors import InputError
from betterhalf.tasks.arithmetic import running_sum_digits, running_sum_solution
from betterhalf.tasks.build import build_task
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.perfectible import (
    Provenance,
    SolvedRow,
    append_solved,
    open_perfectible,
    read_kept,
    read_perfectible,
    select,
)

BASE = ArithmeticTask(num_prompts=6)
PROVENANCE = Provenance(
    model="demo",
    weights_digest="abc",
    task=BASE.model_dump(),
    seed=0,
    candidates=4,
    samples=10,
    lower=0.2,
    upper=0.8,
    temperature=1.0,
    max_tokens=64,
    engine_dtype="fp16",
    versions={"torch": "2"},
)


class Characters:
    """One id for each character."""

    chat_template = None

    def __call__(
        self, text: list[str], *, add_special_tokens: bool = True, return_attention_mask: bool = True
    ) -> dict[str, Any]:
        return {"input_ids": [self.encode(one) for one in text]}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]

    def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> Any:
        raise AssertionError("not a chat")


def row(index: int, solved: int) -> SolvedRow:
    return SolvedRow(index=index, prompt_id=f"running_sum/{index}", solved=solved, samples=10)


def write(path: Path, solved: list[int], provenance: Provenance = PROVENANCE) -> Path:
    assert open_perfectible(path, provenance) == []
    for index, count in enumerate(solved):
        append_solved(path, row(index, count))
    return path


def test_select_keeps_both_bounds_and_counts_the_rest() -> None:
    result = select([0, 7, 8, 20, 32, 33, 40, 40], samples=40, lower=0.2, upper=0.8)
    assert result.kept == (2, 3, 4)
    assert (result.too_easy, result.too_hard) == (3, 2)


def test_a_bound_that_floating_point_misses_still_counts() -> None:
    assert 0.29 * 100 < 29
    assert select([29, 30], samples=100, lower=0.0, upper=0.29).kept == (0,)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30))
def test_every_prompt_is_kept_too_easy_or_too_hard(counts: list[int]) -> None:
    inside = [count for count in counts if 3 <= count <= 9]
    if not inside:
        with pytest.raises(InputError):
            select(counts, 12, 0.25, 0.75)
        return
    result = select(counts, 12, 0.25, 0.75)
    assert [counts[index] for index in result.kept] == inside
    assert len(result.kept) + result.too_easy + result.too_hard == len(counts)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([0, 0, 10], "none of 3 prompts is perfectible: 1 too easy .*, 2 too hard .*more sanity.candidates"),
        ([10, 10], "2 too easy .*, 0 too hard .*; choose a harder task"),
        ([0], "0 too easy .*, 1 too hard .*; choose an easier task"),
    ],
)
def test_nothing_kept_says_how_many_were_too_easy_and_too_hard(counts: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        select(counts, 10, 0.2, 0.8)


def test_an_interrupted_count_continues_where_it_stopped(tmp_path: Path) -> None:
    path = write(tmp_path / "perfectible.jsonl", [5, 0])
    with path.open("a") as file:
        file.write('{"index": 2, "prompt_')  # cut off by a kill
    assert open_perfectible(path, PROVENANCE) == [row(0, 5), row(1, 0)]
    append_solved(path, row(2, 9))
    assert read_perfectible(path) == (PROVENANCE, [row(0, 5), row(1, 0), row(2, 9)])


def test_a_header_torn_by_a_kill_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "perfectible.jsonl"
    path.write_text('{"provenance": {"mod')
    assert open_perfectible(path, PROVENANCE) == []
    assert read_perfectible(path) == (PROVENANCE, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_digest": "xyz"}, "weights_digest: 'abc' -> 'xyz'"),
        ({"samples": 40}, "samples: 10 -> 40"),
        ({"task": {**BASE.model_dump(), "terms": 3}}, "task.terms: 8 -> 3"),
        ({"versions": {"torch": "3", "new": "1"}}, "versions.torch: '2' -> '3'; versions.new: None -> '1'"),
    ],
)
def test_another_provenance_is_refused_and_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "perfectible.jsonl", [5])
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        open_perfectible(path, replace(PROVENANCE, **change))
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{}\n", '{"provenance": {"model": "demo"}}\n', '{"index": 0}\n'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "perfectible.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match="not a perfectible set"):
        read_perfectible(path)


def test_a_gap_in_the_rows_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "perfectible.jsonl", [5])
    append_solved(path, row(2, 5))
    with pytest.raises(InputError, match="prompt 2 where prompt 1 belongs"):
        read_perfectible(path)


def test_an_unfinished_count_is_not_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "perfectible.jsonl", [5, 5, 5])
    with pytest.raises(InputError, match="3 of 4 prompts .* --resume"):
        read_kept(path)


def test_a_missing_file_names_the_verb_that_makes_it(tmp_path: Path) -> None:
    config = PerfectibleTask(path=str(tmp_path / "none.jsonl"), base=BASE)
    with pytest.raises(InputError, match="betterhalf sanity"):
        build_task(config, Characters())


def test_the_task_has_the_kept_prompts_and_the_rewards_of_its_base(tmp_path: Path) -> None:
    path = write(tmp_path / "perfectible.jsonl", [1, 5, 9, 8])
    task = build_task(PerfectibleTask(path=str(path), base=BASE), Characters())
    assert [task.prompt(index).prompt_id for index in range(len(task))] == ["running_sum/1", "running_sum/3"]
    names = [prompt.prompt_id for prompt in task.prompts(0, 6, seed=0)]
    assert [sorted(names[start : start + 2]) for start in (0, 2, 4)] == [["running_sum/1", "running_sum/3"]] * 3
    solution = running_sum_solution(running_sum_digits(0, 3, 8))
    assert task.rewards([task.prompt(1), task.prompt(0)], [solution] * 2, ["stop"] * 2) == [1.0, 0.0]
    assert task.timeouts == 0
    task.close()
    task.close()


def test_a_set_counted_on_another_task_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "perfectible.jsonl", [5, 5, 5, 5])
    with pytest.raises(InputError, match=r"another task \(seed: 0 -> 1\)"):
        build_task(PerfectibleTask(path=str(path), base=ArithmeticTask(num_prompts=6, seed=1)), Characters())


def math_set(folder: Path, problems: list[str], ids: list[str], base: MathTask) -> tuple[Path, DatasetTask]:
    """A perfectible set of these rows, and the base task it was counted on."""
    Path(base.path).write_text("".join(json.dumps({"problem": text, "answer": "2"}) + "\n" for text in problems))
    task = build_task(base, Characters())
    digests = {task.problems.row(i).prompt_id: task.record().row(i) for i in range(len(task))}
    path = folder / "perfectible.jsonl"
    open_perfectible(path, replace(PROVENANCE, task=base.model_dump(), candidates=len(ids)))
    for index, name in enumerate(ids):
        append_solved(path, SolvedRow(index=index, prompt_id=name, solved=5, samples=10, digest=digests[name]))
    return path, task


def test_a_set_counted_without_bad_rows_finds_its_prompts_by_their_names(tmp_path: Path) -> None:
    base = MathTask(path=str(tmp_path / "rows.jsonl"), template="none", bad_rows="skip")
    path, task = math_set(tmp_path, ["a", "bad", "b", "c"], ["math/0", "math/2", "math/3"], base)
    kept = build_task(PerfectibleTask(path=str(path), base=base), Characters())
    assert [kept.prompt(i) for i in range(3)] == [task.prompt(i) for i in (0, 2, 3)]


def test_a_set_whose_prompts_have_changed_is_refused_unless_allowed(tmp_path: Path) -> None:
    base = MathTask(path=str(tmp_path / "rows.jsonl"), template="none")
    path, _ = math_set(tmp_path, ["a", "b", "c"], ["math/0", "math/1", "math/2"], base)
    Path(base.path).write_text("".join(json.dumps({"problem": text, "answer": "2"}) + "\n" for text in "aBc"))
    with pytest.raises(InputError, match=r"1 of 3 prompts .*rows.jsonl, row 2. .*task.base.allow_changed_data=true"):
        build_task(PerfectibleTask(path=str(path), base=base), Characters())
    allowed = base.model_copy(update={"allow_changed_data": True})
    assert build_task(PerfectibleTask(path=str(path), base=allowed), Characters()).prompt(1).text == "B"


def test_a_set_of_a_version_with_fewer_settings_is_still_the_same_task(tmp_path: Path) -> None:
    base = ArithmeticTask(num_prompts=6)
    old = {key: value for key, value in base.model_dump().items() if not key.startswith(("held_out", "part"))}
    path = write(tmp_path / "perfectible.jsonl", [5, 5, 5, 5], replace(PROVENANCE, task=old))
    task = build_task(PerfectibleTask(path=str(path), base=base), Characters())
    assert len(task) == 4
    open_perfectible(path, replace(PROVENANCE, task=base.model_dump()))
    held_out = base.model_copy(update={"held_out": 1.0})
    with pytest.raises(InputError, match=r"another task \(held_out: 0.0 -> 1.0\)"):
        build_task(PerfectibleTask(path=str(path), base=held_out), Characters())


def test_prompts_that_the_base_lacks_are_refused(tmp_path: Path) -> None:
    short = replace(PROVENANCE, task=ArithmeticTask(num_prompts=3).model_dump())
    path = write(tmp_path / "perfectible.jsonl", [5, 5, 5, 5], short)
    with pytest.raises(InputError, match="'running_sum/3', which the base task does not have"):
        build_task(PerfectibleTask(path=str(path), base=ArithmeticTask(num_prompts=3)), Characters())
