"""The device of a run: `config.device`, resolved on this machine."""

from __future__ import annotations

import torch

from betterhalf.config.schema import RunConfig
from betterhalf.errors import ConfigError


def choose_device(config: RunConfig) -> torch.device:
    """Return the device that `config.device` names; `auto` is a GPU if there is one.

    Raises:
        ConfigError: a GPU is requested, and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU; set device=cpu or device=auto")
    wanted = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)
