"""Files of a checkpoint: safetensors of whole tensors or of the rows of one rank, listed in a manifest with checksums.

    model.0-of-2.safetensors       rows of the FP32 masters, by Hugging Face name
    optimizer.0-of-2.safetensors   the same rows of the AdamW states, `<state>/<name>`
    reference.0-of-2.safetensors   the same rows of a refreshed reference policy, in the compute dtype
    ...1-of-2...                   those of rank 1
    manifest.json                  size and SHA-256 of every other file of the checkpoint; written last

A single rank writes `model.safetensors` and `optimizer.safetensors`, without numbers. Each file states its rows in its
own header, so that the manifest's checksum covers them; tensors without rows in the header are whole. A checkpoint can
be read by any number of ranks: each reads the rows that it needs. Nothing is pickled.

The safetensors package only reads the files. For writing it would hold the GIL, keep a second copy of the tensors, and
leave the checksum to another pass, so this module writes them itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from betterhalf.distributed.shard_range import ShardRange
from betterhalf.errors import CheckpointError, RunError
from betterhalf.precision.formats import torch_dtype
from betterhalf.run_dir import disk_full

MANIFEST = "manifest.json"
"""Name of the file that lists the others, written last."""

_PARTIAL = ".{}.partial"
"""Name of the folder in which a checkpoint is written, given its final name."""

_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch_dtype("fp16"): "F16",
    torch_dtype("bf16"): "BF16",
}
"""Dtypes of a trainer's state, by their names in safetensors."""

_NAME = re.compile(r"(?P<kind>[a-z]+)(\.(?P<rank>\d+)-of-(?P<ranks>\d+))?\.safetensors")
_ROWS = "rows"
"""Key of a file's header with the rows of its tensors, as JSON: name -> [first row, shape of the whole tensor]."""
_CHUNK = 2**24
"""Bytes that are hashed and written at a time."""
_READERS = 8
"""Maximum number of files that are verified at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """One file of a checkpoint, as the manifest lists it."""

    name: str
    num_bytes: int
    sha256: str
    """In hexadecimal, computed while the file was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Rows of one tensor in one file."""

    file: Any
    """The open file."""
    first: int
    count: int


def partial_folder(final: Path) -> Path:
    """Return the folder in which a checkpoint is written before it gets its name."""
    return final.with_name(_PARTIAL.format(final.name))


@contextmanager
def writing(partial: Path) -> Iterator[None]:
    """Return a context that replaces an OSError by an error that names the checkpoint and the fix.

    Raises:
        RunError: something cannot be written, for example on a full disk.
    """
    try:
        yield
    except OSError as error:
        before, after = _PARTIAL.split("{}")
        final = partial.with_name(partial.name.removeprefix(before).removesuffix(after))
        fix = "free disk space" if disk_full(error) else "check permissions, quota and file size limit of its folder"
        raise RunError(f"checkpoint {final} cannot be written ({error}); {fix}, then continue with --resume") from error


def write_shards(
    folder: Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    ranges: Mapping[str, ShardRange],
    *,
    rank: int = 0,
    world_size: int = 1,
) -> ShardFile:
    """Write one rank's rows of `kind` (`model`, `optimizer`, ...) and flush them to the disk.

    Args:
        folder: existing folder.
        kind: first part of the file's name.
        tensors: tensors in host memory, by parameter or by `<state>/<parameter>`.
        ranges: rows of each parameter; tensors of parameters that it does not name, and scalars, are whole on every
            rank.
        rank: rank that writes, from 0 to `world_size` - 1.
        world_size: number of ranks.

    Raises:
        OSError: the file cannot be written, for example on a full disk.
    """
    name = f"{kind}.safetensors" if world_size == 1 else f"{kind}.{rank}-of-{world_size}.safetensors"
    # safetensors orders by alignment, so that each tensor starts at a multiple of its element size.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    return write_file(folder / name, _serialised(ordered, _rows(ordered, ranges)))


def _rows(tensors: Mapping[str, Tensor], ranges: Mapping[str, ShardRange]) -> dict[str, Any]:
    """Return name -> [first row, shape of the whole tensor] of the tensors that are sharded."""
    found = {}
    for name, tensor in tensors.items():
        held = ranges.get(_parameter(name)) if tensor.dim() else None
        if held is not None:
            assert tensor.shape == (held.count, *held.shape[1:]), f"{name}: {tuple(tensor.shape)} is not {held}"
            found[name] = [held.first, held.shape]
    return found


def _parameter(name: str) -> str:
    """Return the parameter of a tensor called `<parameter>` or `<state>/<parameter>`."""
    return name.rpartition("/")[2]


def _serialised(tensors: Mapping[str, Tensor], rows: Mapping[str, Any]) -> Iterator[memoryview]:
    """Yield the bytes of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | ({_ROWS: json.dumps(rows)} if rows else {})}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        if tensor.numel():
            yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_file(path: Path, parts: Iterator[memoryview]) -> ShardFile:
    """Write a new file of a checkpoint and flush it to the disk.

    Raises:
        OSError: the file exists already, or cannot be written.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for part in parts:
            for start in range(0, len(part), _CHUNK):
                chunk = part[start : start + _CHUNK]
                digest.update(chunk)
                size += len(chunk)
                # After a short write, the next one raises the error.
                while chunk:
                    chunk = chunk[os.write(file.fileno(), chunk) :]
        os.fsync(file.fileno())
    return ShardFile(name=path.name, num_bytes=size, sha256=digest.hexdigest())


def write_manifest(folder: Path, files: tuple[ShardFile, ...]) -> None:
    """List the files of a checkpoint; raises OSError if the manifest cannot be written."""
    manifest = {file.name: {"bytes": file.num_bytes, "sha256": file.sha256} for file in files}
    write_file(folder / MANIFEST, iter([memoryview(json.dumps(manifest, indent=1).encode())]))


def read_manifest(folder: Path) -> tuple[ShardFile, ...]:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text())
        files = [
            ShardFile(name=name, num_bytes=entry["bytes"], sha256=entry["sha256"]) for name, entry in found.items()
        ]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} is incomplete: {MANIFEST} cannot be read ({error})") from error
    if strange := [file.name for file in files if Path(file.name).name != file.name]:
        raise CheckpointError(f"checkpoint {folder} is corrupted: {MANIFEST} names {strange[0]}")
    return tuple(files)


def verify_files(folder: Path, needed: frozenset[str]) -> None:
    """Compare every file of a checkpoint with its size and checksum.

    Args:
        folder: folder of the checkpoint.
        needed: kinds of tensors that it must hold, and names of other files.

    Raises:
        CheckpointError: a file or the manifest is missing, truncated or altered; the message names it.
    """
    files = read_manifest(folder)
    with ThreadPoolExecutor(_READERS) as threads:
        problems = [problem for problem in threads.map(lambda file: _problem(folder, file), files) if problem]
    problems += [f"{name} is not in the manifest" for name in sorted(_absent(files, needed))]
    if problems:
        raise CheckpointError(f"checkpoint {folder} is corrupted ({'; '.join(problems)})")


def _problem(folder: Path, file: ShardFile) -> str | None:
    """Describe the damage of a file; None if it is intact."""
    path = folder / file.name
    try:
        size = path.stat().st_size
        if size != file.num_bytes:
            return f"{file.name} has {size} bytes instead of {file.num_bytes}"
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        return f"{file.name}: {error.strerror}"
    return None if digest == file.sha256 else f"{file.name} has another checksum than when it was written"


def _absent(files: tuple[ShardFile, ...], needed: frozenset[str]) -> set[str]:
    """Return the files that a manifest lacks: those in `needed`, and those of ranks of which it lists only some."""
    names = {file.name for file in files}
    parts = [match for name in names if (match := _NAME.fullmatch(name))]
    absent = set(needed) - names - {part["kind"] for part in parts}
    for part in parts:
        if part["ranks"]:
            ranks = range(int(part["ranks"]))
            absent |= {f"{part['kind']}.{rank}-of-{len(ranks)}.safetensors" for rank in ranks} - names
    return absent


def read_rows(folder: Path, kind: str, wanted: Mapping[str, ShardRange]) -> dict[str, Tensor]:
    """Read the rows that one rank needs, from all files that hold some of them.

    Args:
        folder: folder of a checkpoint whose files have been verified.
        kind: first part of the files' names.
        wanted: rows of each parameter; tensors of parameters that it does not name, and scalars, are read whole.

    Returns:
        Tensors by name, empty if there are no files of this kind.

    Raises:
        CheckpointError: a file cannot be read, rows of a tensor are missing or duplicated, or a tensor has another
            shape than in `wanted`.
    """
    with ExitStack() as files:
        pieces, shapes = _opened(folder, kind, files)
        return {name: _read(name, pieces[name], shapes[name], wanted, folder) for name in pieces}


def read_shapes(folder: Path, kind: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each whole tensor, from the headers of the files alone.

    Raises:
        CheckpointError: a file cannot be read.
    """
    with ExitStack() as files:
        return _opened(folder, kind, files)[1]


def _opened(folder: Path, kind: str, files: ExitStack) -> tuple[dict[str, list[_Piece]], dict[str, tuple[int, ...]]]:
    """Open the files of a kind until `files` ends; see `_pieces`."""
    matches = [_NAME.fullmatch(file.name) for file in read_manifest(folder)]
    paths = [folder / match[0] for match in matches if match and match["kind"] == kind]
    try:
        return _pieces([files.enter_context(safe_open(path, framework="pt")) for path in paths])
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder} is corrupted: {kind} cannot be read ({error})") from error


def _pieces(files: Sequence[Any]) -> tuple[dict[str, list[_Piece]], dict[str, tuple[int, ...]]]:
    """Return the pieces of each tensor, ordered by row, and the shape of each whole tensor."""
    pieces: dict[str, list[_Piece]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        rows = json.loads((file.metadata() or {}).get(_ROWS, "{}"))
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            own = tuple(file.get_slice(name).get_shape())
            if name in rows:
                first, shape = rows[name]
                pieces.setdefault(name, []).append(_Piece(file=file, first=first, count=own[0]))
                shapes[name] = tuple(shape)
            else:  # the same on every rank that holds it
                pieces[name], shapes[name] = [_Piece(file=file, first=0, count=own[0] if own else 1)], own
    for name, found in pieces.items():
        # Some ranks may hold no rows. If none does, as of a tensor without rows, a piece still has the dtype.
        held = sorted((piece for piece in found if piece.count), key=lambda piece: piece.first)
        pieces[name] = held or found[:1]
    return pieces, shapes


def _read(
    name: str, pieces: list[_Piece], shape: tuple[int, ...], wanted: Mapping[str, ShardRange], folder: Path
) -> Tensor:
    """Return the wanted rows of one tensor, or all of them."""
    if not shape:
        return _whole(pieces[0], name)
    ends = [0, *(piece.first + piece.count for piece in pieces)]
    if [piece.first for piece in pieces] != ends[:-1] or ends[-1] != shape[0]:
        raise CheckpointError(f"checkpoint {folder} is corrupted: its files do not hold every row of {name} once")
    rows = wanted.get(_parameter(name), ShardRange(first=0, count=shape[0], shape=shape))
    if rows.shape != shape:
        raise CheckpointError(
            f"checkpoint {folder} holds another shape of parameter {_parameter(name)!r}: it was made by another model; "
            "name the model it was made with"
        )
    first, last = rows.first, rows.first + rows.count
    parts = [
        _whole(piece, name)[max(first - piece.first, 0) : last - piece.first]
        for piece in pieces
        if piece.first < last and first < piece.first + piece.count
    ]
    if not parts:
        return _whole(pieces[0], name)[:0]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _whole(piece: _Piece, name: str) -> Tensor:
    """Return all rows of a piece, memory-mapped, so that unused rows are not read from the disk."""
    tensor: Tensor = piece.file.get_tensor(name)
    return tensor
