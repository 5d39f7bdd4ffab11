"""The device of a run: `config.device`, resolved on this machine."""

from __future__ import annotations

import torch

from betterhalf.config.schema import RunConfig
from betterhalf.errors import ConfigError


def choose_device(config: RunConfig) -> torch.device:
    """Return the device that `config.device` names; `auto` is a GPU if there is one.

    Raises:
        ConfigError: a GPU is requested, and there is none; or it would be used with `engine.rounding=exact`.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU; set device=cpu or device=auto")
    wanted = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if config.exact and wanted == "cuda":
        raise ConfigError(
            "engine.rounding=exact is computed on a CPU only: a GPU's products and attention depend on the batch; set "
            "device=cpu, or engine.rounding=aligned"
        )
    return torch.device(wanted)
