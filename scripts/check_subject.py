#!/usr/bin/env python
"""Check the subject of a commit message: `area: summary`, imperative, at most 72 characters.

    .venv/bin/python scripts/check_subject.py .git/COMMIT_EDITMSG

The hook of .pre-commit-config.yaml calls it with the file that holds the message. It prints a line for each problem and
exits with status 1 if there is one. Merges, reverts, and commits that a rebase folds into others (`fixup!`, `squash!`,
`amend!`) pass. CONTRIBUTING.md states the rules.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_LENGTH = 72

_PASSES = re.compile(r"(Merge |Revert |fixup! |squash! |amend! )")
_SUBJECT = re.compile(r"(?P<areas>[\w./-]+(, [\w./-]+)*): (?P<summary>\S.*)")
_NOT_IMPERATIVE = re.compile(r"[a-z]{2,}(ed|ing)")
_VERBS = (
    *("bring", "cling", "ping", "ring", "string", "swing", "bed", "bleed", "breed", "embed", "exceed", "feed", "heed"),
    *("need", "proceed", "seed", "shed", "speed", "succeed"),
)
"""Imperatives that end as participles do."""


def problems(subject: str) -> Iterator[str]:
    """Yield what is wrong with a subject, one sentence each."""
    if _PASSES.match(subject):
        return
    if len(subject) > MAX_LENGTH:
        yield f"The subject has {len(subject)} characters; shorten it to {MAX_LENGTH}."
    match = _SUBJECT.fullmatch(subject)
    if match is None:
        yield "The subject is not `area: summary`; write it as in `rollout: keep one prefill for all siblings`."
        return
    summary = match["summary"]
    if summary.endswith("."):
        yield "The summary ends with a full stop; remove it."
    if summary[0].isupper():
        yield "The summary begins with a capital letter; begin with a verb in lower case."
    first = re.split(r"[^A-Za-z]", summary, maxsplit=1)[0]
    if _NOT_IMPERATIVE.fullmatch(first) and first not in _VERBS:
        yield f"The summary begins with {first!r}; use the imperative, such as `add` for `added` or `adding`."


def subject_of(message: str) -> str:
    """Return the first line that is neither empty nor one of git's comments."""
    lines = (line.strip() for line in message.splitlines())
    return next((line for line in lines if line and not line.startswith("#")), "")


def main() -> int:
    """Print every problem of the message in the file named on the command line; return 1 if there is one."""
    if len(sys.argv) != 2:
        print("usage: check_subject.py FILE", file=sys.stderr)
        return 2
    subject = subject_of(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = list(problems(subject))
    for problem in found:
        print(f"{subject!r}: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
