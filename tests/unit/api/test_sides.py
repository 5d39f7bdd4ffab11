"""The contract between another framework's trainer and engine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import betterhalf
from betterhalf.errors import InputError


class Tied(nn.Module):
    """Two layers and an embedding whose weight is also the head's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, 4)
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


def held(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.detach().to(dtype) for name, value in module.named_parameters()}


def test_weights_that_were_rounded_once_fulfil_the_contract() -> None:
    module = Tied()
    trainer = betterhalf.side_report("trainer", module, compute_dtype="fp16")
    engine = betterhalf.side_report("engine", held(module, torch.float16), compute_dtype="float16", kv_dtype="auto")
    found = betterhalf.contract(trainer, engine)
    assert found.ok
    assert [(row.region, row.status) for row in found.rows[:4]] == [
        ("compute", "equal"),
        ("wire", "equal"),
        ("kv", "equal"),
        ("weights", "equal"),
    ]
    assert len(trainer.digests) == 3  # the tied head counts once
    assert (trainer.dtypes["weights"], engine.dtypes["weights"]) == ("fp32", "fp16")


def test_weights_that_were_rounded_through_another_format_break_it() -> None:
    module = Tied()
    twice = {name: value.to(torch.float16) for name, value in held(module, torch.bfloat16).items()}
    trainer = betterhalf.side_report("trainer", module, compute_dtype=torch.float16)
    engine = betterhalf.side_report("engine", twice, compute_dtype=torch.float16, kv_dtype="fp16")
    found = betterhalf.contract(trainer, engine)
    assert not found.ok
    assert found.first_difference is not None
    assert found.first_difference.startswith("weight embed.weight is")
    assert betterhalf.contract(trainer, engine, allow_difference=True).ok


@pytest.mark.parametrize(
    ("compute", "kv", "words"),
    [
        ("bf16", "auto", "compute is fp16 in the trainer and bf16"),
        ("fp16", "bf16", "kv is fp16 in the trainer and bf16"),
    ],
)
def test_a_declared_format_that_differs_is_named(compute: str, kv: str, words: str) -> None:
    module = Tied()
    trainer = betterhalf.side_report("trainer", module, compute_dtype="fp16")
    engine = betterhalf.side_report("engine", held(module, torch.float16), compute_dtype=compute, kv_dtype=kv)
    assert words in str(betterhalf.contract(trainer, engine).first_difference)


def test_the_table_says_what_was_declared_and_shows_further_facts() -> None:
    module = Tied()
    trainer = betterhalf.side_report("trainer", module, compute_dtype="fp16", facts={"attention": "sdpa"})
    engine = betterhalf.side_report("engine", held(module, torch.float16), compute_dtype="fp16", kv_dtype="auto")
    table = betterhalf.contract(trainer, engine).table()
    assert "declared       compute                          compute, kv" in table
    assert "sdpa" in table


def test_reports_that_cannot_be_made_are_refused() -> None:
    module = Tied()
    with pytest.raises(InputError, match="an engine needs kv_dtype"):
        betterhalf.side_report("engine", module, compute_dtype="fp16")
    with pytest.raises(InputError, match="compute_dtype=fp8 is not a format. Use fp16, bf16, fp32"):
        betterhalf.side_report("trainer", module, compute_dtype="fp8")
    with pytest.raises(InputError, match="the trainer has no floating-point weights"):
        betterhalf.side_report("trainer", {"ids": torch.arange(3)}, compute_dtype="fp16")
    trainer = betterhalf.side_report("trainer", module, compute_dtype="fp16")
    with pytest.raises(InputError, match="the trainer and then the engine, but got trainer and trainer"):
        betterhalf.contract(trainer, trainer)
