"""Numbers with their nouns."""

from __future__ import annotations

import pytest

from betterhalf.words import counted


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 GPUs"), (0.5, "0.5 GPUs"), (1, "1 GPU"), (1.0, "1 GPU"), (2, "2 GPUs")],
)
def test_a_noun_is_singular_for_one_alone(number: float, text: str) -> None:
    assert counted(number, "GPU") == text
