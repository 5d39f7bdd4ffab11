"""Settings of a launch command in a shell script: `--flag value`, `--flag=value` and `key=value`.

The script is read, not run: assignments of text and of arrays are expanded where the command uses them, and every
other command is left out. What cannot be expanded stays as it is written.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from betterhalf.errors import InputError
from betterhalf.integrations.audit.records import matches

_ASSIGNMENT = re.compile(r"(?:export\s+|local\s+|declare\s+(?:-a\s+)?)?([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_DEFAULT = re.compile(r':\s+"?\$\{([A-Za-z_]\w*):=(.*)\}"?\s*', re.DOTALL)
_ARRAY = re.compile(r"\$\{([A-Za-z_]\w*)\[[@*]\]\}")
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)(?::?[-=]([^{}]*))?\}|([A-Za-z_]\w*))")
_SETTING = re.compile(r"(\+{0,2}|~)([A-Za-z_][\w./@-]*)=(.*)", re.DOTALL)
_MAX_LINES = 500
"""Maximum number of lines of a quote or an array; without it, an apostrophe in a long script would take minutes."""
_SEPARATORS = frozenset({";", "&", "&&", "|", "||", "(", ")", "{", "}"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command of a script."""

    words: tuple[str, ...]
    """Its words, expanded."""

    def settings(self) -> dict[str, str]:
        """Return its flags, without dashes, and its `key=value` settings; a later one wins."""
        found: dict[str, str] = {}
        for place, word in enumerate(self.words):
            setting = _SETTING.fullmatch(word)
            if word.startswith("--") and len(word) > 2:
                name, given, value = word[2:].partition("=")
                found[name] = value if given else _argument(self.words[place + 1 : place + 2])
            elif setting and place:
                sign, key, value = setting.groups()
                found.pop(key, None)
                if sign != "~":
                    found[key] = value
        return found


def commands(text: str) -> list[Command]:
    """Return the commands of a script in order.

    Raises:
        InputError: a quote or an array is never closed.
    """
    variables: dict[str, list[str]] = {}
    found = []
    for statement in _statements(text):
        default = _DEFAULT.fullmatch(statement)
        assignment = _ASSIGNMENT.fullmatch(statement)
        if default:
            variables.setdefault(default[1], _words(default[2], variables))
        elif assignment and _is_assignment(assignment[3]):
            name, more, value = assignment.groups()
            values = _words(value.strip()[1:-1] if value.startswith("(") else value, variables)
            variables[name] = [*variables.get(name, []), *values] if more else values
        else:
            found += [Command(words=tuple(words)) for words in _split(_words(statement, variables)) if words]
    return found


def launch_command(found: Sequence[Command], patterns: tuple[str, ...], path: str) -> Command:
    """Return the command that starts training: the one with a word that matches a pattern, or all words together.

    Raises:
        InputError: several commands start training.
    """
    starting = [command for command in found if any(matches(patterns, word) for word in command.words)]
    if len(starting) > 1:
        raise InputError(
            f"{path} starts training {len(starting)} times, and audit reads one configuration. Copy the command that "
            "you mean to a file of its own."
        )
    if starting:
        return starting[0]
    return Command(words=("", *(word for command in found for word in command.words)))


def _argument(following: Sequence[str]) -> str:
    """Return the value of a flag: the next word, or `true` for a switch."""
    return following[0] if following and not following[0].startswith("--") else "true"


def _is_assignment(value: str) -> bool:
    """Return whether the right side is one word or an array, so that no command follows."""
    if value.startswith("("):
        return True
    try:
        return len(shlex.split(value, comments=True)) <= 1 or value.startswith("$(")
    except ValueError:
        return False


def _statements(text: str) -> Iterator[str]:
    """Yield the logical lines: continued lines joined, multi-line quotes and arrays whole, comments left out."""
    pending, lines = "", 0
    for line in text.replace("\\\n", " ").splitlines():
        if not pending and line.lstrip().startswith("#"):
            continue
        pending = f"{pending}\n{line}" if pending else line
        lines += 1
        if lines > _MAX_LINES:
            break
        if _is_open(pending):
            continue
        if pending.strip():
            yield pending.strip()
        pending, lines = "", 0
    if pending.strip():
        raise InputError(
            f"the script has a quote or an array that never closes, or not within {_MAX_LINES} lines: it begins with "
            f"{pending.strip().splitlines()[0][:60]!r}. Close it, or give audit the launch command alone."
        )


def _is_open(text: str) -> bool:
    """Return whether a quote is not closed, or the array of an assignment."""
    quote, depth = "", 0
    for place, character in enumerate(text):
        if text[place - 1 : place] == "\\" and quote != "'":
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and text[place - 1 : place].isspace():
            return _is_open(text[:place] + text[place:].partition("\n")[2]) if "\n" in text[place:] else depth > 0
        else:
            depth += {"(": 1, ")": -1}.get(character, 0)
    assigned = _ASSIGNMENT.fullmatch(text.strip())
    return bool(quote) or (assigned is not None and assigned[3].startswith("(") and depth > 0)


def _words(text: str, variables: dict[str, list[str]]) -> list[str]:
    """Return the words of a text, with variables and arrays expanded."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    found: list[str] = []
    try:
        for word in lexer:
            array = _ARRAY.fullmatch(word)
            found += variables[array[1]] if array and array[1] in variables else [_expanded(word, variables)]
    except ValueError as error:
        raise InputError(f"{text[:60]!r} cannot be read as shell ({error}). Give audit the command alone.") from error
    return found


def _expanded(word: str, variables: dict[str, list[str]]) -> str:
    """Replace the variables and arrays inside a word; those that the script does not set stay."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        if name in variables:
            return " ".join(variables[name])
        return match[2] if match[2] is not None else match[0]

    return _VARIABLE.sub(value, _ARRAY.sub(lambda match: " ".join(variables.get(match[1], [match[0]])), word))


def _split(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield the commands of a line; a word that only opens or closes a block separates, too."""
    command: list[str] = []
    for word in words:
        if word in _SEPARATORS:
            yield command
            command = []
        else:
            command.append(word)
    yield command
