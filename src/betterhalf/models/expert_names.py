"""Names of experts: transformers keeps those of a layer in two 3-D parameters, files and engines one by one.

`model.layers.0.mlp.experts.gate_up_proj` [E, 2 I, H] is `...experts.0.gate_proj.weight` and
`...experts.0.up_proj.weight` [I, H] of each expert, and `model.layers.0.mlp.experts.down_proj` [E, H, I] is
`...experts.0.down_proj.weight` [H, I].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

_GATE_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def unfused(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield weights under the names of their files: those of experts as views of each expert's matrices.

    Args:
        weights: (name of the transformers module, tensor).
    """
    for name, tensor in weights:
        if name.endswith(_GATE_UP):
            yield from _experts(name.removesuffix(_GATE_UP), ("gate_proj", "up_proj"), tensor)
        elif name.endswith(_DOWN):
            yield from _experts(name.removesuffix(_DOWN), ("down_proj",), tensor)
        else:
            yield name, tensor


def _experts(block: str, parts: tuple[str, ...], tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for index, matrix in enumerate(tensor):
        for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
            yield f"{block}.experts.{index}.{part}.weight", rows
