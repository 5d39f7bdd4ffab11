"""A user-defined class as a task: the methods it needs, and the adapter that makes a `Task` of it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from betterhalf.config.schema import PythonTask
from betterhalf.errors import ConfigError, RewardError
from betterhalf.tasks.data_fields import answer_of, plain_fields, question_of
from betterhalf.tasks.prompting import Draft, templated_draft
from betterhalf.tasks.row import BadRow, Row, RowError
from betterhalf.tasks.task import Tokenizer
from betterhalf.tasks.templates import QuestionTemplate
from betterhalf.types import FinishReason, Prompt
from betterhalf.user_code import load_object, require_call


class UserTask(Protocol):
    """Interface of a user-defined class, named by `task.task` and created with (settings, tokenizer).

    `settings` is the mapping `task.settings`. The class runs in the process that trains; its rewards need no method
    here if `task.reward` or `task.rewards` name functions, which run in worker processes with a time limit.
    """

    def __len__(self) -> int:
        """Return the number of prompts; at least 1."""
        ...

    def prompt(self, index: int) -> str | Mapping[str, Any] | Prompt:
        """Return the prompt at `index`, counted from 0; the same one at every call, in every run.

        A text is put into `task.template`. A mapping has the text under `problem`; its `answer` and all other fields
        reach the reward as metadata. A `Prompt` is used as it is, with its token ids.
        """
        ...

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> Sequence[float]:
        """Return one finite number for each completion."""
        ...


_METHODS: dict[str, tuple[tuple[str, ...], str]] = {
    "__len__": ((), "def __len__(self): return 100"),
    "prompt": (("index",), "def prompt(self, index): return 'text'"),
    "rewards": (
        ("prompts", "texts", "finish_reasons"),
        "def rewards(self, prompts, texts, finish_reasons): return [1.0, ...]",
    ),
}
"""Positional arguments of each method of `UserTask`, and an example."""


def create_user_task(config: PythonTask, tokenizer: Tokenizer) -> UserTask:
    """Import the class of `task.task`, create it, and check its methods.

    Raises:
        ConfigError: it does not exist, cannot be created, or lacks a method; or rewards are named twice or not at all.
    """
    assert config.task is not None
    key = f"task.task={config.task}"
    kind = load_object(config.task, "task.task")
    require_call(kind, "class Mine: def __init__(self, settings, tokenizer): ...", ("settings", "tokenizer"), key)
    try:
        task: UserTask = kind(dict(config.settings), tokenizer)
        for name in ("__len__", "prompt", *(() if config.terms else ("rewards",))):
            _require_method(task, name, key)
        size = len(task)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(
            f"{key}: creating it with settings {dict(config.settings)} fails with {type(error).__name__}: {error}"
        ) from error
    if size < 1:
        raise ConfigError(f"{key} has {size} prompts. Return at least 1 from __len__.")
    if config.terms and hasattr(task, "rewards"):
        raise ConfigError(f"{key} has the method rewards, and the configuration names rewards too. Remove one of them.")
    return task


def _require_method(task: object, name: str, key: str) -> None:
    arguments, example = _METHODS[name]
    method = getattr(task, name, None)
    if method is None:
        near = difflib.get_close_matches(name, [each for each in dir(task) if each not in dir(object)], n=1)
        hint = f" Its method {near[0]} looks similar." if near else ""
        also = " Or name functions in task.reward." if name == "rewards" else ""
        raise ConfigError(f"{key} has no method {name}.{hint} Expected: {example}.{also}")
    require_call(method, example, arguments, f"{key}.{name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class UserProblems:
    """Prompts of the user's class, as problems."""

    task: UserTask
    template: QuestionTemplate
    """Template around a prompt that is a text or a mapping."""
    tokenizer: Tokenizer
    name: str
    """Name of the class, as in the prompts' ids."""
    found: dict[int, tuple[Row, Prompt | None]] = field(default_factory=dict)
    """Prompts that the class gave so far."""

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.task)

    def row(self, index: int) -> Row:
        """Return the prompt at `index`; a row with a defect if the class raises an error or returns another type."""
        return self._found(index)[0]

    def draft(self, index: int) -> Draft:
        """Return the prompt at `index` as text for the model."""
        row, prompt = self._found(index)
        if prompt is None:
            return self.template.draft(self.tokenizer, row)
        draft = templated_draft(row.prompt_id, row.question, answer=row.answer)
        return replace(draft, token_ids=prompt.token_ids)

    def _found(self, index: int) -> tuple[Row, Prompt | None]:
        if index not in self.found:
            self.found[index] = self._asked(index)
        return self.found[index]

    def _asked(self, index: int) -> tuple[Row, Prompt | None]:
        prompt_id = f"{self.name}/{index}"
        place = f"prompt {prompt_id!r}"
        try:
            given = self.task.prompt(index)
            if isinstance(given, Prompt):
                return _row_of_prompt(given), given
            fields = {"problem": given} if isinstance(given, str) else given
            return _row_of_fields(fields, prompt_id, place), None
        except RowError as error:
            defect = BadRow(
                place=place, reason=error.reason, fix="return a text, a mapping with `problem`, or a Prompt"
            )
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            reason = f"prompt({index}) raises {type(error).__name__}: {error}"
            defect = BadRow(place=place, reason=reason, fix="correct the method")
        return Row(prompt_id=prompt_id, place=place, question="", answer="", defect=defect), None


def _row_of_fields(fields: Any, prompt_id: str, place: str) -> Row:
    """Return the row of a mapping with `problem` and any further fields.

    Raises:
        RowError: it is not a mapping, `problem` holds no text or messages, or `answer` is neither text nor a number.
    """
    if not isinstance(fields, Mapping):
        raise RowError(f"it is of the type {type(fields).__name__}", "return a mapping with `problem`")
    question, messages = question_of(fields, "problem")
    metadata = plain_fields(fields)
    return Row(
        prompt_id=prompt_id,
        place=place,
        question=question,
        answer=answer_of(fields, "answer") if "answer" in fields else "",
        metadata=metadata,
        messages=messages,
        context=json.dumps({"fields": metadata}, sort_keys=True),
    )


def _row_of_prompt(prompt: Prompt) -> Row:
    return Row(
        prompt_id=prompt.prompt_id,
        place=f"prompt {prompt.prompt_id!r}",
        question=prompt.text,
        answer=prompt.answer,
        metadata=prompt.metadata,
        context=json.dumps({"fields": plain_fields(prompt.metadata)}, sort_keys=True),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class UserGrader:
    """Grader that calls the method `rewards` of the user's class, in this process and without a time limit."""

    task: UserTask
    timeouts: int = 0
    """Always 0: there is no time limit."""
    unparsed_answers: int = 0
    """Always 0: the class parses answers itself."""

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """Return the rewards of the class, as it gives them; `check_rewards` checks them.

        Raises:
            RewardError: the method raises an error.
        """
        try:
            return list(self.task.rewards(prompts, texts, finish_reasons))
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise RewardError(
                f"{type(self.task).__name__}.rewards raises {type(error).__name__}: {error}. Fix it, or give the "
                "rewards by a function in task.reward, whose failures are counted."
            ) from error

    def check_golds(self, answers: Sequence[str], *, will_grade: bool = True) -> list[str | None]:
        """Return None for every answer: only the class knows what it can match."""
        return [None] * len(answers)

    def close(self) -> None:
        """Call the method `close` of the class, if it has one."""
        close = getattr(self.task, "close", None)
        if callable(close):
            close()
