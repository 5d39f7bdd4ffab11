"""The environments of docs/environments.md run as they are written, the adapters against small stand-ins."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from betterhalf.tasks.surprise_digit import SurpriseDigit

PAGE = Path(__file__).parents[3] / "docs" / "environments.md"


def recipe(name: str) -> dict[str, Any]:
    """Run the code block whose first line is `# NAME`, and return what it defines."""
    blocks = re.findall(r"^```python\n# (\S+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    found: dict[str, Any] = {}
    exec(dict(blocks)[name], found)
    return found


def module(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """Put a module into `sys.modules`, and its parents as empty ones."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        made = types.ModuleType(".".join(parts[:count]))
        made.__dict__.update(attributes if count == len(parts) else {})
        monkeypatch.setitem(sys.modules, made.__name__, made)


def test_the_guessing_game() -> None:
    game = recipe("guess.py")["Guess"](highest=9, num_prompts=3)
    rows = list(game.prompts())
    assert [row["number"] for row in rows] == [1, 9, 8]
    row = rows[2]
    assert game.respond("p", ["?"], row) == "That is not a number. Try again."
    assert [game.respond("p", [guess], row) for guess in (" 3\n", "9", "8")] == ["Higher.", "Lower.", None]
    assert game.reward("p", ["3", " 8 "], row) == 0.5
    assert game.reward("p", ["3"], row) == 0.0


class MultiTurn:
    """A counting game with the methods of a verifiers 0.1 `MultiTurnEnv`: say one more than the environment."""

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.rubric = self

    def get_dataset(self) -> list[dict[str, Any]]:
        texts = ({"role": "system", "content": "Count."}, {"role": "user", "content": str(self.start)})
        return [{"prompt": list(texts), "answer": "", "info": {"until": until}} for until in (4, 6)]

    async def init_state(self, row: dict[str, Any], client: Any, model: str, sampling: Any) -> dict[str, Any]:
        return {**row, "trajectory": [], "final_env_response": None, "reward": None}

    async def setup_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return state | {"right": 0}

    async def is_completed(self, state: dict[str, Any]) -> bool:
        return len(state["trajectory"]) >= 5

    async def get_prompt_messages(self, state: dict[str, Any]) -> list[dict[str, str]]:
        if not state["trajectory"]:
            return list(state["prompt"])
        last = state["trajectory"][-1]
        said, expected = last["completion"][-1]["content"], int(last["prompt"][-1]["content"]) + 1
        state["right"] += said == str(expected)
        messages = [*last["prompt"], *last["completion"], {"role": "user", "content": str(expected + 1)}]
        if expected + 1 >= state["info"]["until"]:
            state["final_env_response"] = messages[-1:]
        return messages

    async def render_completion(self, state: dict[str, Any]) -> None:
        state["completion"] = [message for step in state["trajectory"] for message in step["completion"]]

    async def score_rollout(self, state: dict[str, Any], semaphore: Any) -> None:
        async with semaphore:
            state["reward"] = state["right"] + len(state["completion"]) / 10


def test_the_adapter_of_verifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    module(
        monkeypatch, "verifiers", load_environment=lambda name, **arguments: {"counting": MultiTurn}[name](**arguments)
    )
    environment = recipe("verifiers_adapter.py")["VerifiersEnvironment"]("counting", start=1)
    first, second = environment.prompts()
    assert first["problem"] == "Count.\n\n1"
    assert environment.respond("", ["2"], second) == "3"
    assert environment.respond("", ["2", "nonsense"], second) == "5"
    assert environment.respond("", ["2", "4"], first) is None
    assert environment.reward("", ["2", "4"], first) == 2.2
    assert environment.reward("", ["3"], first) == 0.1


@dataclass
class StepResult:
    """Result of a step in OpenEnv."""

    observation: dict[str, Any]
    reward: float | None = None
    done: bool = False


class Server:
    """A game with the methods of OpenEnv's generic client: say the seed, digit by digit."""

    def __init__(self, base_url: str) -> None:
        assert base_url == "http://localhost:8000"

    def sync(self) -> Server:
        return self

    def reset(self, seed: int) -> StepResult:
        self.seed, self.left = seed, str(seed)
        return StepResult({"message": f"say {seed}"})

    def step(self, action: dict[str, Any]) -> StepResult:
        digit, self.left = self.left[0], self.left[1:]
        return StepResult({"message": f"left: {self.left}"}, float(action["message"] == digit), not self.left)


def test_the_adapter_of_openenv(monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "openenv.core.generic_client", GenericEnvClient=Server)
    environment = recipe("openenv_adapter.py")["OpenEnvEnvironment"]("http://localhost:8000", num_prompts=13)
    row = list(environment.prompts())[12]
    assert row == {"problem": "say 12", "seed": 12}
    assert environment.respond("", ["1"], row) == "left: 2"
    assert environment.respond("", ["1", "3"], row) is None
    assert environment.reward("", ["1", "3"], row) == 1.0
    assert environment.reward("", ["1", "2"], row) == 2.0


def test_the_worked_example_asks_for_a_digit_of_its_own() -> None:
    example = SurpriseDigit(terms=4, num_prompts=50, seed=3)
    rows = list(example.prompts())
    assert len(rows) == 50
    for row in rows:
        question, _, steps = row["problem"].partition("=")
        digits = [int(digit) for digit in question.split("+")]
        before, after = row["totals"]
        assert (before, after) == (sum(digits[:3]), sum(digits[:3]) + row["digit"])
        assert steps == f"{digits[1]}={digits[0] + digits[1]:02d},{digits[2]}="
        turns = [f"{before:02d},", f"{after:02d}."]
        assert example.respond("", turns[:1], row) == f"{row['digit']}="
        assert example.respond("", turns, row) is None
        assert example.reward("", turns, row) == 1.0
        assert example.reward("", [turns[0], f"{after + 1:02d}."], row) == 0.0
        assert example.reward("", turns[:1], row) == 0.0
    assert len({row["problem"] for row in rows}) > 45
