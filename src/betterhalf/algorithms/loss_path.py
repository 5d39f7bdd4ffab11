"""Import a loss of the user's own by its path, without torch unless the user's file imports it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from betterhalf.user_code import load_object, require_call, source_digest

KEY = "algorithm.loss"

EXAMPLE = "def loss(inputs: LossInputs, denominators: Denominators, algorithm: Algorithm) -> Tensor"
"""Signature of a loss, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnLoss:
    """A loss of the user's own."""

    path: str
    """Import path, as configured."""
    digest: str
    """Digest of the file that holds the function."""
    function: Callable[..., Any]
    """The function."""


def load_own_loss(path: str) -> OwnLoss:
    """Import the function at `path`.

    Raises:
        ConfigError: it does not exist, cannot be imported, or takes other arguments.
    """
    function = load_object(path, KEY)
    require_call(function, EXAMPLE, ("inputs", "denominators", "algorithm"), f"{KEY}={path}")
    return OwnLoss(path=path, digest=source_digest(path), function=function)
