"""Environments of several turns: their tokens, their failures, and the input that is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.schema import EnvironmentTask
from betterhalf.errors import ConfigError, InputError, RewardError
from betterhalf.tasks.build import build_task
from betterhalf.tasks.environment import EnvironmentTurns
from betterhalf.tasks.observation import Frame, ObservationEncoder, chat_frame
from betterhalf.tasks.screening import BadRowRule, PromptLimits, screen
from betterhalf.tasks.turns import Conversation, Failure
from betterhalf.types import Prompt

FILE = Path(__file__).parents[2] / "turn_environments.py"
LIMITS = PromptLimits(context_length=128, max_tokens=16, vocab_size=256)


class Characters:
    """A tokenizer of one token for each character; `<E>`, token 1, ends a turn of its chat template."""

    chat_template = "{{ messages }}{{ shout }}"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1 if part == "\1" else ord(part) for part in text.replace("<E>", "\1")]

    def decode(self, token_ids: list[int]) -> str:
        return "".join("<E>" if token_id == 1 else chr(token_id) for token_id in token_ids)

    def __call__(self, text: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(each) for each in text]}

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool = False, add_generation_prompt: bool, shout: str = ""
    ) -> str:
        text = "".join(f"[{each['role']}]{each['content']}<E>\n" for each in messages)
        return text + ("[assistant]" if add_generation_prompt else "") + shout


class Careless(Characters):
    """A template that leaves out the assistant's answers."""

    def apply_chat_template(self, messages: list[dict[str, str]], **more: Any) -> str:  # type: ignore[override]
        return super().apply_chat_template([each for each in messages if each["role"] == "user"], **more)


def config(name: str, **changes: Any) -> EnvironmentTask:
    return EnvironmentTask(environment=f"{FILE}:{name}", **{"template": "none", "workers": 1, **changes})


def conversation(*turns: str, **changes: Any) -> Conversation:
    prompt = Prompt(prompt_id="p/0", text="1+1=", token_ids=(1,), answer="2", metadata={"problem": "1+1="})
    return Conversation(**{"prompt": prompt, "turns": turns, "finish_reason": "stop", **changes})


@pytest.fixture(scope="module")
def hostile() -> Iterator[EnvironmentTurns]:
    turns = build_task(config("Hostile", time_limit=3.0, failure_reward=-2.0), Characters()).turns
    assert isinstance(turns, EnvironmentTurns)
    yield turns
    turns.close()


# -- tokens


def test_an_observation_is_a_message_of_the_chat_template() -> None:
    frame = chat_frame(Characters())
    assert frame == Frame(before="<E>\n[user]", after="<E>\n[assistant]")
    encoder = ObservationEncoder(tokenizer=Characters(), frame=frame, max_tokens=9)
    # The model has sampled <E> itself; another stop token (here 90) is followed by the template's own.
    assert encoder.encode("hi", 1) == tuple(Characters().encode("\n[user]hi<E>\n[assistant]"))
    assert encoder.encode("hi", 90) == tuple(Characters().encode("<E>\n[user]hi<E>\n[assistant]"))


def test_arguments_of_the_chat_template_reach_the_frame() -> None:
    task = build_task(config("Echo", template="chat", template_arguments={"shout": "!"}), Characters())
    assert task.prompt(0).text == "[user]1+1=<E>\n[assistant]!"
    assert task.turns is not None
    assert Characters().decode(list(task.turns.encode("hi", 1))) == "\n[user]hi<E>\n[assistant]!"


def test_a_long_observation_loses_its_end_and_keeps_the_template() -> None:
    encoder = ObservationEncoder(tokenizer=Characters(), frame=chat_frame(Characters()), max_tokens=4)
    assert Characters().decode(list(encoder.encode("abcdefgh", 1))) == "\n[user]abcd<E>\n[assistant]"


def test_without_a_template_an_observation_is_verbatim() -> None:
    encoder = ObservationEncoder(tokenizer=Characters(), frame=Frame(), max_tokens=4)
    assert encoder.encode("abcdefgh", 1) == (97, 98, 99, 100)
    assert encoder.encode("", 1) == ()


def test_a_template_that_hides_the_conversation_is_refused() -> None:
    with pytest.raises(InputError, match="changes the texts of a conversation"):
        chat_frame(Careless())


# -- calls


def test_answers_and_rewards_come_from_the_workers(hostile: EnvironmentTurns) -> None:
    assert hostile.respond([conversation("fine"), conversation("text")]) == [None, "more"]
    assert hostile.rewards_of([conversation("one"), conversation("x", "one")]) == [1.0, 1.0]
    assert hostile.rewards([conversation().prompt], ["one"], ["stop"]) == [1.0]
    assert len(hostile.respond([conversation("huge")])[0] or "") == 1_000_000
    assert hostile.respond([]) == []


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("raise", r"ValueError: a deed \(.*turn_environments.py, line "),
        ("exit", "SystemExit"),
        ("die", "its code ended the worker with exit status 7"),
        ("one", "respond returned int, not a text or None"),
        ("surrogate", "half of a surrogate pair"),
    ],
)
def test_a_failing_answer_fails_alone(hostile: EnvironmentTurns, deed: str, message: str) -> None:
    before = hostile.failures
    first, failure, last = hostile.respond([conversation("fine"), conversation(deed), conversation("text")])
    assert (first, last) == (None, "more")
    assert isinstance(failure, Failure)
    assert re.search(message, failure.message), failure.message
    assert hostile.failures == before + 1


def test_a_hanging_answer_ends_at_the_time_limit(hostile: EnvironmentTurns) -> None:
    started, before = time.monotonic(), hostile.timeouts
    failure, after = hostile.respond([conversation("hang"), conversation("text")])
    assert isinstance(failure, Failure)
    assert "no result within 3 s (task.time_limit)" in failure.message
    assert after == "more"
    assert hostile.timeouts == before + 1
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("deed", ["nan", "raise", "fine", "text"])
def test_a_failing_reward_is_the_failure_reward(hostile: EnvironmentTurns, deed: str) -> None:
    assert hostile.rewards_of([conversation("one"), conversation(deed)]) == [1.0, -2.0]
    assert hostile.rewards_of([conversation("one", end="failed")]) == [-2.0]


def test_the_first_failure_of_each_method_is_shown(hostile: EnvironmentTurns) -> None:
    fresh = replace(hostile, notes=[], warned=set())
    for _ in range(2):
        fresh.respond([conversation("fine"), conversation("raise")])
        fresh.rewards_of([conversation("one"), conversation("nan")])
    first, second = fresh.take_notes()
    assert first.startswith("warning: respond of task.environment=")
    assert "failed in 1 of 2 episodes: ValueError: a deed" in first
    assert "reward returned nan, not a finite number" in second
    assert "-2 (task.failure_reward)" in second
    assert fresh.take_notes() == []


def test_an_environment_that_always_fails_ends_the_run(hostile: EnvironmentTurns) -> None:
    with pytest.raises(RewardError, match="respond of task.environment=.* failed in 8 of 8 episodes: ValueError"):
        hostile.respond([conversation("raise")] * 8)
    assert hostile.respond([conversation("raise")] * 8 + [conversation("fine")])[-1] is None


def test_what_an_environment_prints_stays_out_of_standard_output(
    hostile: EnvironmentTurns, capfd: pytest.CaptureFixture[str]
) -> None:
    fresh = replace(hostile, notes=[], warned=set())
    for _ in range(2):
        assert fresh.respond([conversation("print")]) == [None]
    assert capfd.readouterr() == ("", "")
    (note,) = fresh.take_notes()
    assert "Hostile printed 5001 bytes, which are shown this once, up to 4096 characters:\nnoisenoise" in note


def test_an_environment_has_a_memory_limit() -> None:
    turns = build_task(config("Hostile", memory_gib=0.25), Characters()).turns
    assert turns is not None
    failure, after = turns.respond([conversation("memory"), conversation("text")])
    turns.close()
    assert isinstance(failure, Failure) and failure.message.startswith("MemoryError")
    assert after == "more"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_what_a_hanging_answer_has_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARK", str(tmp_path / "pid"))
    turns = build_task(config("Hostile", time_limit=2.0), Characters()).turns
    assert turns is not None
    (failure,) = turns.respond([conversation("fork")])
    assert isinstance(failure, Failure)
    child = Path("/proc") / (tmp_path / "pid").read_text()
    assert _eventually(lambda: not child.exists() or "Z" in (child / "stat").read_text().split()[2])
    turns.close()


_HANG = """
from betterhalf.tasks.build import build_task
from tests.unit.tasks.test_environment import Characters, config, conversation
if __name__ == "__main__":
    build_task(config("Hostile", time_limit=600.0), Characters()).turns.respond([conversation("DEED")])
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("deed", ["signal", "fork"])
def test_no_process_of_a_worker_outlives_a_run_that_is_killed(tmp_path: Path, deed: str) -> None:
    (tmp_path / "hang.py").write_text(_HANG.replace("DEED", deed))
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}", "MARK": str(tmp_path / "pid")}
    run = subprocess.Popen([sys.executable, str(tmp_path / "hang.py")], env=environment)
    worker = int(_eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    assert Path(f"/proc/{worker}").exists()
    run.kill()
    run.wait()
    assert _eventually(lambda: not Path(f"/proc/{worker}").exists())


def _eventually(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return result


def test_an_environment_that_workers_cannot_create_is_refused_before_sampling() -> None:
    task = build_task(config("InWorkersOnly", settings={"parent": os.getpid()}), Characters())
    with pytest.raises(RewardError, match="cannot be created in a worker process: RuntimeError: not here"):
        screen(task, LIMITS, BadRowRule(action="refuse", key="task.bad_rows"))
    task.close()


# -- prompts


def test_prompts_of_the_class_are_rows_with_metadata() -> None:
    task = build_task(config("Echo"), Characters())
    assert len(task) == 32
    prompt = task.prompt(10)
    assert (prompt.prompt_id, prompt.text, prompt.answer) == ("environment/10", "2+2=", "")
    assert prompt.metadata == {"problem": "2+2=", "answer": 4, "k": 10}
    assert task.place(10) == "prompts of Echo, row 11"
    assert task.record().reward[f"environment {FILE}:Echo"] != "unknown"
    assert build_task(config("Echo", answer_field="answer"), Characters()).prompt(10).answer == "4"


def test_a_changed_field_is_another_row() -> None:
    """The environment reads every field, so a resumed run must find the same ones."""
    one, two = (build_task(config("Echo", settings={"offset": k}), Characters()).record() for k in (0, 1))
    assert len(one.rows_that_differ(two)) == 32


def test_given_prompts_may_be_conversations_and_unusable_ones_are_named() -> None:
    task = build_task(config("Mixed", template="chat", system_prompt="Be brief."), Characters())
    assert task.prompt(0).text == "[system]Be brief.<E>\n[user]1+1=<E>\n[assistant]"
    assert task.prompt(1).text == "[system]Be brief.<E>\n[user]a<E>\n[assistant]b<E>\n[user]c<E>\n[assistant]"
    reasons = [row.defect.reason for index in range(4) if (row := task.problems.row(index)).defect]
    assert reasons == ["it is a int", "the field `problem` is missing (the row has 'question')"]


def test_prompts_of_a_file_come_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": f"{k}+1=", "level": k}) for k in range(3)))
    changes = {"path": str(path), "question_field": "text"}
    task = build_task(config("NoPrompts", **changes), Characters())
    assert [task.place(index) for index in range(3)] == [f"{path}, row {n}" for n in (1, 3, 5)]
    assert task.prompt(1).metadata == {"text": "1+1=", "level": 1}
    held_out = build_task(config("NoPrompts", **changes, held_out=1, part="held_out"), Characters())
    assert (len(held_out), held_out.turns is not None) == (1, True)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Ecko", {}, r"has no attribute 'Ecko'. Did you mean Echo\?"),
        ("Echo", {"settings": {"turn": 3}}, "creating it with task.settings={'turn': 3} fails with TypeError"),
        ("NoReward", {}, "has no method reward. Its method rewards looks similar. Expected: def reward"),
        ("TooFew", {}, "has the signature reward"),
        ("NoPrompts", {}, "has no method prompts, and task.path is absent"),
        ("EmptyPrompts", {}, "gives no prompts"),
        ("EndlessPrompts", {}, "gives more than 1,000,000 prompts, and may never end. End it, or set task.max_rows"),
        ("LeavingPrompts", {}, "the method prompts of LeavingPrompts fails with SystemExit: 0"),
        ("_DEEDS", {}, "is dict, which cannot be called"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused_with_the_fix(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_task(config(name, **changes), Characters())


def test_the_first_prompts_of_an_endless_generator_can_be_used() -> None:
    assert len(build_task(config("EndlessPrompts", max_rows=3), Characters())) == 3


def test_a_template_without_a_second_turn_is_refused() -> None:
    with pytest.raises(ValueError, match="task.template=r1_distill is a single question and has no second turn"):
        config("Echo", template="r1_distill")


def test_a_data_file_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in (("none.jsonl", "no data file"), ("empty.jsonl", "is empty")):
        with pytest.raises(InputError, match=message):
            build_task(config("NoPrompts", path=str(tmp_path / name)), Characters())
