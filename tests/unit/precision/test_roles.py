"""Torch settings that a precision changes."""

from __future__ import annotations

import pytest
import torch

from betterhalf.config.schema import PrecisionConfig
from betterhalf.precision.roles import build_precision

SETTINGS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


def test_on_a_gpu_nothing_is_added_in_half_or_multiplied_in_tf32() -> None:
    matmul = torch.backends.cuda.matmul
    before = [getattr(matmul, name) for name in SETTINGS], torch.get_float32_matmul_precision()
    try:
        for name in SETTINGS:
            setattr(matmul, name, True)
        torch.set_float32_matmul_precision("high")
        build_precision(PrecisionConfig(), torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == "high"
        build_precision(PrecisionConfig(), torch.device("cuda"))
        assert not any(getattr(matmul, name) for name in SETTINGS)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        for name, value in zip(SETTINGS, before[0], strict=True):
            setattr(matmul, name, value)
        torch.set_float32_matmul_precision(before[1])


@pytest.mark.parametrize("preset", ["fp16", "bf16", "e8m3"])
def test_exact_precision_has_fp32_sums_in_every_half_format(preset: str) -> None:
    config = PrecisionConfig.model_validate({"preset": preset})
    exact = build_precision(config, torch.device("cpu"), exact=True)
    assert exact.exact and exact.fp32_sums(exact.roles.compute_dtype) and not exact.fp32_sums("fp32")
