"""Weights of a model in safetensors files, of which each rank reads its own rows.

transformers may rename the tensors of files on loading, and may make one parameter of several of them. Its own rules
are applied here to names alone. Experts are the one case of several tensors that is read by rows: axis 0 of their
parameter counts experts, so the rows of a rank are whole experts. For any other conversion, and for other formats,
`WeightFiles.open` returns None, and the model has to be loaded whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from betterhalf.distributed.shard_range import ShardRange
from betterhalf.models.files import ModelSource
from betterhalf.models.skeleton import compute_buffers, skeleton

_CHUNK = 1024
"""Rows of two weights that are compared at a time."""


def weight_paths(source: ModelSource) -> tuple[str, ...] | None:
    """Return the paths of a model's safetensors files, which are downloaded if need be; None for another format.

    Raises:
        Exception: any that transformers raises for files that it cannot find.
    """
    if source.gguf is not None:
        return None
    single, index = (
        cached_file(source.location, name, _raise_exceptions_for_missing_entries=False, **source.arguments)
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if single is not None:
        return (single,)
    if index is None:
        return None
    paths, _ = get_checkpoint_shard_files(source.location, index, **source.arguments)  # type: ignore[no-untyped-call]
    return tuple(paths)


WholeReason = Literal["format", "conversion", "buffers"]
"""Reason why a model has to be loaded whole: files that are not safetensors, tensors that transformers converts by
other rules than stacking experts, or buffers whose values only the files hold."""


def whole_reason(source: ModelSource, hf_config: Any) -> WholeReason | None:
    """Return why this host cannot read a model by rows; None if it can, or if its files are not here or not whole.

    Downloads nothing, and reads the headers of the files alone.
    """
    if source.gguf is not None:
        return "format"
    formats = ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
    by_rows, whole = (any(source.holds(name) for name in names) for names in formats)
    if not by_rows:
        return "format" if whole else None
    module = skeleton(deepcopy(hf_config))
    if compute_buffers(module):
        return "buffers"
    try:
        paths = weight_paths(source)
        return "conversion" if paths and WeightFiles.open(paths, module) is None else None
    except (OSError, ValueError, SafetensorError):  # a plan needs no weights; loading them tells what is wrong
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """One tensor of a file."""

    path: str
    key: str
    """Name in the file."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """Tensors of the files that make up one parameter."""

    stored: Mapping[str, Sequence[_Stored]]
    """Pattern of the converter -> tensors in the order of experts; without a converter one tensor."""
    converter: WeightConverter | None = None
    """Rule that stacks experts; None for a parameter that is one tensor of a file."""

    def made(self, name: str, tensors: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """Return the parameter `name`, or rows of it, made of tensors by pattern."""
        if self.converter is None:
            ((alone,),) = tensors.values()
            return alone
        converter: Any = deepcopy(self.converter)
        converter.collected_tensors.update({pattern: list(group) for pattern, group in tensors.items()})
        (result,) = converter.convert(name).values()
        made: Tensor = result[0] if isinstance(result, list) else result
        return made


class WeightFiles:
    """Parameters of one model in its safetensors files; implements `RowSource`."""

    def __init__(self, paths: Sequence[str], origins: Mapping[str, _Origin]) -> None:
        """Read from `paths` what `origins` says of each parameter."""
        self._paths = tuple(paths)
        self._origins = dict(origins)

    @classmethod
    def open(cls, paths: Sequence[str], module: Any) -> WeightFiles | None:
        """Find the parameters of a skeleton in the headers of the files; None if rows of them cannot be read.

        Args:
            paths: safetensors files.
            module: skeleton of the model.

        Raises:
            Exception: any that safetensors raises for a damaged file.
        """
        stored = [tensor for path in paths for tensor in _header(path)]
        origins = _origins(module, stored)
        return None if origins is None else cls(paths, origins)

    @property
    def names(self) -> frozenset[str]:
        """Names of the parameters that the files hold, both of a tied pair if both are there."""
        return frozenset(self._origins)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter that the files hold."""
        origin = self._origins[name]
        empty = {
            pattern: [torch.empty(one.shape, device="meta") for one in group]
            for pattern, group in origin.stored.items()
        }
        return tuple(origin.made(name, empty).shape)

    def alias(self, name: str, other: str) -> None:
        """Read the parameter `name` where `other` is stored."""
        self._origins[name] = self._origins[other]

    def equal(self, name: str, other: str) -> bool:
        """Return whether two parameters have equal values in FP32."""
        shape = self.shape(name)
        if shape != self.shape(other):
            return False
        with ExitStack() as stack:
            files = self._open(stack)
            for first in range(0, shape[0], _CHUNK):
                part = ShardRange(first=first, count=min(_CHUNK, shape[0] - first), shape=shape)
                one, two = (self._read(files, each, part).float() for each in (name, other))
                if not torch.equal(one, two):
                    return False
        return True

    def rows(self, wanted: Mapping[str, ShardRange]) -> Iterator[tuple[str, Tensor]]:
        """See `RowSource.rows`; only the bytes of these rows are read."""
        with ExitStack() as stack:
            files = self._open(stack)
            for name, rows in wanted.items():
                yield name, self._read(files, name, rows)

    def _open(self, stack: ExitStack) -> dict[str, Any]:
        # Not mapped: mapped pages would count as memory of this process for as long as a file is open.
        return {path: stack.enter_context(safe_open(path, "pt", backend="pread")) for path in self._paths}

    def _read(self, files: Mapping[str, Any], name: str, rows: ShardRange) -> Tensor:
        origin = self._origins[name]
        if not rows.count:
            return torch.empty(0, *rows.shape[1:])
        if origin.converter is None:
            ((alone,),) = origin.stored.values()
            tensor: Tensor = files[alone.path].get_slice(alone.key)[rows.rows]
            return tensor
        experts = {
            pattern: [files[one.path].get_tensor(one.key) for one in group[rows.rows]]
            for pattern, group in origin.stored.items()
        }
        return origin.made(name, experts)


def _header(path: str) -> Iterator[_Stored]:
    with safe_open(path, "pt", backend="pread") as file:
        for key in file.keys():  # noqa: SIM118 - the file is no mapping
            yield _Stored(path=path, key=key, shape=tuple(file.get_slice(key).get_shape()))


def _origins(module: Any, stored: Sequence[_Stored]) -> dict[str, _Origin] | None:
    """Return parameter -> its tensors, by the rules of transformers; None if one of the rules does not keep rows."""
    mapping = get_model_conversion_mapping(module)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    expected = module.state_dict()
    found: dict[str, dict[str, list[_Stored]]] = defaultdict(lambda: defaultdict(list))
    rules: dict[str, WeightConverter] = {}
    # This order is the order of experts.
    for tensor in sorted(stored, key=lambda tensor: dot_natural_key(tensor.key)):
        name, pattern = rename_source_key(tensor.key, renamings, converters, module.base_model_prefix, expected)
        if name not in expected and tensor.key in expected:
            name, pattern = tensor.key, None
        if name not in expected:
            continue
        if pattern is not None:
            rules[name] = by_pattern[pattern]
        found[name][pattern or ""].append(tensor)
    doubled = any(len(group) > 1 for name, groups in found.items() if name not in rules for group in groups.values())
    if doubled or not all(_keeps_rows(rule) for rule in rules.values()):
        return None
    return {
        name: _Origin(stored={pattern: tuple(group) for pattern, group in groups.items()}, converter=rules.get(name))
        for name, groups in found.items()
    }


def _keeps_rows(rule: WeightConverter) -> bool:
    """Return whether rows of its result need only the tensors of the same rows: experts that are stacked first."""
    first, *others = rule.operations
    return (
        len(rule.target_patterns) == 1
        and isinstance(first, MergeModulelist)
        and first.dim == 0
        and all(isinstance(other, Concatenate) and other.dim > 0 for other in others)
    )
