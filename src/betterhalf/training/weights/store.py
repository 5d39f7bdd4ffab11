"""The Protocol of a weight store, which hides from the trainer whether weights are replicated, sharded or adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from betterhalf.distributed.shard_range import ShardRange
from betterhalf.errors import CheckpointError
from betterhalf.precision.islands import Islands
from betterhalf.types import DtypeName

NamedTensors = Iterator[tuple[str, Tensor]]
"""(name in the transformers module, tensor), in the module's order."""


class WeightStore(Protocol):
    """FP32 masters of one module, their FP32 gradients, and the module's parameters in the compute dtype.

    A parameter without `requires_grad` is frozen: it computes, in the compute dtype, and has no master or gradient.

    In a trainer of several ranks, each has a store. Masters and gradients are then the rows of this rank, and every
    member that yields tensors is collective: all ranks read it to its end, or its first tensor alone.
    """

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, FP32 master): the parameters of the optimizer."""
        ...

    def gradients(self) -> NamedTensors:
        """Yield (name, FP32 gradient summed over the micro-batches since `zero_grad`) of each master."""
        ...

    def zero_grad(self) -> None:
        """Discard every gradient."""
        ...

    def second_use(self, parameter: nn.Parameter) -> Tensor:
        """Return a leaf on the storage of `parameter` whose gradient is collected separately.

        It is for a parameter that is used twice, such as an embedding tied to the head: autograd would add its two
        half gradients in half.
        """
        ...

    def publish(self) -> None:
        """Copy the masters to the parameters that compute, rounded once to the compute dtype."""
        ...

    def on_the_wire(self, wire_dtype: DtypeName) -> NamedTensors:
        """Yield (unfused Hugging Face name, master rounded once to `wire_dtype`), one parameter at a time.

        The names are those of the model's files, which hold experts one by one; see `models.expert_names`. Of a frozen
        parameter, the values that compute are rounded.
        """
        ...

    def local(self, name: str) -> Tensor:
        """Return this process's rows of a parameter: the FP32 master, or a frozen parameter in the compute dtype."""
        ...

    def from_rows(self, name: str, rows: Tensor) -> Tensor:
        """Return the whole tensor that consists of every process's rows of a parameter, in their dtype."""
        ...

    def add_over_ranks(self, counts: Tensor) -> Tensor:
        """Return the sum of every process's counts, int64."""
        ...

    def computing(self) -> NamedTensors:
        """Yield (name, computing parameter, in the compute dtype) of every parameter."""
        ...

    def computing_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a parameter's tensor while the module computes: FP32 for an FP32 island."""
        ...

    def held(self) -> dict[str, Tensor]:
        """Return copies, in the compute dtype, of this process's part of the trained parameters, for `exchange`."""
        ...

    def whole(self, held: Mapping[str, Tensor]) -> NamedTensors:
        """Yield (name, whole tensor) for each tensor of a result of `held`, one at a time."""
        ...

    def exchange(self, held: Mapping[str, Tensor]) -> None:
        """Swap the values of the trained computing parameters with those of `held`, bit for bit; the masters stay.

        Doing it twice restores both. Between the two calls the module computes with other weights than the masters.

        Args:
            held: a result of `held`.
        """
        ...

    def ranges(self) -> dict[str, ShardRange]:
        """Return name -> rows in `state`, `held` and the optimizer's states; empty if tensors are whole."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the FP32 masters by name, for a checkpoint; they share memory with the store."""
        ...

    def load(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Replace the masters by `state()` of another store, and publish them.

        Args:
            tensors: FP32 masters by name.
            source: name of their origin, for messages.

        Raises:
            CheckpointError: a name is missing or unknown, or a shape differs.
        """
        ...


StoreFactory = Callable[[nn.Module, DtypeName, Islands], WeightStore]
"""(module with FP32 parameters on their final device, or on the meta device for a sharded store; compute dtype; FP32
islands) -> its store."""


def require_parameters(expected: Iterable[tuple[str, Tensor]], found: Mapping[str, Tensor], source: str) -> None:
    """Check that `found` holds exactly the parameters of a model, in their shapes.

    Args:
        expected: (name, parameter) of the model.
        found: tensors by name.
        source: name of their origin, for the message.

    Raises:
        CheckpointError: a parameter is missing, unknown or of another shape; the message names the first.
    """
    wanted = dict(expected)
    shared = wanted.keys() & found.keys()
    reshaped = {name for name in shared if wanted[name].shape != found[name].shape}
    for problem, names in (
        ("lacks", wanted.keys() - found.keys()),
        ("holds an unknown", found.keys() - wanted.keys()),
        ("holds another shape of", reshaped),
    ):
        if names:
            raise CheckpointError(
                f"{source} {problem} parameter {min(names)!r}: it was made by another model; name the model it was "
                "made with"
            )
