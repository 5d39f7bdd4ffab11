"""Exact rounding is refused on a GPU, and between formats."""

from __future__ import annotations

import pytest
import torch

from betterhalf.config.load import load_config
from betterhalf.errors import ConfigError
from betterhalf.precision.device import choose_device
from betterhalf.setup.model_checks import check_roles

EXACT = "engine.rounding=exact"


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_a_gpu_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"on a CPU only.* set device=cpu, or engine\.rounding=aligned"):
        choose_device(load_config(None, [EXACT, f"device={device}"]))
    assert choose_device(load_config(None, [EXACT, "device=cpu"])).type == "cpu"


@pytest.mark.parametrize("role", ["compute_dtype", "rollout_dtype", "wire_dtype", "kv_dtype"])
def test_a_difference_between_the_sides_is_refused_even_if_it_is_allowed(role: str) -> None:
    overrides = [f"precision.{role}=bf16", "precision.allow_difference=true"]
    check_roles(load_config(None, overrides))
    with pytest.raises(ConfigError, match=f"exact needs one format on both sides .*{role} bf16"):
        check_roles(load_config(None, [EXACT, *overrides]))
    check_roles(load_config(None, [EXACT, "precision=bf16"]))
