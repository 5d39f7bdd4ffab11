"""The precision contract: trainer and engine report the formats that they really use, and the reports are compared.

Equality is required of the compute dtype, the dtype of the weights on the wire, the dtype of cached keys and values,
the FP32 islands, and the weights themselves, by digest. Everything else is only shown: it explains the mismatch that
remains.
"""

from __future__ import annotations

import copy
import hashlib
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from betterhalf.errors import ContractError, WeightSyncError
from betterhalf.precision.emulation import to_format
from betterhalf.precision.islands import NONE
from betterhalf.types import DtypeName


@dataclass(frozen=True, slots=True, kw_only=True)
class SideReport:
    """Report of one side, trainer or engine, read from its live tensors rather than from its configuration."""

    side: Literal["trainer", "engine"]
    dtypes: dict[str, DtypeName]
    """Region -> format. Regions of the trainer: weights, compute, wire, lm_head, rope, norm, master, gradients,
    optimizer. Regions of the engine: weights, compute, wire, kv, lm_head, rope, norm."""
    facts: dict[str, str]
    """Name -> value: attention backend, format of sums in matrix products, rounding points, library versions, device.
    `fp32_modules` names the FP32 islands; without that key there are none."""
    digests: dict[str, str]
    """Unfused Hugging Face parameter name -> digest of the tensor that the side holds."""


RowStatus = Literal["equal", "differs", "reported"]
"""`equal` or `differs` for a required region, `reported` for any other."""

ABSENT = "-"
"""Placeholder for a region that a side does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractRow:
    """One region with the reports of both sides."""

    region: str
    trainer: str
    engine: str
    status: RowStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """Result of comparing one trainer with one engine."""

    rows: tuple[ContractRow, ...]
    """Required regions first."""
    first_difference: str | None
    """Description of the first required region that differs; None if all are equal."""
    allow_difference: bool
    """True if the user asked for an ablation: a difference is then shown, not refused."""

    @property
    def ok(self) -> bool:
        """True if the run may start."""
        return self.first_difference is None or self.allow_difference

    def table(self) -> str:
        """Return the contract as aligned plain text, at most 100 columns wide."""
        lines = [_line("region", "trainer", "engine", "status"), _line("-" * 14, "-" * 32, "-" * 32, "-" * 16)]
        for row in self.rows:
            lines += _wrapped(row, self._shown_status(row))
        if self.first_difference is not None:
            lines += textwrap.wrap(f"first difference: {self.first_difference}", 100)
        return "\n".join(lines)

    def _shown_status(self, row: ContractRow) -> str:
        if row.status == "differs" and self.allow_difference:
            return "differs, allowed"
        if row.status == "reported" and ABSENT not in (row.trainer, row.engine):
            return "reported, same" if row.trainer == row.engine else "reported, other"
        return row.status

    def to_json(self) -> dict[str, Any]:
        """Return the content of `contract.json`."""
        return {
            "ok": self.ok,
            "allow_difference": self.allow_difference,
            "first_difference": self.first_difference,
            "rows": [
                {"region": row.region, "trainer": row.trainer, "engine": row.engine, "status": row.status}
                for row in self.rows
            ],
        }


def compare(trainer: SideReport, engine: SideReport, *, allow_difference: bool) -> Contract:
    """Compare the reports of trainer and engine; every required dtype must equal the trainer's compute dtype.

    That includes the wire dtype: weights sent in another format are rounded once more, or once less, than those the
    trainer computes with, even if both sides agree on the format.
    """
    required = [
        _dtype_row("compute", trainer.dtypes["compute"], engine.dtypes["compute"], trainer.dtypes["compute"]),
        _dtype_row("wire", trainer.dtypes["wire"], engine.dtypes["wire"], trainer.dtypes["compute"]),
        _dtype_row("kv", trainer.dtypes["compute"], engine.dtypes["kv"], trainer.dtypes["compute"]),
        _weights_row(trainer.digests, engine.digests),
        *_island_rows(trainer, engine),
    ]
    different = next((row for row in required if row.status == "differs"), None)
    words = None if different is None else _in_words(different, trainer, engine)
    rows = (*required, *_reported_rows(trainer, engine))
    return Contract(rows=rows, first_difference=words, allow_difference=allow_difference)


def enforce(contract: Contract) -> None:
    """Refuse a run whose trainer and engine differ in precision, unless the difference is allowed.

    Raises:
        ContractError: the contract is not `ok`; the message holds the table.
    """
    if not contract.ok:
        raise ContractError(
            f"trainer and rollout engine differ in precision:\n{contract.table()}\n"
            "Set the same precision on both sides, as `precision=fp16` does, or precision.allow_difference=true "
            "if this ablation is intended."
        )


def verify_sync(expected: dict[str, str], held: dict[str, str]) -> None:
    """Check by digest that after a sync the engine holds the weights that were sent.

    Raises:
        WeightSyncError: a parameter differs, is missing, or was never sent; the message names the first.
    """
    wrong = _differing(expected, held)
    if wrong:
        name = wrong[0]
        raise WeightSyncError(
            f"after the weight sync {len(wrong)} of {len(expected)} parameters differ in the engine, the first is "
            f"{name} (sent {expected.get(name, 'nothing')}, held {held.get(name, 'nothing')}); "
            "check that the engine loads every parameter and casts none, then resume from the last checkpoint"
        )


def _dtype_row(region: str, trainer: DtypeName, engine: DtypeName, wanted: DtypeName) -> ContractRow:
    equal = trainer == engine == wanted
    shown = trainer if trainer == wanted else f"{trainer} (computes in {wanted})"
    return ContractRow(region=region, trainer=shown, engine=engine, status="equal" if equal else "differs")


def _weights_row(trainer: dict[str, str], engine: dict[str, str]) -> ContractRow:
    wrong = _differing(trainer, engine)
    held = f"{len(wrong)} differ, first {wrong[0]}" if wrong else _summary(engine)
    return ContractRow(region="weights", trainer=_summary(trainer), engine=held, status="differs" if wrong else "equal")


_ISLANDS = "fp32_modules"
"""Key in `SideReport.facts` of the FP32 islands."""


def _island_rows(trainer: SideReport, engine: SideReport) -> list[ContractRow]:
    """Return one required row if either side has FP32 islands, else none."""
    mine, theirs = (side.facts.get(_ISLANDS, NONE) for side in (trainer, engine))
    if mine == theirs == NONE:
        return []
    return [ContractRow(region="islands", trainer=mine, engine=theirs, status="equal" if mine == theirs else "differs")]


def _differing(expected: dict[str, str], held: dict[str, str]) -> list[str]:
    """Return the names whose digests differ: expected names in their order, then names that were not expected."""
    wrong = [name for name, digest in expected.items() if held.get(name) != digest]
    return wrong + [name for name in held if name not in expected]


def folded_digest(digests: dict[str, str]) -> str:
    """Return one digest of all weights: 12 hexadecimal digits over the sorted names and their digests."""
    folded = hashlib.sha256("".join(f"{name}={digests[name]};" for name in sorted(digests)).encode())
    return folded.hexdigest()[:12]


def _summary(digests: dict[str, str]) -> str:
    return f"{len(digests)} tensors {folded_digest(digests)}"


def _in_words(row: ContractRow, trainer: SideReport, engine: SideReport) -> str:
    if row.region != "weights":
        verb = "are" if row.region == "islands" else "is"
        return f"{row.region} {verb} {row.trainer} in the trainer and {row.engine} in the engine"
    name = _differing(trainer.digests, engine.digests)[0]
    held = engine.digests.get(name, "nothing")
    return f"weight {name} is {trainer.digests.get(name, 'nothing')} in the trainer and {held} in the engine"


def _reported_rows(trainer: SideReport, engine: SideReport) -> list[ContractRow]:
    """Return a row for each region that is not required: first those that both sides report, then those of one side.

    Within each group dtypes come before facts.
    """
    mine, theirs = _reported(trainer), _reported(engine)
    shared = [region for region in mine if region in theirs]
    alone = [region for region in (*mine, *theirs) if region not in shared]
    return [
        ContractRow(
            region=region, trainer=mine.get(region, ABSENT), engine=theirs.get(region, ABSENT), status="reported"
        )
        for region in (*shared, *alone)
    ]


def _reported(side: SideReport) -> dict[str, str]:
    return _other_dtypes(side) | {fact: value for fact, value in side.facts.items() if fact != _ISLANDS}


def _other_dtypes(side: SideReport) -> dict[str, str]:
    """Return the dtypes that are not required; `weights` becomes `held weights`, since another row has that name."""
    names = {region: region for region in side.dtypes if region not in ("compute", "wire", "kv")}
    return {"held weights" if region == "weights" else region: side.dtypes[region] for region in names}


def _line(region: str, trainer: str, engine: str, status: str) -> str:
    return f"{region:<14} {trainer:<32} {engine:<32} {status}".rstrip()


def _wrapped(row: ContractRow, status: str) -> list[str]:
    """Return the lines of a row, with long cells continued on further lines."""
    columns = [textwrap.wrap(row.region, 14), textwrap.wrap(row.trainer, 32), textwrap.wrap(row.engine, 32), [status]]
    height = max(len(column) for column in columns)
    cells = [column + [""] * (height - len(column)) for column in columns]
    return [_line(*parts) for parts in zip(*cells, strict=True)]


_WORDS_AT_ONCE = 2**17
"""64-bit words digested at once on a CPU: one MiB, which fits in the cache together with two temporaries."""

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Constants of splitmix64 (Steele, Lea and Flood 2014, OOPSLA)."""


def weights_digests(weights: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return name -> `tensor_digest` for each tensor, in the order given."""
    return {name: tensor_digest(tensor) for name, tensor in weights}


@torch.no_grad()
def tensor_digest(tensor: Tensor) -> str:
    """Return a 64-bit checksum of a tensor's bits, their positions, its dtype and its shape, as 16 hexadecimal digits.

    Each 64-bit word is mixed with its position (splitmix64, one to one for each position) and the words are added
    modulo 2^64: a change within one word always shows, any other change goes unnoticed with probability 2^-64. The
    checksum guards against mistakes, not against forgery. It is the same on every device and for all strides. The sign
    of a zero is left out: weights that an engine holds packed can only be read back through a product, whose sum has
    lost it.
    """
    words, tail = _as_words(tensor)
    at_once = words.numel() if words.is_cuda else _WORDS_AT_ONCE
    total = _sum_of_mixed(words, 0, max(at_once, 1), tensor.dtype) + _sum_of_mixed(tail, words.numel(), 1, tensor.dtype)
    header = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode()).digest()
    return f"{(total + int.from_bytes(header[:8], 'little')) % 2**64:016x}"


def _as_words(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tensor's bytes as int64: all whole words, and a last one padded with zeros if bytes are left over."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = raw.numel() // 8 * 8
    rest = raw[whole:]
    tail = torch.cat([rest, rest.new_zeros(8 - rest.numel())]) if rest.numel() else rest
    head = raw[:whole]
    if head.data_ptr() % 8 or head.storage_offset() % 8:
        head = head.clone()
    return head.view(torch.int64), tail.view(torch.int64)


def _sum_of_mixed(words: Tensor, first_position: int, at_once: int, dtype: torch.dtype) -> int:
    """Return the sum of the mixed words as an int64, modulo 2^64.

    Args:
        words: int64, the bits of numbers of `dtype`.
        first_position: position of the first word in the whole tensor.
        at_once: words mixed at once.
        dtype: format of the numbers that the words consist of.
    """
    size = min(at_once, words.numel())
    keys = torch.arange(size, device=words.device) * _signed(_GOLDEN)
    mixed, shifted = torch.empty_like(keys), torch.empty_like(keys)
    sums = []
    for start in range(0, words.numel(), at_once):
        part = _without_negative_zeros(words[start : start + at_once], dtype)
        n = part.numel()
        offset = _signed((first_position + start) * _GOLDEN)
        sums.append(_mix(part, keys[:n], offset, mixed[:n], shifted[:n]).sum())
    return int(torch.stack(sums).sum()) if sums else 0


def _without_negative_zeros(words: Tensor, dtype: torch.dtype) -> Tensor:
    return (words.view(dtype) + 0).view(torch.int64) if dtype.is_floating_point else words


def _mix(words: Tensor, keys: Tensor, offset: int, mixed: Tensor, shifted: Tensor) -> Tensor:
    """Write two rounds of splitmix64 on words + keys + offset to `mixed` and return it; `shifted` is scratch."""
    torch.add(words, keys, out=mixed)
    mixed.add_(offset)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        # Shifting a signed integer copies its sign bit; the mask turns that into an unsigned shift, one to one.
        torch.bitwise_right_shift(mixed, shift, out=shifted)
        shifted.bitwise_and_((1 << (64 - shift)) - 1)
        mixed.bitwise_xor_(shifted).mul_(_signed(factor))
    return mixed


def _signed(value: int) -> int:
    """Return the int64 with the same lowest 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


class NotedWeights:
    """A stream of weights that records the digest of each as it passes; implements `wire.WeightStream`."""

    def __init__(
        self,
        read: Callable[[Collection[str]], Iterator[tuple[str, Tensor]]],
        *,
        policy_version: int,
        rollout_dtype: DtypeName,
        unchanging: Collection[str] = (),
        known: dict[str, str] | None = None,
    ) -> None:
        """Prepare the stream; no weight is read yet.

        Args:
            read: takes names to leave out and yields (name, tensor in the wire dtype) of all other weights, the same
                in every call.
            policy_version: number of applied updates in these weights.
            rollout_dtype: format in which the engine holds them, and in which digests are taken.
            unchanging: names of weights that are the same in every version.
            known: digests of those that have passed in any version; updated in place.
        """
        self.policy_version = policy_version
        self._read = read
        self._rollout_dtype = rollout_dtype
        self._unchanging = frozenset(unchanging)
        self._known = {} if known is None else known
        self._whole: NotedWeights | None = None
        self._digests: dict[str, str] = {}
        self._bytes: dict[str, int] = {}
        self._complete = False
        """True once the stream was read to its end."""

    def changed(self) -> NotedWeights | None:
        """Return the stream without the unchanging weights; see `wire.WeightStream.changed`."""
        if not self._unchanging or self._whole is not None:
            return self._whole and self
        part = copy.copy(self)
        part._whole, part._digests, part._bytes, part._complete = self, {}, {}, False
        return part

    def whole(self) -> NotedWeights:
        """See `wire.WeightStream.whole`."""
        return self._whole or self

    @property
    def num_bytes(self) -> int:
        """Size of the weights of this stream; reads it if nobody has read it to its end."""
        self._read_once()
        return sum(self._bytes.values())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) from the first weight on."""
        for name, tensor in self._read(self._unchanging if self._whole else ()):
            self._bytes[name] = tensor.numel() * tensor.element_size()
            self._digests[name] = tensor_digest(to_format(tensor, self._rollout_dtype))
            if name in self._unchanging:
                self._known[name] = self._digests[name]
            yield name, tensor
        self._complete = True

    def digests(self) -> dict[str, str]:
        """Return name -> digest of each weight; reads the stream if nobody has read it to its end."""
        self._read_once()
        if self._whole is None:
            return dict(self._digests)
        if not self._unchanging <= self._known.keys():
            self._whole._read_once()
        return {name: self._known[name] for name in sorted(self._unchanging)} | self._digests

    def _read_once(self) -> None:
        if not self._complete:
            for _ in self:
                pass
