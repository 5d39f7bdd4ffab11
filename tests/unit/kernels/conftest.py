"""Run the kernels in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import contextlib
import importlib
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads the variable when it decorates a kernel; tests/conftest.py has imported Triton's own kernels before.
    given = "TRITON_INTERPRET" in os.environ
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        for name in ("attention", "decoding", "gradients", "vocabulary"):
            importlib.import_module(f"betterhalf.kernels.{name}")
    if not given:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
