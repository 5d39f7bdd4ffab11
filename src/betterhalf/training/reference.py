"""The reference policy: a copy of the computing weights, which is swapped with the trainer's to score tokens.

One module computes both policies, so that kernels, packs and rounding are the same, and equal weights give equal
logprobs, bit for bit. The copy is in the compute dtype; it has no FP32 masters and no optimizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from betterhalf.errors import CheckpointError
from betterhalf.precision.contract import weights_digests
from betterhalf.training.weights.store import WeightStore, require_parameters


class ReferencePolicy:
    """Weights of the reference policy: those of the policy when this is built, or at the last `refresh`."""

    def __init__(self, weights: WeightStore) -> None:
        """Copy the computing weights of `weights`."""
        self._weights = weights
        self._held = weights.held()
        self._refreshed = False
        self._digest: str | None = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Return a context in which the module computes with the weights of the reference."""
        self._weights.exchange(self._held)
        try:
            yield
        finally:
            self._weights.exchange(self._held)

    def refresh(self) -> None:
        """Make the current policy the reference."""
        self._held = {}  # frees the copy before another is made
        self._held = self._weights.held()
        self._refreshed, self._digest = True, None

    def state(self) -> dict[str, Tensor]:
        """Return the weights by name for a checkpoint; empty for the starting policy, which the model's files hold."""
        return self._held if self._refreshed else {}

    def digest(self) -> str:
        """Return a checksum of the weights, 16 hexadecimal digits; collective with several ranks."""
        if self._digest is None:
            text = "\n".join(
                f"{name} {digest}" for name, digest in weights_digests(self._weights.whole(self._held)).items()
            )
            self._digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._digest

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], digest: str, source: str) -> None:
        """Continue from `state` and `digest` of another reference policy.

        Raises:
            CheckpointError: the weights are of another model, or they are the starting policy of a run whose model's
                files have changed since.
        """
        if tensors:
            require_parameters(self._held.items(), tensors, source)
            for name, held in self._held.items():
                held.copy_(tensors[name])
            self._refreshed, self._digest = True, None
        if digest != self.digest():
            raise CheckpointError(
                f"the reference policy of {source} is not the model that this run loads: its files have changed since "
                "the run started. Restore them, or start again in another run_dir"
            )
