"""Folders of small random models in transformers' format, with the tokenizer of the demo model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import tiny_config, tiny_module
from torch import Tensor

from betterhalf.models import loading

DEMO = Path(loading.__file__).parent / "demo"
VOCABULARY = int(json.loads((DEMO / "config.json").read_text())["vocab_size"])
"""Number of tokens of the demo's tokenizer."""


def write_model(folder: Path, family: str = "llama", *, shard: str = "10KB", dtype: Any = None, **changes: Any) -> Path:
    """Write a small random decoder in several safetensors files.

    Args:
        folder: created if need be.
        family: as of `tiny_config`.
        shard: size of one file.
        dtype: of the weights on disk; FP32 by default.
        changes: of the sizes.
    """
    module = tiny_module(tiny_config(family, **{"vocab_size": VOCABULARY, **changes}), seed=3, biases=0.1, norms=0.1)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype or torch.float32)
    module.save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a folder's safetensors files."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _without_weights(folder: Path) -> Path:
    for path in folder.glob("model*"):
        path.unlink()
    return folder


def rewrite(folder: Path, weights: dict[str, Tensor]) -> None:
    """Replace the weights of a folder by one safetensors file of other weights."""
    save_file(weights, _without_weights(folder) / "model.safetensors", metadata={"format": "pt"})


def as_bin(folder: Path) -> Path:
    """Replace the safetensors files of a folder by a `.bin` file of the same weights."""
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    return _without_weights(folder)
