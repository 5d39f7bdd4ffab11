"""Hooks: the modules that a census measures."""

from __future__ import annotations

from torch import Tensor, nn, ones

from betterhalf.examine.module_hooks import observe_module


def test_a_module_that_returns_its_input_is_not_observed() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.ReLU())  # PEFT's dropout of 0 is an Identity
    seen: list[str] = []

    def see(name: str, kind: str, values: Tensor) -> None:
        seen.append(name)

    with observe_module(module, see):
        module(ones(1, 2))
    assert set(seen) == {"0", "2"}
