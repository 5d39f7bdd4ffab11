"""Episodes of several turns with a user-defined environment; docs/environments.md describes its methods."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Protocol

from betterhalf.config.schema import EnvironmentTask
from betterhalf.errors import ConfigError, RewardError
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.environment_data import environment_problems
from betterhalf.tasks.fingerprint import reward_source
from betterhalf.tasks.observation import Frame, ObservationEncoder, chat_frame
from betterhalf.tasks.task import Tokenizer
from betterhalf.tasks.templates import template_source
from betterhalf.tasks.turns import Conversation, Failure
from betterhalf.tasks.worker_limits import memory_bytes
from betterhalf.tasks.worker_pool import WorkerPool, WorkerStartError
from betterhalf.types import FinishReason, Prompt
from betterhalf.user_code import load_object, require_call, source_digest


class Environment(Protocol):
    """Interface of a user-defined class, named by `task.environment` and created with `task.settings` as keywords.

    One object is created in each worker process, and one in the process of the run, which gives the prompts. Episodes
    share them, in any order, so an answer must depend on the arguments alone.
    """

    def respond(self, prompt: str, turns: Sequence[str], metadata: Mapping[str, Any]) -> str | None:
        """Return the observation after the last turn; None if the episode is over.

        Args:
            prompt: text that the model read.
            turns: texts of the model's turns so far, at least one.
            metadata: fields of the prompt's row, and `prompt_id`, `answer`.
        """
        ...

    def reward(self, prompt: str, turns: Sequence[str], metadata: Mapping[str, Any]) -> float:
        """Return the reward of the whole episode; `metadata` also has `finish_reason` and `episode_end`."""
        ...


_ARGUMENTS = ("prompt", "turns", "metadata")
_EXAMPLES = {
    "respond": "def respond(self, prompt, turns, metadata): return 'try again'",
    "reward": "def reward(self, prompt, turns, metadata): return 1.0",
}
_RESULTS = {"respond": (str, NoneType), "reward": (float,)}
"""Types of a result."""
_FEW = 8
"""Minimum number of episodes for which a failure in all of them ends the run."""


def build_environment(config: EnvironmentTask, tokenizer: Tokenizer) -> DatasetTask:
    """Build the task; the worker processes start when the rows are checked.

    Raises:
        ConfigError: the class does not exist, cannot be created, or lacks a method.
        InputError: the data cannot be read or is empty, or the tokenizer lacks the chat template that the task needs.
    """
    environment = _created(config)
    problems = environment_problems(config, tokenizer, environment)
    frame = chat_frame(tokenizer, config.template_arguments) if config.template == "chat" else Frame()
    turns = EnvironmentTurns(
        config=config,
        encoder=ObservationEncoder(tokenizer=tokenizer, frame=frame, max_tokens=config.max_observation_tokens),
        pool=WorkerPool(
            "environment_worker",
            {"path": config.environment, "settings": dict(config.settings)},
            workers=config.workers,
            seconds=config.time_limit,
            memory_bytes=memory_bytes(config.memory_gib),
        ),
    )
    return DatasetTask(
        problems=problems,
        grader=turns,
        reward_source=_reward_source(config, tokenizer),
        turns=turns,
    )


def _created(config: EnvironmentTask) -> Any:
    """Create the environment in this process, and check its methods."""
    key = f"task.environment={config.environment}"
    kind = load_object(config.environment, "task.environment")
    if not callable(kind):
        raise ConfigError(f"{key} is {type(kind).__name__}, which cannot be called. Name a class.")
    try:
        environment = kind(**config.settings)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(
            f"{key}: creating it with task.settings={dict(config.settings)} fails with {type(error).__name__}: {error}"
        ) from error
    for name, example in _EXAMPLES.items():
        method = getattr(environment, name, None)
        if method is None:
            near = difflib.get_close_matches(name, [each for each in dir(environment) if each[0] != "_"], n=1)
            hint = f" Its method {near[0]} looks similar." if near else ""
            raise ConfigError(f"{key} has no method {name}.{hint} Expected: {example}")
        require_call(method, example, _ARGUMENTS, f"{key}.{name}")
    if not config.path and not callable(getattr(environment, "prompts", None)):
        raise ConfigError(
            f"{key} has no method prompts, and task.path is absent. Set task.path to a JSONL file, or add the method: "
            "def prompts(self): return ['text', ...]"
        )
    return environment


def _reward_source(config: EnvironmentTask, tokenizer: Tokenizer) -> dict[str, str]:
    """Return what determines prompts and rewards: template, and a digest of the file that holds the class.

    Modules that this file imports are not covered.
    """
    settings = {
        "task": "environment",
        f"environment {config.environment}": source_digest(config.environment),
        **template_source(config, tokenizer),
    }
    return reward_source(settings, modules=_MODULES, packages=())


_MODULES = ("environment", "environment_worker", "observation")


@dataclass(slots=True, kw_only=True)
class EnvironmentTurns:
    """The environment in its worker processes; implements `Turns`, and `Grader` for completions of a single turn.

    An answer or a reward that fails (it takes too long, ends its worker, raises, or returns another type) ends its
    episode with `task.failure_reward`, and is counted. Each method's first failure is shown.
    """

    config: EnvironmentTask
    encoder: ObservationEncoder
    """Encoder of observations."""
    pool: WorkerPool
    """Worker processes."""
    timeouts: int = 0
    """Number of calls so far that ran out of time."""
    failures: int = 0
    """Number of answers and rewards so far that failed."""
    notes: list[str] = field(default_factory=list)
    """Warnings that have not been shown yet."""
    warned: set[str] = field(default_factory=set)
    """Methods whose first failure is in a note; `printed` if the first output is."""

    @property
    def max_turns(self) -> int:
        """Maximum number of turns of an episode."""
        return self.config.max_turns

    @property
    def unparsed_answers(self) -> int:
        """Always 0: the environment parses answers itself."""
        return 0

    def respond(self, conversations: Sequence[Conversation]) -> list[str | Failure | None]:
        """Return the next observation of each episode; see `Turns.respond`."""
        found: list[str | Failure | None] = self._results("respond", conversations)
        self._note_failures("respond", found)
        return found

    def encode(self, observation: str, stop_token: int) -> tuple[int, ...]:
        """Return the tokens of an observation; see `Turns.encode`."""
        return self.encoder.encode(observation, stop_token)

    def rewards_of(self, conversations: Sequence[Conversation]) -> list[float]:
        """Return one reward for each episode; see `Turns.rewards_of`."""
        graded = [each for each in conversations if each.end != "failed"]
        found = self._results("reward", graded)
        self._note_failures("reward", found)
        values = iter([self.config.failure_reward if isinstance(each, Failure) else each for each in found])
        return [self.config.failure_reward if each.end == "failed" else next(values) for each in conversations]

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """Return the rewards of completions as episodes of a single turn."""
        rows = zip(prompts, texts, finish_reasons, strict=True)
        return self.rewards_of([Conversation(prompt=p, turns=(text,), finish_reason=why) for p, text, why in rows])

    def check_golds(self, answers: Sequence[str], *, will_grade: bool = True) -> list[str | None]:
        """Return None for every answer, since only the environment knows; with `will_grade`, start a worker first.

        Raises:
            RewardError: no worker can create the environment.
        """
        if will_grade:
            try:
                self.pool.start()
            except WorkerStartError as error:
                raise self._refusal(error) from error
        return [None] * len(answers)

    def take_notes(self) -> list[str]:
        """Return warnings for the user since the last call."""
        notes, self.notes = self.notes, []
        return notes

    def close(self) -> None:
        """Stop the worker processes."""
        self.pool.close()

    def _results(self, method: str, conversations: Sequence[Conversation]) -> list[Any]:
        """Return the result of a method for each episode, or its `Failure`."""
        try:
            replies = self.pool.run([_call(method, each) for each in conversations])
        except WorkerStartError as error:
            raise self._refusal(error) from error
        self.timeouts += sum(reply.get("error") == "timeout" for reply in replies)
        self._note_printed()
        return [self._read(method, reply) for reply in replies]

    def _read(self, method: str, reply: Mapping[str, Any]) -> Any:
        """Return the result in a worker's reply, or why there is none."""
        if reply.get("error") == "timeout":
            return Failure(message=f"no result within {self.config.time_limit:g} s (task.time_limit)")
        found = reply.get("result", ())
        if isinstance(found, _RESULTS[method]):
            return found
        return Failure(message=str(reply.get("message", "its code wrote to the worker's connection")))

    def _refusal(self, error: WorkerStartError) -> RewardError:
        return RewardError(
            f"task.environment={self.config.environment} cannot be created in a worker process: {error.message}"
        )

    def _note_printed(self) -> None:
        """Keep a note of the first output."""
        text, size = self.pool.take_printed()
        if text.strip() and "printed" not in self.warned:
            self.warned.add("printed")
            self.notes.append(
                f"task.environment={self.config.environment} printed {size} bytes, which are shown this once, up to "
                f"{len(text)} characters:\n{text.rstrip()}"
            )

    def _note_failures(self, method: str, results: Sequence[Any]) -> None:
        """Keep a note of a method's first failure; refuse an environment that fails in every one of many episodes."""
        failures = [each for each in results if isinstance(each, Failure)]
        self.failures += len(failures)
        if not failures:
            return
        failed = (
            f"{method} of task.environment={self.config.environment} failed in {len(failures)} of {len(results)} "
            f"episodes: {failures[0].message}"
        )
        if len(failures) == len(results) >= _FEW:
            raise RewardError(f"{failed}. Fix it, then continue with --resume.")
        if method not in self.warned:
            self.warned.add(method)
            self.notes.append(
                f"warning: {failed}. They get the reward {self.config.failure_reward:g} (task.failure_reward); further "
                "failures are counted without another warning."
            )


def _call(method: str, conversation: Conversation) -> dict[str, Any]:
    """Return the request of a call; our fields are added where the row has no field of that name."""
    prompt = conversation.prompt
    ours = {"prompt_id": prompt.prompt_id, "answer": prompt.answer, "finish_reason": conversation.finish_reason}
    metadata = {**ours, "episode_end": conversation.end, **prompt.metadata}
    return {"method": method, "prompt": prompt.text, "turns": conversation.turns, "metadata": metadata}
