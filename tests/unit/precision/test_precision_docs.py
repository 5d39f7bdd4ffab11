"""Claims of docs/precision.md."""

from __future__ import annotations

from pathlib import Path

import torch

from betterhalf.config.schema import LossScaleConfig
from betterhalf.precision.contract import Contract, SideReport, compare
from betterhalf.precision.formats import EMULATED, FORMATS, formats_table, round_to_format

PAGE = (Path(__file__).parents[3] / "docs" / "precision.md").read_text(encoding="ascii")


def ablation(allow_difference: bool) -> Contract:
    """Return the page's example: the trainer in FP16, the engine in BF16."""
    trainer = SideReport(
        side="trainer",
        dtypes={
            "weights": "fp16",
            "compute": "fp16",
            "wire": "bf16",
            "lm_head": "fp32",
            "rope": "fp32",
            "norm": "fp16",
            "master": "fp32",
        },
        facts={"attention": "betterhalf_packed_fp32_sums", "linear_layers": "1 widened to fp32", "torch": "2.13.0+cpu"},
        digests={"model.embed_tokens.weight": "5f0c1d2e3a4b5968", "model.norm.weight": "c0ffee0123456789"},
    )
    engine = SideReport(
        side="engine",
        dtypes={
            "weights": "bf16",
            "compute": "bf16",
            "wire": "bf16",
            "kv": "bf16",
            "lm_head": "fp32",
            "rope": "fp32",
            "norm": "bf16",
        },
        facts={"attention": "batched products in FP32", "linear_layers": "1 native", "torch": "2.13.0+cpu"},
        digests={"model.embed_tokens.weight": "0a1b2c3d4e5f6071", "model.norm.weight": "89abcdef01234567"},
    )
    return compare(trainer, engine, allow_difference=allow_difference)


def test_the_table_of_formats_is_generated() -> None:
    assert formats_table() in PAGE and formats_table(EMULATED) in PAGE


def test_rounding_twice_differs_from_once_for_the_share_of_numbers_that_the_page_says() -> None:
    x = torch.rand(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    twice = round_to_format(round_to_format(x, "bf16"), "e8m3")
    share = float((twice != round_to_format(x, "e8m3")).double().mean())
    assert abs(share / 2.0 ** (3 - 8) - 1) < 0.05


def test_the_example_table_is_what_the_code_prints() -> None:
    assert f"```text\n{ablation(False).table()}\n```" in PAGE
    assert ablation(False).table().replace("differs\n", "differs, allowed\n") == ablation(True).table()


def test_the_defaults_of_loss_scaling_are_those_of_the_configuration() -> None:
    defaults = LossScaleConfig()
    for row in (
        f"| `initial` | {defaults.initial:g} |",
        f"| `growth_interval`, `growth_factor` | {defaults.growth_interval}, {defaults.growth_factor:g} |",
        f"| `backoff_factor` | {defaults.backoff_factor:g} |",
        f"| `hysteresis` | {defaults.hysteresis} |",
        f"| `consecutive_hysteresis` | {str(defaults.consecutive_hysteresis).lower()} |",
        f"| `floor` | {defaults.floor:g} |",
        f"| `max_skips_at_floor` | {defaults.max_skips_at_floor} |",
    ):
        assert row in PAGE


def test_fp16_rounds_eight_times_more_finely_than_bf16() -> None:
    assert FORMATS["bf16"].unit_roundoff / FORMATS["fp16"].unit_roundoff == 8


def test_adamw_on_fp16_parameters_is_not_finite_after_one_step() -> None:
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))
    weight.grad = torch.full((1,), 1e-4, dtype=torch.float16)
    torch.optim.AdamW([weight], lr=1e-6, foreach=False).step()
    assert not weight.isfinite()


def test_fp16_losses_stay_fp16_under_the_scale_and_overflow() -> None:
    scale = torch.tensor(65536.0)
    assert (torch.ones(2, dtype=torch.float16) * scale).tolist() == [torch.inf, torch.inf]
    assert torch.tensor(1.0, dtype=torch.float16) * scale == 65536.0


def test_casting_a_module_rounds_its_buffers() -> None:
    module = torch.nn.Module()
    module.register_buffer("inv_freq", torch.tensor([0.1]))
    assert module.half().inv_freq.dtype == torch.float16


def test_one_added_to_2048_is_lost_in_fp16() -> None:
    assert torch.tensor(2048.0, dtype=torch.float16) + torch.tensor(1.0, dtype=torch.float16) == 2048.0
