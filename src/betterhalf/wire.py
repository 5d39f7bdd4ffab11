"""The stream of weights from a trainer to an engine, with the digest of each weight as it was sent.

A trainer in this process yields its tensors. A trainer of several ranks puts them into the cluster's object store, and
only references pass through the process that runs the loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class WeightStream(Protocol):
    """All weights of one policy version in the wire dtype; each iteration starts at the first weight."""

    @property
    def policy_version(self) -> int:
        """Number of applied updates in these weights."""
        ...

    @property
    def num_bytes(self) -> int:
        """Size of all weights on the wire."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (unfused Hugging Face name, tensor in host memory or on the trainer's device), each name once."""
        ...

    def digests(self) -> dict[str, str]:
        """Return name -> digest of the weight in the rollout dtype, computed where the weight was rounded."""
        ...

    def changed(self) -> WeightStream | None:
        """Return the stream without the weights that are the same in every version, such as the base of LoRA adapters.

        The digests of the result are still those of all weights. None if any weight may change.
        """
        ...

    def whole(self) -> WeightStream:
        """Return the stream of all weights of this version, of which this one may be the result of `changed`."""
        ...
