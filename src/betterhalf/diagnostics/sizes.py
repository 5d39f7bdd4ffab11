"""Sizes that memory and traffic of a run depend on: those of the model, of a step and of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from betterhalf.types import DtypeName, EmulatedDtype

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Sizes of a decoder, read from its configuration without its weights."""

    parameters: int
    """Number of parameters, counting a tied head once."""
    active_parameters: int
    """Number of parameters used for one token: fewer than all in a mixture of experts."""
    layer_parameters: int
    """Parameters of the largest decoder layer, which FSDP2 gathers at once."""
    layers: int
    hidden: int
    intermediate: int
    """Width of the MLP; that of one expert in a mixture of experts."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied_head: bool
    qk_norm: bool = False
    """True if each head of queries and keys is normed before rope."""
    experts_per_token: int = 0
    """Number of experts that compute a token; 0 without experts."""

    adapters: int = 0
    """Parameters of the LoRA adapters; 0 if all weights are trained."""
    resent: int = 0
    """Number of parameters that each weight sync after the first sends; 0 for all."""

    @property
    def trained(self) -> int:
        """Parameters with masters, gradients and optimizer states."""
        return self.adapters or self.parameters

    @property
    def embedding(self) -> int:
        """Parameters of the embedding; the head has as many."""
        return self.vocabulary * self.hidden

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of all key heads."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """Sizes of one step."""

    pack_tokens: int
    """Tokens of the largest pack."""
    loss_tokens: int
    """Completion tokens of that pack."""
    train_passes: int
    """Passes of every rank in one optimizer step."""
    sequences: int
    """Completions of one step."""
    sequence_tokens: int
    """Tokens of the longest sequence, its prompt included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Machine on which a run is planned."""

    gpu: bool
    """True if trainer and engines compute on GPUs."""
    memory_bytes: int | None
    """Memory of one GPU, or of the host for a run on CPUs; None if it is unknown."""
    native_halves: frozenset[DtypeName] = frozenset()
    """Half formats for which its CPU has native matmul instructions (`precision.products.has_native_matmul`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryItem:
    """One line of the plan."""

    name: str
    """Content, such as `masters` or `KV cache`."""
    num_bytes: int
    formula: str
    """Arithmetic behind the number, for display."""
    lasts: bool = True
    """False if it is held only while a pass or a call runs."""


def item_size(dtype: DtypeName) -> int:
    """Return the bytes of one number; an emulated format is stored in 16 bits."""
    return 4 if dtype == "fp32" else 2


def storage_name(dtype: DtypeName) -> DtypeName:
    """Return the format in which torch stores a format's numbers: BF16 for an emulated one."""
    return "bf16" if dtype in get_args(EmulatedDtype) else dtype


def count(number: float) -> str:
    """Return a number of parameters or tokens in short form, such as `1.54B`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"
