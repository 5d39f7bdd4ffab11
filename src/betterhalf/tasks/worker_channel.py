"""Messages between a run and its worker processes, and the ways in which a reward can fail.

A message is 8 bytes of length and that many bytes of JSON. The worker's results are JSON too, never pickles, so that
nothing of the user's objects reaches the process that trains.
"""

from __future__ import annotations

import json
from typing import Any

from betterhalf.types import RewardFailure

MAX_MESSAGE_BYTES = 64 * 2**20
"""Largest reply of a worker."""
MAX_REWARD = 1e30
"""Largest size of a reward; sums of squares of such numbers are still finite."""
MAX_COMPONENTS = 64
"""Largest number of named components of one reward."""
MAX_NAME_LENGTH = 64
"""Maximum length of a component's name."""
MAX_TEXT = 2_000
"""Maximum length of an error's text, in characters."""
PRINTED_BYTES = 4096
"""Number of bytes that are kept of what a worker prints; the rest is counted and dropped."""

MARK = "BETTERHALF_WORKER"
"""Environment variable by which a worker's descendants are found, even those that left its process group."""

COUNTERS: dict[RewardFailure, str] = {
    "timeout": "task/timeouts",
    "crash": "task/crashes",
    "exception": "task/exceptions",
    "not_finite": "task/not_finite",
    "wrong_type": "task/wrong_type",
    "wrong_length": "task/wrong_length",
    "too_large": "task/too_large",
}
"""Metric that counts the completions of each kind of failure."""

_HEADER = 8


def pack(message: Any) -> bytes:
    """Return a message as bytes; values that JSON does not have, such as dates in a data set, become text."""
    data = json.dumps(message, default=str).encode()
    return len(data).to_bytes(_HEADER, "big") + data


def missing_bytes(received: bytes | bytearray) -> int:
    """Return how many bytes of a message are still to come; 0 if it is complete."""
    if len(received) < _HEADER:
        return _HEADER - len(received)
    return _HEADER + int.from_bytes(received[:_HEADER], "big") - len(received)


def unpack(received: bytes | bytearray) -> Any:
    """Return the message in complete bytes.

    Raises:
        ValueError: it is not JSON.
    """
    return json.loads(received[_HEADER:])
