"""Problems of reasoning-gym: any generator and its settings, scored by the generator in workers with a time limit."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from betterhalf.config.schema import ReasoningGymTask
from betterhalf.errors import ConfigError, InputError, MissingExtraError, RewardError
from betterhalf.tasks import reasoning_gym
from betterhalf.tasks.build import build_task
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.reasoning_gym_grader import EXTRACTIONS, ReasoningGymGrader, _checked
from betterhalf.tasks.reasoning_gym_worker import packed
from betterhalf.types import Prompt

HERE = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None,
    reason="reasoning-gym is not installed; scripts/install --vllm-cpu",
)
SUMS = {"max_terms": 2, "max_digits": 1}
MIXTURE: dict[str, Any] = {
    "datasets": [{"name": "chain_sum", "weight": 1, "config": SUMS}, {"name": "gcd", "weight": 1, "config": {}}]
}


class Characters:
    chat_template: Any = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]


def config(**settings: Any) -> ReasoningGymTask:
    base = {"generator": "chain_sum", "settings": SUMS, "num_prompts": 60, "template": "none"}
    return ReasoningGymTask(**(base | settings))


_BUILT: list[Any] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Stop the workers that a test started."""
    yield
    while _BUILT:
        _BUILT.pop().close()


def built(**settings: Any) -> DatasetTask:
    _BUILT.append(build_task(config(**settings), Characters()))  # type: ignore[arg-type]
    return _BUILT[-1]  # type: ignore[no-any-return]


def prompts_of(task: DatasetTask) -> list[Prompt]:
    return [task.prompt(index) for index in range(len(task))]


# -- without the package


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingExtraError, match=r"betterhalf\[reasoning-gym\]"):
        built()


@pytest.mark.parametrize(
    ("extract", "text", "answer"),
    [
        ("tags", "a <answer>1</answer> b <answer>\n 2 </answer>.", "2"),
        ("tags", "<answer></answer>", ""),
        ("tags", "<answer>1", None),
        ("last_line", "so\n\n 12 \n  \n", "12"),
        ("last_line", "\n ", None),
        ("last_word", "The answer is **Yes**.\n", "Yes"),
        ("last_word", " ... ", None),
        ("last_number", "2 + 1,234.50 apples are 1,236.50 apples.", "1236.50"),
        ("last_number", "5-3 is 2, or -2", "-2"),
        ("last_number", "5-3", "3"),
        ("last_number", "none", None),
        ("all", " 1\n2 ", "1\n2"),
        ("all", "", None),
    ],
)
def test_the_answer_of_a_completion(extract: Any, text: str, answer: str | None) -> None:
    assert EXTRACTIONS[extract](text) == answer


@pytest.mark.parametrize("score", [float("nan"), float("inf"), "x", None])
def test_a_score_that_is_not_a_number_is_an_error(score: Any) -> None:
    with pytest.raises(RewardError, match="not a finite number"):
        _checked(score)
    assert _checked(True) == 1.0


_FAKE = """
import os, time

class Generator:
    def score_answer(self, answer, entry):
        assert entry["metadata"] == {"pair": (1, 2), 3: {4}}, entry
        print("noise")
        if answer == "hang":
            time.sleep(60)
        if answer == "exit":
            os._exit(3)
        if answer == "memory":
            bytearray(5 * 2**30)
        if answer == "raise":
            raise ValueError("no number")
        return float(answer)

def create_dataset(name, *, seed, size, wanted):
    assert (name, wanted) == ("g", "x")
    return Generator()
"""


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give worker processes a package reasoning_gym of a single generator."""
    (tmp_path / "reasoning_gym").mkdir()
    (tmp_path / "reasoning_gym" / "__init__.py").write_text(_FAKE)
    (tmp_path / "reasoning_gym" / "composite.py").write_text("DatasetSpec = dict")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("fake_package")
def test_a_completion_that_hangs_crashes_or_raises_costs_only_itself(capfd: pytest.CaptureFixture[str]) -> None:
    entry = {"answer": "0.5", "metadata": {"pair": (1, 2), 3: {4}}}
    made = ReasoningGymGrader("g", {"wanted": "x"}, {"a": entry}, extract="all", seconds=3.0, workers=2)
    _BUILT.append(made)
    assert made.check_golds(["0.5"]) == [None]
    texts = ["0.5", "hang", "exit", "memory", "raise", "1"]
    assert made.rewards([prompt("a")] * 6, texts, ["stop"] * 6) == [0.5, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert (made.timeouts, made.unparsed_answers) == (3, 1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("fake_package")
def test_a_scorer_that_no_worker_can_create_is_an_error() -> None:
    made = ReasoningGymGrader("g", {"wanted": "y"}, {"a": {"answer": "1"}}, extract="all", seconds=3.0, workers=1)
    with pytest.raises(RewardError, match="cannot start: AssertionError .*check the package reasoning-gym"):
        made.check_golds(["1"])


class Scores:
    """Pool that gives these replies, and keeps the requests."""

    def __init__(self, *results: Any) -> None:
        self.results, self.calls = results, []  # type: ignore[var-annotated]

    def run(self, requests: Sequence[Any]) -> list[Any]:
        self.calls += requests
        return list(self.results[: len(requests)])


SLOW = {"error": "timeout", "message": "slow"}


def raised(text: str) -> dict[str, str]:
    return {"error": "exception", "message": f"{text} (a file, line 1)", "cause": text}


def grader(pool: Scores, entries: dict[str, Any]) -> ReasoningGymGrader:
    made = ReasoningGymGrader("g", {}, entries, extract="tags", seconds=1.0, workers=1)
    made._pool = pool  # type: ignore[assignment]
    return made


def prompt(name: str) -> Prompt:
    return Prompt(prompt_id=name, text="", token_ids=(1,), answer="")


def test_failures_give_nothing_and_are_counted_for_each_completion() -> None:
    pool = Scores({"score": 0.25}, SLOW, raised("ValueError: bad"))
    made = grader(pool, {"a": {"answer": "1"}, "b": {"answer": "2"}})
    texts = ["<answer>x</answer>", "<answer>y</answer>", "<answer>x</answer>", "none", "<answer>x</answer>"]
    names, reasons = ["a", "a", "b", "a", "a"], ["stop"] * 4 + ["length"]
    rewards = made.rewards([prompt(n) for n in names], texts, reasons)  # type: ignore[arg-type]
    assert rewards == [0.25, 0.0, 0.0, 0.0, 0.0]
    assert (made.timeouts, made.unparsed_answers) == (1, 1)
    assert [call["answer"] for call in pool.calls] == ["x", "y", "x"]
    assert pool.calls[2]["entry"] == packed({"answer": "2"})


@pytest.mark.parametrize(
    ("result", "words"),
    [(SLOW, "raise task.reward_seconds"), (raised("ValueError: odd"), r"\(ValueError: odd\); choose another")],
)
def test_a_scorer_that_fails_on_its_own_answer_is_found_first(result: dict[str, str], words: str) -> None:
    with pytest.raises(RewardError, match=words):
        grader(Scores(result), {"a": {"answer": "1"}}).check_golds(["1"])
    assert grader(Scores(result), {"a": {"answer": "1"}}).check_golds(["1"], will_grade=False) == [None]


# -- with the package


@HERE
@pytest.mark.extra
def test_problems_depend_on_seed_and_index_alone() -> None:
    some, more, other = built(num_prompts=5), built(num_prompts=9), built(num_prompts=5, seed=1)
    assert prompts_of(some) == prompts_of(more)[:5]
    assert [row.text for row in prompts_of(some)] != [row.text for row in prompts_of(other)]
    first = prompts_of(some)[0]
    terms = first.metadata["expression"].split()
    assert first.prompt_id == "chain_sum/0" and int(first.answer) == eval("".join(terms))
    assert first.text == f"State the final answer to the following arithmetic problem: {first.metadata['expression']} ="


@HERE
@pytest.mark.extra
@pytest.mark.parametrize("generator", ["codeio", "list_functions"])
def test_generators_that_draw_from_global_randomness_are_repeatable(generator: str) -> None:
    """Without a seed for it, at least one of these 40 problems differs between two runs."""
    made = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        before = random.getstate()
        made.append(built(generator=generator, settings={}, num_prompts=40, seed=50).record().row_digests)
        assert random.getstate() == before
    assert made[0] == made[1]


@HERE
@pytest.mark.extra
def test_problems_held_out_have_other_seeds_and_no_question_of_the_training() -> None:
    train, held_out, everything = (built(held_out=20, part=part) for part in ("train", "held_out", "all"))
    questions = {row.text for row in prompts_of(held_out)}
    assert len(held_out) == 20 and questions.isdisjoint(row.text for row in prompts_of(train))
    assert [row.prompt_id for row in prompts_of(held_out)] == [f"chain_sum/held_out/{i}" for i in range(20)]
    assert prompts_of(everything) == prompts_of(train) + prompts_of(held_out)
    whole = prompts_of(built())
    assert prompts_of(train) == [row for row in whole if row.text not in questions] and len(train) < 60
    with pytest.raises(InputError, match="all 60 problems of chain_sum are among the 50 held out"):
        built(held_out=50, settings={"min_terms": 1, "max_terms": 1, "max_digits": 1})


@HERE
@pytest.mark.extra
def test_the_generators_own_scorer_gives_the_reward() -> None:
    task = built(extract="all")
    assert task.grader.check_golds(["0"]) == [None]
    row = next(row for row in prompts_of(task) if int(row.answer) >= 0)
    texts = [row.answer, f"{row.answer}.0", f"it is {row.answer}", "no", ""]
    rewards = task.rewards([row] * 5, texts, ["stop"] * 5)
    partial = len(row.answer) / len(texts[2])
    assert rewards == [1.0, 1.0, partial, 0.0, 0.0]
    assert task.rewards([row], [row.answer], ["length"]) == [0.0]


@HERE
@pytest.mark.extra
def test_a_mixture_scores_each_problem_by_its_own_generator() -> None:
    task = built(generator="composite", settings=MIXTURE, extract="all", num_prompts=8)
    rows = prompts_of(task)
    assert {row.metadata["source_dataset"] for row in rows} == {"chain_sum", "gcd"}
    assert task.rewards(rows, [row.answer for row in rows], ["stop"] * 8) == [1.0] * 8


@HERE
@pytest.mark.extra
@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"generator": "chain_sums"}, ConfigError, "Did you mean chain_sum?"),
        ({"generator": "zzz"}, ConfigError, "There are ab, acre, "),
        ({"settings": {"max_term": 2}}, ConfigError, "max_term is not a setting of chain_sum. Did you mean max_terms?"),
        ({"settings": {"zzz": 2}}, ConfigError, "It has allow_negation, "),
        ({"settings": {"seed": 2}}, ConfigError, "task.settings.seed is set by task.seed"),
        ({"settings": {"size": 2}}, ConfigError, "task.settings.size is set by task.num_prompts"),
        ({"settings": {"max_terms": 1}}, ConfigError, "max_terms must be >= min_terms"),
        ({"settings": {"max_terms": "two"}}, ConfigError, "refuses task.settings="),
        ({"generator": "word_ladder", "settings": {}}, ConfigError, "Set PYTHONHASHSEED=0"),
        (
            {"generator": "composite", "settings": MIXTURE | {"datasets": [{"name": "ransom_note"}]}},
            ConfigError,
            "Set P",
        ),
        ({"generator": "composite", "settings": {}}, ConfigError, "Must specify at least one dataset"),
        ({"generator": "composite", "settings": {"datasets": [{"nam": "gcd"}]}}, ConfigError, "argument 'nam'"),
    ],
)
def test_wrong_generators_and_settings_are_refused(
    settings: Any, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(error) as caught:
        built(**settings)
    assert words in str(caught.value)


@HERE
@pytest.mark.extra
def test_what_determines_the_rewards_is_recorded() -> None:
    record = built().record()
    assert record.reward["reasoning-gym"] == "0.1.25" and record.reward["extract"] == "tags"
    assert json.loads(record.reward["settings"]) == SUMS and record.rows == 60
    changed = built(extract="all", settings=SUMS | {"max_terms": 3}).record()
    names = {change.split(":")[0] for change in record.reward_changes(changed)}
    assert names == {"extract", "settings", "template text"}


_DIGESTS = """
import json, sys
from betterhalf.config.schema import ReasoningGymTask
from betterhalf.tasks.fingerprint import row_digest
from betterhalf.tasks.reasoning_gym import _problems
from reasoning_gym.factory import DATASETS
found = {}
for name in sorted(set(DATASETS) - {"composite"}):
    rows = [problem.row for problem in _problems(ReasoningGymTask(generator=name), 12, seed=50, name="")]
    found[name] = [row_digest(row).hex() for row in rows]
print(json.dumps(found))
"""


@HERE
@pytest.mark.extra
def test_what_a_generator_prints_does_not_reach_standard_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loud:
        def __getitem__(self, index: int) -> dict[str, Any]:
            print("searching ...")
            return {"question": "q", "answer": "a", "metadata": {}}

    monkeypatch.setattr(reasoning_gym, "_create", lambda *_: Loud())
    assert built().problems.row(0).question == "q"
    assert capsys.readouterr().out == ""


@HERE
@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.extra
def test_all_other_generators_give_the_same_rows_in_every_process() -> None:
    found = []
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(reasoning_gym.__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, "-c", _DIGESTS], env=environment, capture_output=True, text=True, check=True
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    different = {name for name in found[0] if found[0][name] != found[1][name]}
    assert len(found[0]) > 100 and different == reasoning_gym.HASH_DEPENDENT
