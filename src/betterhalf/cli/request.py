"""Input and output of a verb, and a row of the table of verbs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from betterhalf.errors import InputError

if TYPE_CHECKING:
    from betterhalf.config.schema import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A parsed command line."""

    words: tuple[str, ...]
    """Arguments that are not settings: experiments, models, run folders."""
    overrides: tuple[str, ...]
    """`key=value` settings, except `run_dir`."""
    run_dir: str | None
    """Folder to write to; None if not given."""
    options: dict[str, Any] = field(default_factory=dict)
    """Values of the verb's own options, such as `resume`, by name."""

    def config(self, experiment: str | Path | None) -> RunConfig:
        """Return the experiment's configuration with the overrides applied."""
        from betterhalf.config.load import load_config

        return load_config(experiment, self.overrides)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Result of a verb."""

    result: dict[str, Any]
    """The result as JSON, for machines."""
    show: Callable[[], None]
    """Function that prints the result for people."""
    passed: bool = True
    """False for a failed verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option `--name` of a verb."""

    name: str
    """Name without leading dashes; `from-dump` becomes `from_dump` in `Request.options`."""
    help: str
    """One line for `--help`."""
    value: str | None = None
    """Placeholder of its value in the usage; None for a switch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One row of the table of verbs."""

    run: Callable[[Request], Answer]
    """Function that does the work."""
    words: str
    """The words it takes, as in the usage."""
    num_words: tuple[int, int]
    """Smallest and largest number of words."""
    help: str
    """One line for `--help`."""
    settings: bool = True
    """True if it takes `key=value` settings of the configuration."""
    run_dir: bool = True
    """True if it takes `run_dir=PATH`."""
    computes: bool = True
    """True if it runs a model; threads are then chosen before torch is imported."""
    options: tuple[Option, ...] = ()
    """Options besides --json."""


def number(option: str, text: str) -> float:
    """Return the value of an option that takes a number.

    Raises:
        InputError: the text is not a number; the message names the option.
    """
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option} takes a number, but got {text!r}; write {option} 80") from None
