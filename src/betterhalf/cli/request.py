"""What goes into a verb and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from betterhalf.config.schema import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A command line, taken apart."""

    words: tuple[str, ...]
    """Experiments, models, run folders."""
    overrides: tuple[str, ...]
    """`key=value` settings, `run_dir` excepted."""
    run_dir: str | None
    """Where to write, if given."""
    options: dict[str, Any] = field(default_factory=dict)
    """Values of the verb's own options, such as `resume`, by name."""

    def config(self, experiment: str | Path | None) -> RunConfig:
        """The experiment's configuration with the overrides applied."""
        from betterhalf.config.load import load_config

        return load_config(experiment, self.overrides)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a verb has to say."""

    result: dict[str, Any]
    """For machines."""
    show: Callable[[], None]
    """Prints the same for people."""
    passed: bool = True
    """False for a failed verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One `--name` of a verb."""

    name: str
    """Without dashes; `from-dump` arrives as `from_dump`."""
    help: str
    value: str | None = None
    """What follows it, as its usage shows it; None for a switch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One row of the table."""

    run: Callable[[Request], Answer]
    words: str
    """The words it takes, as its usage shows them."""
    num_words: tuple[int, int]
    """Fewest and most of them."""
    help: str
    """One line."""
    settings: bool = True
    """Takes `key=value` of the configuration."""
    computes: bool = True
    """Runs a model, so that threads are chosen before torch is imported."""
    options: tuple[Option, ...] = ()
    """Its own, besides --json."""
