"""Problems of the generators in the package reasoning-gym."""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np

from betterhalf.config.schema import ReasoningGymTask
from betterhalf.errors import ConfigError, InputError, MissingExtraError
from betterhalf.tasks.data_fields import plain_fields
from betterhalf.tasks.data_problems import DataProblems, load_filter
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.fingerprint import reward_source
from betterhalf.tasks.held_out import held_out_count
from betterhalf.tasks.reasoning_gym_grader import ReasoningGymGrader
from betterhalf.tasks.reasoning_gym_worker import Entry, create_generator
from betterhalf.tasks.row import Row
from betterhalf.tasks.task import Tokenizer
from betterhalf.tasks.templates import question_template, template_source
from betterhalf.types import AnswerExtraction

INSTRUCTIONS: dict[AnswerExtraction, str] = {
    "tags": "Put your final answer between <answer> and </answer>.",
    "last_word": "End with your final answer.",
    "last_number": "End with your final answer.",
    "last_line": "Write your final answer alone on the last line.",
    "all": "Answer with the final answer alone.",
}
"""Instructions by the part of a completion that is scored."""

HELD_OUT_SEED = 2**31
"""Offset between the seeds of the problems to train on and of those held out; no problem has a larger index."""

_OWN_KEYS = {"seed": "task.seed", "size": "task.num_prompts"}
"""Settings that every generator has, and the keys that set them."""

HASH_DEPENDENT = frozenset(
    {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}
)
"""Generators that iterate over sets of text, so that their problems depend on PYTHONHASHSEED."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A generated problem."""

    row: Row
    entry: Entry
    """The problem as the generator returned it; its scorer needs it."""


def build_reasoning_gym(config: ReasoningGymTask, tokenizer: Tokenizer) -> DatasetTask:
    """Build the task of a generator; its worker processes start when the rows are checked.

    Raises:
        MissingExtraError: reasoning-gym is not installed.
        ConfigError: there is no such generator, or its settings are wrong; the message names the nearest.
        InputError: the generator fails, or the tokenizer lacks the chat template that the task needs.
    """
    instruction = INSTRUCTIONS[config.extract]
    template = question_template(config, tokenizer, instruction)
    keep = load_filter(config.filter)
    problems = _choose(config)
    return DatasetTask(
        problems=DataProblems(rows=[keep(problem.row) for problem in problems], template=template, tokenizer=tokenizer),
        grader=ReasoningGymGrader(
            config.generator,
            config.settings,
            {problem.row.prompt_id: problem.entry for problem in problems},
            extract=config.extract,
            seconds=config.reward_seconds,
            workers=config.reward_workers,
        ),
        reward_source=reward_source(
            {
                "task": f"reasoning_gym {config.generator}",
                "settings": json.dumps(config.settings, sort_keys=True),
                "extract": config.extract,
                **template_source(config, tokenizer, instruction),
            },
            modules=("reasoning_gym_grader", "reasoning_gym_worker"),
            packages=("reasoning-gym", "sympy"),
        ),
    )


def _choose(config: ReasoningGymTask) -> list[Problem]:
    """Return the problems of `config.part`. Those held out have seeds of their own, and training skips their questions.

    Raises:
        InputError: every question is held out.
    """
    held_out: list[Problem] = []
    if config.held_out:
        count = held_out_count(config.held_out, config.num_prompts)
        held_out = _problems(config, count, seed=config.seed + HELD_OUT_SEED, name="held_out/")
        if config.part == "held_out":
            return held_out
    questions = {problem.row.question for problem in held_out}
    everything = _problems(config, config.num_prompts, seed=config.seed, name="")
    training = [problem for problem in everything if problem.row.question not in questions]
    if not training:
        raise InputError(
            f"all {config.num_prompts} problems of {config.generator} are among the {len(held_out)} held out: it has "
            "too few different ones. Lower task.held_out, or widen task.settings"
        )
    return [*training, *held_out] if config.part == "all" else training


def _problems(config: ReasoningGymTask, count: int, *, seed: int, name: str) -> list[Problem]:
    generator = _create(config, count, seed)
    prefix = f"{config.generator}/{name}"
    problems = []
    for index in range(count):
        try:
            # Some generators print, and standard output belongs to the command.
            with _global_randomness(seed + index), redirect_stdout(io.StringIO()):
                entry = generator[index]
            problems.append(Problem(row=_row(f"{prefix}{index}", entry), entry=entry))
        except Exception as error:  # a generator may raise anything
            raise InputError(
                f"the generator {config.generator} fails at problem {prefix}{index} with {type(error).__name__}: "
                f"{error}; change task.settings"
            ) from error
    return problems


@contextmanager
def _global_randomness(seed: int) -> Iterator[None]:
    """Seed the global random generators in the block, because some problem generators draw from them, too."""
    python, numbers = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def _row(prompt_id: str, entry: Entry) -> Row:
    metadata = plain_fields(entry["metadata"])
    answer = entry.get("answer")
    return Row(
        prompt_id=prompt_id,
        place=f"problem {prompt_id}",
        question=str(entry["question"]),
        answer="" if answer is None else str(answer),
        metadata=metadata,
        context=json.dumps(metadata, sort_keys=True),
    )


def _create(config: ReasoningGymTask, size: int, seed: int) -> Any:
    """Return the generator.

    Raises:
        MissingExtraError: reasoning-gym is not installed.
        ConfigError: there is no such generator, or its settings are wrong.
    """
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise MissingExtraError(
            "task.type=reasoning_gym needs the package reasoning-gym; `pip install betterhalf[reasoning-gym]`"
        ) from error
    if config.generator not in DATASETS:
        raise ConfigError(
            f"task.generator={config.generator} is not a generator of reasoning-gym. "
            f"{_nearest(config.generator, DATASETS, 'There are')}"
        )
    _require_hash_seed(config)
    _require_settings(config.generator, config.settings, DATASETS[config.generator][1])
    try:
        return create_generator(config.generator, config.settings, seed=seed, size=size)
    except Exception as error:  # generators check their settings by assertions, and may raise anything
        raise ConfigError(
            f"the generator {config.generator} refuses task.settings={json.dumps(config.settings)}: "
            f"{str(error) or type(error).__name__}. Correct the settings."
        ) from error


def _require_hash_seed(config: ReasoningGymTask) -> None:
    """Refuse generators whose problems another process could not reproduce."""
    mixed = config.settings.get("datasets", ()) if config.generator == "composite" else ()
    names = {config.generator, *(str(spec.get("name")) for spec in mixed if isinstance(spec, Mapping))}
    found = sorted(names & HASH_DEPENDENT)
    if found and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise ConfigError(
            f"the problems of {found[0]} depend on Python's hash seed, so that no other process could find them again. "
            "Set PYTHONHASHSEED=0 in the environment."
        )


def _require_settings(generator: str, settings: Mapping[str, Any], config_class: Any) -> None:
    """Refuse settings that the generator does not have, and those that have a key of their own."""
    known = [field.name for field in dataclasses.fields(config_class) if field.name not in _OWN_KEYS]
    for name in settings:
        if name in _OWN_KEYS:
            raise ConfigError(f"task.settings.{name} is set by {_OWN_KEYS[name]}. Set that key.")
        if name not in known:
            raise ConfigError(
                f"task.settings.{name} is not a setting of {generator}. {_nearest(name, known, 'It has')}"
            )


def _nearest(name: str, known: Iterable[str], introduction: str) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]}?" if near else f"{introduction} {', '.join(known)}."
