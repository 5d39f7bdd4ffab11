"""The digest of a grader's code depends on what it computes, and on nothing else."""

from __future__ import annotations

import pytest

from betterhalf.tasks.fingerprint import code_text

GRADER = '''"""Grade an answer."""

LIMIT = 3
"""Most digits."""


def solves(text: str) -> bool:
    """Return whether it is right."""
    # Ten is the answer.
    if len(text) <= LIMIT:
        return text == "10"
    return False
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Grade an answer."""', '"""Compare an answer with the gold answer."""'),
        ('"""Most digits."""\n', ""),
        ('    """Return whether it is right."""\n', ""),
        ("    # Ten is the answer.\n", "    # Both are compared as text.\n\n"),
        ("len(text) <= LIMIT", "len( text )  <=  LIMIT"),
    ],
)
def test_prose_and_layout_change_nothing(old: str, new: str) -> None:
    assert old in GRADER
    assert code_text(GRADER.replace(old, new)) == code_text(GRADER)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ('"10"', '"11"'),
        ("<=", "<"),
        ("    return False\n", "        return False\n"),
    ],
)
def test_code_changes_it(old: str, new: str) -> None:
    assert old in GRADER
    assert code_text(GRADER.replace(old, new)) != code_text(GRADER)
