#!/usr/bin/env python
"""Check the prose of docstrings, comments, messages and Markdown, as far as a machine can.

    .venv/bin/python scripts/lint_prose.py [FILE or FOLDER ...]

Without arguments it reads the whole project. It prints `file:line: problem` for each finding and exits with status 1
if there is one. CONTRIBUTING.md states the rules; three of them are checked here:

* The summary line of a docstring is an imperative or a noun phrase: it does not open with What, How, Where, Whether,
  Why, Of or As, nor with a verb in the third person ("Samples completions.").
* Outdated words are not used.
* A line of Markdown has at most 120 characters, unless it is part of a table or of a code block, or holds a link that
  cannot be broken.

Code spans, web addresses, tables and code blocks are not prose.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEFAULT = (
    *("src", "tests", "benchmarks", "scripts", "experiments", "docs"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
)

NAMES_THE_WORDS = (Path(__file__).resolve(), ROOT.resolve() / "tests" / "unit" / "test_prose.py")
"""Files that hold the words that this script looks for: it, and its test."""

MAX_WIDTH = 120

FIRST_WORDS = ("What", "How", "Where", "Whether", "Why", "Of", "As")
"""Words that a summary line does not open with."""

FIRST_VERBS = (
    *("Builds", "Captures", "Checks", "Collects", "Declares", "Does", "Gives", "Holds", "Keeps", "Makes", "Matches"),
    *("Raises", "Receives", "Records", "Represents", "Returns", "Runs", "Samples", "Says", "Starts", "Tells"),
)
"""Verbs in the third person that a summary line does not open with. Those followed by `of` or `that` pass, because they
are nouns, as in "Records of a run"."""

OLD_WORDS = {
    "anew": "again",
    "so many": "the number of ...",
    "lest": "so that ... not",
    "cure": "fix",
    "cures": "fixes",
    "wing": "side, trainer or engine",
    "wings": "sides, trainer and engine",
}
"""Word or phrase -> what to write instead."""

_OLD = re.compile(r"\b(" + "|".join(OLD_WORDS).replace(" ", r"\s+") + r")\b", re.IGNORECASE)
_VERB = re.compile(r"(" + "|".join(FIRST_VERBS) + r")\b(?! (of|that)\b)")
_NOT_PROSE = re.compile(r"`[^`\n]+`|https?://[^\s)>\"']+")
_ITEM = re.compile(r"([*+-]|\d+\.) ")
_FENCE = re.compile(r"^\s*(```|~~~)")
_UNBREAKABLE = re.compile(r"\S{100,}|\]\(\S{60,}\)")

Finding = tuple[int, str]
"""(line, problem)."""


def python_findings(text: str) -> Iterator[Finding]:
    """Yield the problems of a Python file, in no order."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        yield error.lineno or 1, f"cannot be parsed ({error.msg})"
        return
    for line, summary in docstrings(tree):
        first = re.match(r"\w+", summary)
        if first and (first[0] in FIRST_WORDS or _VERB.match(summary)):
            yield line, f"the docstring opens with {first[0]!r}; use an imperative or a noun phrase"
    for line, prose in prose_of(text, tree):
        yield from old_words(line, prose)


def docstrings(tree: ast.Module) -> Iterator[Finding]:
    """Yield (line, first line) of every docstring: of modules, classes, functions, and of fields, below them."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for statement in body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                value = statement.value.value
                if isinstance(value, str):
                    yield statement.lineno, value.strip().split("\n", 1)[0]


def prose_of(text: str, tree: ast.Module) -> Iterator[Finding]:
    """Yield (line, text) of every comment and of every string that holds a space: docstrings and messages."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def old_words(line: int, text: str) -> Iterator[Finding]:
    """Yield the old words of a text that starts at `line`, outside code spans and web addresses."""
    for found in _OLD.finditer(_NOT_PROSE.sub(_blank, text)):
        word = found[0]
        at = line + text.count("\n", 0, found.start())
        yield at, f"{word!r}: write {OLD_WORDS[' '.join(word.lower().split())]!r}"


def _blank(match: re.Match[str]) -> str:
    return " " * len(match[0])


def markdown_findings(text: str) -> Iterator[Finding]:
    """Yield the problems of a Markdown file."""
    fenced = listed = False
    for number, line in enumerate(text.splitlines(), 1):
        if _FENCE.match(line):
            fenced = not fenced
        indented = line.startswith("    ")
        if line.strip() and not line.startswith(" "):
            listed = bool(_ITEM.match(line))
        if fenced or (indented and not listed) or line.lstrip().startswith("|"):
            continue
        yield from old_words(number, line)
        if len(line) > MAX_WIDTH and not _UNBREAKABLE.search(line):
            yield number, f"{len(line)} characters; wrap prose at {MAX_WIDTH}"


def files_in(paths: list[Path]) -> Iterator[Path]:
    """Yield the Python and Markdown files at or below `paths`."""
    for path in paths:
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (file for file in found if file.suffix in (".py", ".md"))


def findings_of(file: Path) -> list[Finding]:
    """Return the problems of one file, by line."""
    text = file.read_text(encoding="utf-8")
    return sorted(python_findings(text) if file.suffix == ".py" else markdown_findings(text))


def main() -> int:
    """Print every finding; return 1 if there is one."""
    parser = argparse.ArgumentParser(description="Check the prose of docstrings, comments, messages and Markdown.")
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders; the whole project without any")
    paths = parser.parse_args().paths or [ROOT / name for name in DEFAULT]
    count = 0
    for file in files_in(paths):
        if file.resolve() in NAMES_THE_WORDS:
            continue
        for line, problem in findings_of(file):
            shown = file.resolve()
            print(f"{shown.relative_to(ROOT) if shown.is_relative_to(ROOT) else shown}:{line}: {problem}")
            count += 1
    if count:
        print(f"{count} findings")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
