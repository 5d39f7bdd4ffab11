"""Parse a command line into a verb, words, `key=value` settings and options."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import NoReturn

from betterhalf import __version__
from betterhalf.cli.request import Option, Request, Verb
from betterhalf.cli.verbs import VERBS
from betterhalf.errors import InputError

_SETTING = re.compile(r"[\w.-]+=", re.ASCII)
"""Start of a setting, which distinguishes `training.steps=3` from a path."""


class _Parser(argparse.ArgumentParser):
    """Parser that raises an error instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. See `{self.prog} --help`.")


def pick_verb(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the verb and the arguments after it; `--help`, `--version` or no argument exit the process.

    Raises:
        InputError: the first argument is not a verb; the message names the nearest.
    """
    first = arguments[0] if arguments else "--help"
    if first in VERBS:
        return first, arguments[1:]
    parser = _Parser(
        prog="betterhalf",
        usage="betterhalf VERB [ARGUMENT ...] [key=value ...] [--json]",
        description="Reinforcement-learning fine-tuning of language models in one proven precision.",
        epilog=_verb_list(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"betterhalf {__version__}")
    if first.startswith("-"):
        parser.parse_known_args([first])
        raise InputError(f"unknown option {first!r}. Start with a verb: {', '.join(VERBS)}.")
    fix = did_you_mean(first, VERBS) or f"The verbs are {', '.join(VERBS)}."
    raise InputError(f"unknown verb {first!r}. {fix}")


_WORDS = """\
EXPERIMENT  a TOML file, such as experiments/sanity/demo.toml (README.md there lists all), or the folder of a run
MODEL       a Hugging Face name, a folder, a GGUF file, or one of the built-in names demo and smollm2
RUN         the folder of a run
key=value   changes one setting, such as training.steps=40; `betterhalf config` lists all settings"""
"""Explanation of the words in the list of verbs."""


def _verb_list() -> str:
    rows = [(f"{name} {verb.words}", verb.help) for name, verb in VERBS.items()]
    width = max(len(left) for left, _ in rows)
    listed = "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)
    return f"verbs:\n{listed}\n\n{_WORDS}"


def parse(name: str, verb: Verb, rest: list[str]) -> argparse.Namespace:
    """Parse the arguments after the verb.

    Raises:
        InputError: the verb has no such option; the message names the nearest it has.
    """
    settings = " [key=value ...]" if verb.settings else ""
    folder = " [run_dir=PATH]" if verb.run_dir else ""
    options = "".join(f" [{_written(option)}]" for option in verb.options)
    parser = _Parser(
        prog=f"betterhalf {name}",
        usage=f"betterhalf {name} {verb.words}{settings}{folder}{options} [--json]",
        description=verb.help,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar=verb.words, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    for option in verb.options:
        if option.value is None:
            parser.add_argument(f"--{option.name}", action="store_true", help=option.help)
        else:
            parser.add_argument(f"--{option.name}", metavar=option.value, help=option.help)
    found, unknown = parser.parse_known_intermixed_args(rest)
    if unknown:
        raise InputError(f"unknown option {unknown[0]!r}. {_fix(parser.prog, verb, unknown[0])}")
    return found


def _written(option: Option) -> str:
    return f"--{option.name} {option.value}" if option.value else f"--{option.name}"


def _fix(prog: str, verb: Verb, wrong: str) -> str:
    setting = wrong.lstrip("-")
    if "=" in setting:
        return f"Write a setting without dashes: {setting}."
    known = ["--json", "--help", *(f"--{option.name}" for option in verb.options)]
    return did_you_mean(wrong, known) or f"See `{prog} --help`."


def to_request(name: str, verb: Verb, found: argparse.Namespace) -> Request:
    """Separate words from settings, and collect the verb's options by name.

    Raises:
        InputError: too few or too many words, or settings for a verb that takes none.
    """
    from betterhalf.config.overrides import split_overrides

    words = tuple(word for word in found.words if not _SETTING.match(word))
    run_dir, overrides = split_overrides([word for word in found.words if _SETTING.match(word)])
    fewest, most = verb.num_words
    if not fewest <= len(words) <= most:
        given = " ".join(words) or "nothing"
        fix = "Write a setting as key=value" if len(words) > most and verb.settings else "See"
        more = f"; see `betterhalf {name} --help`." if fix != "See" else f" `betterhalf {name} --help`."
        raise InputError(f"{name} takes {verb.words}, but got {given}. {fix}{more}")
    if overrides and not verb.settings:
        raise InputError(f"{name} takes no settings, but got {overrides[0]}. Leave it out.")
    if run_dir and not verb.run_dir:
        raise InputError(f"{name} writes no run folder, but got run_dir={run_dir}. Leave it out.")
    names = [option.name.replace("-", "_") for option in verb.options]
    options = {name: getattr(found, name) for name in names}
    return Request(words=words, overrides=tuple(overrides), run_dir=run_dir, options=options)


def did_you_mean(wrong: str, allowed: Iterable[str]) -> str | None:
    """Return a hint at the nearest allowed word; None if none is near."""
    close = difflib.get_close_matches(wrong, list(allowed), n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else None
