"""Everything that a run needs of a rollout engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from betterhalf.config.schema import SamplingConfig
from betterhalf.errors import EngineError
from betterhalf.precision.contract import SideReport
from betterhalf.types import Completion, GenerateRequest


class RolloutEngine(Protocol):
    """Samples completions from policy mu. Sampling is seeded: the same requests and weights give the same tokens.

    An engine is awake when it is made. From `sleep` until `wake` it may be asked for nothing but `sleep`, `wake`,
    `restart` and `close`: the caller wakes it, and an engine need not wake by itself.
    """

    def generate(self, requests: Sequence[GenerateRequest], sampling: SamplingConfig) -> list[tuple[Completion, ...]]:
        """Sample `group_size` completions for each request, in request order and sibling order.

        Each completion carries the `policy_version` that was loaded last; the caller refuses any other
        (`require_version`).

        Raises:
            InputError: a prompt leaves no room for a single token in the model's context.
            EngineError: a behavior logprob is not finite.
            EngineDiedError: the engine's process ended; `restart`, load the weights, and ask again: the same requests
                give the same completions.
        """
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """log mu of each given token but the first, at temperature 1, as the engine's prefill computes it.

        Args:
            sequences: token ids, each of at least two.

        Returns:
            For each sequence one float less than it has tokens.

        Raises:
            InputError: a sequence is longer than the model's context.
            EngineError: a logprob is not finite.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, policy_version: int) -> None:
        """Replace all weights, in place. Names are the unfused Hugging Face names; tensors have the wire dtype.

        Raises:
            EngineError: a name is unknown, missing, or has the wrong shape.
        """
        ...

    def digests(self) -> dict[str, str]:
        """Unfused Hugging Face name -> digest of the weight as held, in the rollout dtype."""
        ...

    def report(self) -> SideReport:
        """What the engine really runs, found out by running it; `digests` included."""
        ...

    def sleep(self) -> None:
        """Free the device for the trainer, if both share it and the engine can.

        `generate`, `score`, `load_weights`, `digests` and `report` need `wake` first. The weights and their version
        survive. Calling it twice is harmless.
        """
        ...

    def wake(self) -> None:
        """Undo `sleep`; harmless when awake.

        Raises:
            EngineDiedError: the engine's process ended while it slept.
        """
        ...

    def restart(self) -> None:
        """After an `EngineDiedError`: a new engine in the old one's place, awake, without weights until `load_weights`.

        Raises:
            EngineError: it cannot be started, or the engine has no process of its own that could die.
        """
        ...

    def close(self) -> None:
        """Release memory and processes; calling it twice is harmless."""
        ...


def require_version(groups: Iterable[Iterable[Completion]], policy_version: int) -> None:
    """Refuse completions that other weights sampled than those they are about to be compared with.

    Raises:
        EngineError: a completion has another policy version; its staleness would be measured as mismatch.
    """
    versions = [completion.policy_version for group in groups for completion in group]
    stale = [version for version in versions if version != policy_version]
    if stale:
        raise EngineError(
            f"{len(stale)} of {len(versions)} completions were sampled by stale weights, of policy version {stale[0]}, "
            f"where the trainer holds version {policy_version}: the engine did not take the last weight sync; check "
            "that load_weights returns only when the new weights sample, then continue with --resume"
        )
