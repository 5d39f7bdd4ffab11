"""Environments of several turns for tests; worker processes load them from this file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Echo:
    """Answer each turn with its length and a plus; the reward is the number of turns."""

    def __init__(self, turns: int = 2, offset: int = 0) -> None:
        self.turns, self.offset = turns, offset

    def prompts(self) -> list[dict[str, Any]]:
        """Give 32 sums of two digits."""
        sums = [(k % 9 + 1, k // 9 + 1) for k in range(32)]
        return [{"problem": f"{a}+{b}=", "answer": a + b, "k": k + self.offset} for k, (a, b) in enumerate(sums)]

    def respond(self, prompt: str, turns: Sequence[str], metadata: Mapping[str, Any]) -> str | None:
        """Continue up to the wanted number of turns."""
        return f"{len(turns[-1]) % 10}+" if len(turns) < self.turns else None

    def reward(self, prompt: str, turns: Sequence[str], metadata: Mapping[str, Any]) -> float:
        """Count the turns, and the characters of the last one."""
        return len(turns) + len(turns[-1]) / 100


class Endless(Echo):
    """Never end an episode."""

    def respond(self, prompt: str, turns: Sequence[str], metadata: Mapping[str, Any]) -> str | None:
        """Always ask for another turn."""
        return "1+1="


class Wordy(Echo):
    """Answer at great length."""

    def respond(self, prompt: str, turns: Sequence[str], metadata: Mapping[str, Any]) -> str | None:
        """Give 60 tokens, which the demo's context of 128 cannot hold many times."""
        return "1+" * 30


class Hostile:
    """Do whatever the prompt's `deed` says."""

    def prompts(self) -> list[str]:
        """Give one prompt."""
        return ["1+1="]

    def respond(self, prompt: str, turns: Sequence[str], metadata: Mapping[str, Any]) -> Any:
        """Fail in the way that the last turn names."""
        return _DEEDS[turns[-1]]()

    def reward(self, prompt: str, turns: Sequence[str], metadata: Mapping[str, Any]) -> Any:
        """Fail in the way that the last turn names."""
        return _DEEDS[turns[-1]]()


def _raise() -> None:
    raise ValueError("a deed")


def _exit() -> None:
    sys.exit(0)


def _signal() -> None:
    Path(os.environ["MARK"]).write_text(str(os.getpid()))
    time.sleep(300)


def _fork() -> None:
    """Start a process in a session of its own, and hang."""
    child = subprocess.Popen(["sleep", "300"], start_new_session=True)
    Path(os.environ["MARK"]).write_text(str(child.pid))
    time.sleep(300)


_DEEDS: dict[str, Any] = {
    "fine": lambda: None,
    "text": lambda: "more",
    "one": lambda: 1,
    "raise": _raise,
    "exit": _exit,
    "die": lambda: os._exit(7),
    "signal": _signal,
    "hang": lambda: time.sleep(60),
    "nan": lambda: float("nan"),
    "surrogate": lambda: "\ud800",
    "print": lambda: print("noise" * 1000),
    "memory": lambda: bytearray(2**30) and None,
    "fork": _fork,
    "huge": lambda: "1" * 3_000_000,
}


class InWorkersOnly(Hostile):
    """Cannot be created in a worker process."""

    def __init__(self, parent: int) -> None:
        if os.getpid() != parent:
            raise RuntimeError("not here")


class NoReward:
    """Lacks a method, and has one with another name."""

    def prompts(self) -> list[str]:
        """Give one prompt."""
        return ["1+1="]

    def respond(self, prompt: str, turns: Sequence[str], metadata: Mapping[str, Any]) -> str | None:
        """End at once."""
        return None

    def rewards(self, prompt: str, turns: Sequence[str], metadata: Mapping[str, Any]) -> float:
        """Return 1."""
        return 1.0


class TooFew(NoReward):
    """Takes too few arguments."""

    def reward(self, prompt: str) -> float:
        """Return 1."""
        return 1.0


class Mixed(Echo):
    """An environment with prompts of several kinds."""

    def prompts(self) -> list[Any]:
        """Give a text, a conversation, and two that cannot be used."""
        talk = [("user", "a"), ("assistant", "b"), ("user", "c")]
        messages = [{"role": role, "content": content} for role, content in talk]
        return ["1+1=", {"problem": messages}, 17, {"question": "x"}]


class NoPrompts(Echo):
    """An environment without prompts of its own."""

    prompts = None  # type: ignore[assignment]


class EndlessPrompts(Echo):
    """An environment whose prompts never end."""

    def prompts(self) -> Iterator[str]:  # type: ignore[override]
        """Give prompts for ever."""
        while True:
            yield "1+1="


class LeavingPrompts(Echo):
    """An environment that ends the process instead of giving prompts."""

    def prompts(self) -> list[dict[str, Any]]:
        """Exit."""
        raise SystemExit(0)


class EmptyPrompts(Echo):
    """An environment with an empty list of prompts."""

    def prompts(self) -> list[dict[str, Any]]:
        """Give nothing."""
        return []
