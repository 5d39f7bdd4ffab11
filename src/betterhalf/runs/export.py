"""Export a run as a Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from betterhalf.config.load import load_config
from betterhalf.config.schema import RunConfig
from betterhalf.errors import InputError, RunError
from betterhalf.metrics.console import show_note
from betterhalf.models.adapters import (
    add_adapters,
    plain_weights,
    remove_adapters,
    save_adapter,
    trained_parameters,
)
from betterhalf.models.files import first_line, quiet
from betterhalf.models.loading import LoadedModel, load_model
from betterhalf.precision.formats import is_emulated, torch_dtype
from betterhalf.run_dir import RunDir, disk_full
from betterhalf.setup.model_checks import show_notes
from betterhalf.setup.trained_policy import LATEST, TrainedPolicy, load_policy
from betterhalf.types import DtypeName


def export(run: str, directory: str, checkpoint: str = LATEST, *, merge: bool = False) -> dict[str, Any]:
    """Write weights (in the dtype the engine sampled with, rounded once), configuration and tokenizer.

    A run with LoRA writes its adapter in PEFT's format and FP32, or with `merge` the whole model.

    Args:
        run: folder of the run.
        directory: a new or empty folder.
        checkpoint: `latest`, `best` or the step of a checkpoint.
        merge: merge the adapter into the weights, as the engine of the run held them.

    Raises:
        InputError: the directory is not a new or empty folder, the run has no such checkpoint, or `merge` is set and
            the run has no adapter.
        RunError: the folder cannot be written, for example on a full disk; nothing is left behind.
    """
    target = Path(directory)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{directory} is not an empty folder; name a new one, so that nothing is overwritten")
    config = load_config(RunDir.open(run).config)
    if merge and not config.lora.active:
        raise InputError(f"run {run} trained all weights (lora.rank=0), so it has no adapter; leave out --merge")
    policy = load_policy(run, checkpoint)
    model = load_model(config.model)
    show_notes(model)
    add_adapters(model.module, config.lora.without_start(), config.seed)
    policy.copy_into(model.module)
    if config.lora.active and not merge:
        _write(target, lambda folder: _save_adapter(model, config, policy, folder), model.tokenizer)
        name: DtypeName = "fp32"
        parameters = sum(parameter.numel() for _, parameter in trained_parameters(model.module))
    else:
        name = _round(model, config)
        parameters = sum(parameter.numel() for parameter in model.module.parameters())
        _write(target, model.module.save_pretrained, model.tokenizer)
    return {
        "verb": "export",
        "directory": str(target),
        "step": policy.step,
        "dtype": name,
        "adapter": config.lora.active and not merge,
        "generation_settings_left_out": ", ".join(model.generation_left_out) or None,
        "parameters": parameters,
    }


def _round(model: LoadedModel, config: RunConfig) -> DtypeName:
    """Give the module the weights that the engine of the run held, and return their format."""
    roles = config.precision.roles()
    name = roles.rollout_dtype
    if is_emulated(name):
        show_note(
            f"{name} is emulated: the files hold its numbers in BF16, and transformers and vLLM compute with them "
            "in real BF16, or in the format that you choose there",
            mode=config.logging.console,
        )
    weights = dict(plain_weights(model.module, roles.compute_dtype, name))
    remove_adapters(model.module)
    for key, parameter in model.module.named_parameters():
        parameter.data = weights.pop(key)
    model.module.config.dtype = torch_dtype(name)
    return name


def _save_adapter(model: LoadedModel, config: RunConfig, policy: TrainedPolicy, folder: Path) -> None:
    """Write the adapter, with the checksum of the base that it was trained on."""
    save_adapter(model.module, config.lora, folder, config.model, {"base_digest": policy.base_digest})


def _write(target: Path, save: Callable[[Path], object], tokenizer: Any) -> None:
    """Write all files or none: the folder gets its name once they are complete."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{target} cannot be made ({error.strerror}); name another folder") from error
    try:
        with quiet():
            save(partial)
            tokenizer.save_pretrained(partial)
        os.replace(partial, target)
    except Exception as error:  # safetensors raises its own class for errors of the disk
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(_why_not_written(target, error)) from error


def _why_not_written(target: Path, error: Exception) -> str:
    """Return the message for a failed write: the cause, and a fix for it."""
    problem = f"{target} cannot be written ({first_line(error)})"
    if disk_full(error):
        return f"{problem}; free disk space, or name another folder"
    if isinstance(error, OSError | SafetensorError):
        return f"{problem}; fix the cause, or name another folder"
    return f"{problem}; fix the model's configuration files that the error names; the run's checkpoints are untouched"
