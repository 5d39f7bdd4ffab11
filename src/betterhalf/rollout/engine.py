"""What the loop needs of a rollout engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from betterhalf.config.schema import SamplingConfig
from betterhalf.precision.contract import SideReport
from betterhalf.types import Completion, GenerateRequest


class RolloutEngine(Protocol):
    """Samples completions from policy mu. Sampling is seeded: the same requests and weights give the same tokens."""

    def generate(self, requests: Sequence[GenerateRequest], sampling: SamplingConfig) -> list[tuple[Completion, ...]]:
        """Sample `group_size` completions for each request, in request order and sibling order.

        Raises:
            InputError: a prompt leaves no room for a single token in the model's context.
            EngineError: a behavior logprob is not finite.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, policy_version: int) -> None:
        """Replace all weights, in place. Names are the unfused Hugging Face names; tensors have the wire dtype.

        Raises:
            EngineError: a name is unknown, missing, or has the wrong shape.
        """
        ...

    def report(self) -> SideReport:
        """What the engine really runs, digests of the weights as held included."""
        ...

    def close(self) -> None:
        """Release memory and processes; calling it twice is harmless."""
        ...
