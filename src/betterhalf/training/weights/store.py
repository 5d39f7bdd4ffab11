"""The Protocol of a weight store, which hides from the trainer whether weights are replicated, sharded or adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from torch import Tensor, nn

from betterhalf.errors import CheckpointError
from betterhalf.precision.islands import Islands
from betterhalf.types import DtypeName

NamedTensors = Iterator[tuple[str, Tensor]]
"""(unfused Hugging Face name, tensor), in the module's order."""


class WeightStore(Protocol):
    """FP32 masters of one module, their FP32 gradients, and the module's parameters in the compute dtype."""

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
        """Yield (name, master rounded once to `wire_dtype`), one tensor at a time."""
        ...

    def computing(self) -> NamedTensors:
        """Yield (name, computing parameter, in the compute dtype)."""
        ...

    def exchange(self, held: Mapping[str, Tensor]) -> None:
        """Swap the values of the computing parameters with those of `held`, bit for bit; the masters stay.

        Doing it twice restores both. Between the two calls the module computes with other weights than the masters.

        Args:
            held: copies of what `computing` yields, by name.
        """
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
"""(module with FP32 parameters on their final device, compute dtype, FP32 islands) -> its store."""


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
