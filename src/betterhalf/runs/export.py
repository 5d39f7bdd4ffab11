"""Export a run as a Hugging Face folder that transformers and vLLM load."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from betterhalf.config.load import load_config
from betterhalf.errors import InputError, RunError
from betterhalf.metrics.console import show_note
from betterhalf.models.files import first_line, quiet
from betterhalf.models.loading import LoadedModel, load_model
from betterhalf.precision.emulation import to_format
from betterhalf.precision.formats import is_emulated, torch_dtype
from betterhalf.run_dir import RunDir, disk_full
from betterhalf.setup.model_checks import show_notes
from betterhalf.setup.trained_policy import LATEST, load_policy


def export(run: str, directory: str, checkpoint: str = LATEST) -> dict[str, Any]:
    """Write weights (in the dtype the engine sampled with, rounded once), configuration and tokenizer.

    Args:
        run: folder of the run.
        directory: a new or empty folder.
        checkpoint: `latest`, `best` or the step of a checkpoint.

    Raises:
        InputError: the directory is not a new or empty folder, or the run has no such checkpoint.
        RunError: the folder cannot be written, for example on a full disk; nothing is left behind.
    """
    target = Path(directory)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{directory} is not an empty folder; name a new one, so that nothing is overwritten")
    config = load_config(RunDir.open(run).config)
    policy = load_policy(run, checkpoint)
    model = load_model(config.model)
    show_notes(model)
    policy.copy_into(model.module)
    name = config.precision.roles().rollout_dtype
    if is_emulated(name):
        show_note(
            f"{name} is emulated: the files hold its numbers in BF16, and transformers and vLLM compute with them "
            "in real BF16, or in the format that you choose there",
            mode=config.logging.console,
        )
    for parameter in model.module.parameters():
        parameter.data = to_format(parameter.data, name)
    model.module.config.dtype = torch_dtype(name)
    _save(model, target)
    return {
        "verb": "export",
        "directory": str(target),
        "step": policy.step,
        "dtype": name,
        "generation_settings_left_out": ", ".join(model.generation_left_out) or None,
        "parameters": sum(tensor.numel() for tensor in policy.weights.values()),
    }


def _save(model: LoadedModel, target: Path) -> None:
    """Write all files or none: the folder gets its name once they are complete."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{target} cannot be made ({error.strerror}); name another folder") from error
    try:
        with quiet():
            model.module.save_pretrained(partial)
            model.tokenizer.save_pretrained(partial)
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
