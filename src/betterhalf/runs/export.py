"""Turn a run into a Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from betterhalf.errors import InputError
from betterhalf.models.loading import load_model
from betterhalf.precision.formats import torch_dtype
from betterhalf.runs.evaluate import config_for, newest_checkpoint
from betterhalf.training import checkpoint


def export(run: str, directory: str) -> dict[str, Any]:
    """Write weights (in the dtype the engine sampled with, rounded once), configuration and tokenizer.

    Raises:
        InputError: the directory is not empty, or the run has no checkpoint.
    """
    target = Path(directory)
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{directory} is not empty; name a new folder, so that nothing is overwritten")
    config = config_for(run)
    path, saved = newest_checkpoint(run)
    model = load_model(config.model)
    checkpoint.require_names(path, set(dict(model.module.named_parameters())), set(saved.tensors["model"]))
    name = config.precision.roles().rollout_dtype
    weights = {key: master.to(torch_dtype(name)) for key, master in saved.tensors["model"].items()}
    for key, parameter in model.module.named_parameters():
        parameter.data = weights[key]
    model.module.config.dtype = torch_dtype(name)
    model.module.save_pretrained(target)
    model.tokenizer.save_pretrained(target)
    return {
        "verb": "export",
        "directory": str(target),
        "step": saved.step,
        "dtype": name,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
    }
