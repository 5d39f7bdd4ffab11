"""First prompts of the episodes: a data set, or what the environment's method `prompts` gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from betterhalf.config.schema import EnvironmentTask
from betterhalf.errors import ConfigError
from betterhalf.tasks.data_problems import DataProblems, build_problems, load_filter, read_row
from betterhalf.tasks.data_source import RawRow
from betterhalf.tasks.row import RowError
from betterhalf.tasks.task import Tokenizer
from betterhalf.tasks.templates import question_template

_MAX_PROMPTS = 1_000_000
"""Maximum number of prompts of an environment without `task.max_rows`; a generator that gives more may never end."""


def environment_problems(config: EnvironmentTask, tokenizer: Tokenizer, environment: Any) -> DataProblems:
    """Return the prompts of `task.path`; without it, those of the environment.

    Raises:
        InputError: the data cannot be read or is empty, or the tokenizer lacks the chat template that it needs.
        ConfigError: the method `prompts` raises an error, or gives nothing that can be listed.
        MissingExtraError: the data set is on the hub and `datasets` is not installed.
    """
    if config.path:
        return build_problems(config, tokenizer)
    name = config.environment.rpartition(":")[2]
    template, keep = question_template(config, tokenizer), load_filter(config.filter)
    named = config.model_copy(update={"path": f"prompts of {name}"})
    raw = _given(_listed(environment, name, config.max_rows), config.question_field)
    rows = [keep(read_row(named, index, row)) for index, row in enumerate(raw)]
    return DataProblems(rows=rows, template=template, tokenizer=tokenizer)


def _listed(environment: Any, name: str, limit: int | None) -> list[Any]:
    try:
        found = environment.prompts()
        given = [] if isinstance(found, str | Mapping) else list(islice(found, limit or _MAX_PROMPTS + 1))
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(f"the method prompts of {name} fails with {type(error).__name__}: {error}") from error
    if not given:
        raise ConfigError(f"the method prompts of {name} gives no prompts. Return a list of texts or of mappings.")
    if limit is None and len(given) > _MAX_PROMPTS:
        raise ConfigError(
            f"the method prompts of {name} gives more than {_MAX_PROMPTS:,} prompts, and may never end. End it, or set "
            "task.max_rows."
        )
    return given


def _given(prompts: list[Any], question_field: str) -> Iterator[RawRow]:
    """Yield a row for each prompt; a text alone is the question."""
    for number, prompt in enumerate(prompts, start=1):
        if isinstance(prompt, str):
            yield RawRow(number=number, fields={question_field: prompt})
        elif isinstance(prompt, Mapping):
            yield RawRow(number=number, fields=dict(prompt))
        else:
            fix = f"return a text, or a mapping with the field `{question_field}`"
            yield RawRow(number=number, error=RowError(f"it is a {type(prompt).__name__}", fix))
