"""What holds for every test: nothing reaches for the hub, slow and GPU tests say why they are skipped."""

from __future__ import annotations

import contextlib
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _interpret_triton() -> None:
    """Without a GPU, kernels run in Triton's interpreter, which it must know when it is imported for the first time."""
    if _cuda_available() or "TRITON_INTERPRET" in os.environ:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401
    del os.environ["TRITON_INTERPRET"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("RUN_SLOW") != "1":
        _skip(items, "slow", "slow; set RUN_SLOW=1 to run it")
    if any("gpu" in item.keywords for item in items) and not _cuda_available():
        _skip(items, "gpu", "needs a CUDA device")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


_interpret_triton()
