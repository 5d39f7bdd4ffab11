"""Adapters on disk, written by PEFT itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def peft_adapter(module: Any, folder: Path, *, seed: int = 0, dtype: torch.dtype | None = None, **settings: Any) -> Any:
    """Write an adapter of `module`, none of whose tensors is 0, and return PEFT's model.

    Args:
        module: transformers causal language model, which PEFT changes.
        folder: for the adapter.
        seed: of its values.
        dtype: of its values; FP32 by default.
        settings: of PEFT's `LoraConfig`, in place of rank 4, alpha 8, all linear layers.
    """
    from peft import LoraConfig, get_peft_model

    chosen: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(seed)
    made = get_peft_model(module, LoraConfig(**chosen | settings)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.05)
            if ".lora_" in name and dtype is not None:
                parameter.copy_(parameter.to(dtype))
    made.save_pretrained(folder)
    if dtype is not None:
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return made
