"""Weights of one policy version for the engines of a cluster; the process that runs the loop never holds them.

The object store holds them in parts, which rank 0 writes and engines read; only references pass through the process
that runs the loop. The store frees a version when the last reference to it is gone. Weights that `cluster.delivery`
sends directly are stored only when an engine has to load them by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from betterhalf.errors import TrainerDiedError
from betterhalf.precision.contract import tensor_digest
from betterhalf.precision.emulation import to_format
from betterhalf.types import DtypeName

PART_BYTES = 2**28
"""Size in bytes at which a part is complete and gets stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """Some weights in the object store, about `PART_BYTES` in size; written by rank 0."""

    reference: Any
    """Ray's reference to the list of (name, dtype, shape, bytes). Ray does not resolve a reference inside a record."""
    names: tuple[str, ...]
    num_bytes: int
    digests: dict[str, str]
    """Name -> digest in the rollout dtype."""
    unchanging: bool = False
    """True if these weights are the same in every version."""


def store_parts(
    weights: Iterable[tuple[str, Tensor]],
    rollout_dtype: DtypeName,
    part_bytes: int = PART_BYTES,
    unchanging: Collection[str] = (),
) -> tuple[StoredPart, ...]:
    """Put weights into the object store as they come, and compute the digest of each.

    Args:
        weights: (name, tensor in the wire dtype), on any device.
        rollout_dtype: format in which engines hold the weights, and of which digests are computed.
        part_bytes: size in bytes at which a part is complete.
        unchanging: names of weights that are the same in every version; they get parts of their own.
    """
    parts: list[StoredPart] = []
    for _ in storing(weights, rollout_dtype, parts, part_bytes, unchanging):
        pass
    return tuple(parts)


def storing(
    weights: Iterable[tuple[str, Tensor]],
    rollout_dtype: DtypeName,
    parts: list[StoredPart],
    part_bytes: int = PART_BYTES,
    unchanging: Collection[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights unchanged; each part, once it is complete, is stored and appended to `parts`."""
    filling = {kept: _Filling(unchanging=kept) for kept in (True, False)}
    for name, tensor in weights:
        part = filling[name in unchanging]
        part.digests[name] = tensor_digest(to_format(tensor, rollout_dtype))
        part.packed.append(_pack(name, tensor))
        yield name, tensor
        if part.num_bytes >= part_bytes:
            parts.append(part.stored())
            filling[part.unchanging] = _Filling(unchanging=part.unchanging)
    parts += [part.stored() for part in filling.values() if part.packed]


_Packed = tuple[str, torch.dtype, tuple[int, ...], Any]
"""Name, dtype, shape, and the bytes as a numpy array, which the store shares without a copy."""


def _pack(name: str, tensor: Tensor) -> _Packed:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return name, tensor.dtype, tuple(tensor.shape), raw.numpy()


@dataclass(slots=True, kw_only=True)
class _Filling:
    """A part that is not complete yet."""

    unchanging: bool
    packed: list[_Packed] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(one[3].nbytes for one in self.packed)

    def stored(self) -> StoredPart:
        import ray

        return StoredPart(
            reference=ray.put(self.packed),
            names=tuple(self.digests),
            num_bytes=self.num_bytes,
            digests=self.digests,
            unchanging=self.unchanging,
        )


def read_parts(parts: Sequence[StoredPart]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor in host memory) of every part, reading one part at a time.

    Raises:
        TrainerDiedError: the parts are lost, because rank 0 has ended.
    """
    import ray
    from ray.exceptions import RayError

    for part in parts:
        try:
            packed: list[_Packed] = ray.get(part.reference)
        except RayError as error:
            raise TrainerDiedError(f"the stored weights were lost with rank 0 ({type(error).__name__})") from error
        for name, dtype, shape, raw in packed:
            # A copy, because the store's memory is read-only.
            yield name, torch.from_numpy(raw.copy()).view(dtype).reshape(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """Result of sending all weights without the object store; from rank 0."""

    policy_version: int
    """Number of applied updates in them."""
    digests: dict[str, str]
    """Name -> digest in the rollout dtype."""
    parts: tuple[StoredPart, ...] = ()
    """The same weights in the object store; empty if they were not stored."""
    failure: str | None = None
    """Reason why not all weights were sent; None if they were."""


class ClusterWeights(Protocol):
    """Weights of one version that an engine of a cluster can load; also a `wire.WeightStream`."""

    policy_version: int
    model_config: Any
    """transformers configuration that matches the weights, from which engines are built."""

    @property
    def parts(self) -> tuple[StoredPart, ...]:
        """The weights of this stream in the object store."""
        ...


class StoredWeights:
    """One version in the object store; implements `wire.WeightStream`."""

    def __init__(self, parts: Sequence[StoredPart], policy_version: int, model_config: Any) -> None:
        """Keep the references, so that the store keeps the objects.

        Args:
            parts: all weights.
            policy_version: number of applied updates in them.
            model_config: transformers configuration that matches the weights, from which engines are built.
        """
        self.parts = tuple(parts)
        self.policy_version = policy_version
        self.model_config = model_config
        self._whole = self

    @property
    def num_bytes(self) -> int:
        """Size of the weights of this stream on the wire."""
        return sum(part.num_bytes for part in self.parts)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Read the weights, one part at a time."""
        return read_parts(self.parts)

    def digests(self) -> dict[str, str]:
        """Return the digests of all weights, which rank 0 computed."""
        return {name: digest for part in self._whole.parts for name, digest in part.digests.items()}

    def changed(self) -> StoredWeights | None:
        """Return the stream without the parts that are the same in every version; None if there are none."""
        parts = [part for part in self._whole.parts if not part.unchanging]
        if len(parts) == len(self._whole.parts):
            return None
        changed = StoredWeights(parts, self.policy_version, self.model_config)
        changed._whole = self._whole
        return changed

    def whole(self) -> StoredWeights:
        """See `WeightStream.whole`."""
        return self._whole


class SentWeights:
    """One version that rank 0 sends to the engines; implements `wire.WeightStream`.

    The weights are stored when `parts` or the values are first read, which works until the trainer's next update.
    """

    def __init__(
        self, policy_version: int, model_config: Any, num_bytes: int, store: Callable[[], tuple[StoredPart, ...]]
    ) -> None:
        """Store nothing yet.

        Args:
            policy_version: number of applied updates in the weights.
            model_config: transformers configuration that matches the weights.
            num_bytes: size of all weights on the wire.
            store: makes rank 0 store the weights, and returns the parts.
        """
        self.policy_version = policy_version
        self.model_config = model_config
        self.num_bytes = num_bytes
        """See `WeightStream.num_bytes`."""
        self._store = store
        self._parts: tuple[StoredPart, ...] = ()
        self._sent: Sent | None = None

    def note(self, sent: Sent) -> None:
        """Record the digests and parts that rank 0 returned."""
        assert sent.policy_version == self.policy_version, "the trainer was updated during a weight sync"
        self._sent, self._parts = sent, sent.parts

    @property
    def parts(self) -> tuple[StoredPart, ...]:
        """All weights in the object store, where the first access puts them.

        Raises:
            TrainerDiedError: the trainer no longer holds this version.
        """
        self._parts = self._parts or self._store()
        return self._parts

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Read the weights from the object store, one part at a time."""
        return read_parts(self.parts)

    def digests(self) -> dict[str, str]:
        """Return the digests that rank 0 computed."""
        if self._sent is not None:
            return dict(self._sent.digests)
        return {name: digest for part in self.parts for name, digest in part.digests.items()}

    def changed(self) -> None:
        """Return None: rank 0 sends all weights in every sync."""

    def whole(self) -> SentWeights:
        """Return this stream."""
        return self
