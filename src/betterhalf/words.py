"""Wording of messages: a number with its noun."""

from __future__ import annotations


def counted(number: float, noun: str) -> str:
    """Return a number with its noun, which is singular for 1: `1 GPU`, `2 GPUs`, `0.5 GPUs`."""
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"
