"""Each rule of the doctor on a census made by hand, at its threshold and on either side."""

from __future__ import annotations

import math
from typing import Any

import pytest

from betterhalf.diagnostics.budget import Budget
from betterhalf.diagnostics.numerics import Census, Kind, Magnitudes, ModuleRange, Spot, module_range
from betterhalf.diagnostics.verdict import (
    MAX_AGREEING_K3,
    MAX_AGREEING_LOG_RATIO,
    MAX_MODULES,
    PairFinding,
    Verdict,
    cramped,
    engine_agreement,
    judge,
    overflowing,
    recommend,
)
from betterhalf.types import DtypeName

DOWN = "model.layers.1.mlp.down_proj"
UP = "model.layers.1.mlp.up_proj"
GOOD_VALUES = {
    "k3/mean": 1e-6,
    "prob_gap/max": 0.01,
    "prob_gap/min": -0.01,
    "ess_fraction": 0.99,
    "log_ratio/max_abs": 1e-3,
}


def row(module: str, kind: Kind, largest: float) -> ModuleRange:
    sizes = Magnitudes(max_abs=largest, nonzero=1, subnormal=(0, 0, 0), zeroed=(0, 0, 0))
    return module_range(Spot(module=module, kind=kind), sizes, "fp16", finite=True)


def census(*rows: ModuleRange, **changes: Any) -> Census:
    values: dict[str, Any] = {
        "dtype": "fp16",
        "ranges": rows or (row(DOWN, "forward", 10.0), row(DOWN, "gradient", 1e-3)),
        "first_forward": None,
        "first_backward": None,
        "largest_safe_loss_scale": 2.0**20,
        "loss_scale": 2.0**18,
        "zeroed_fraction": 0.001,
        "zeroed_fraction_unscaled": 0.05,
    }
    return Census(**{**values, **changes})


def pair(budget: Budget | None = None, failure: str | None = None, length: int = 64, **values: float) -> PairFinding:
    named = {key.replace("__", "/"): value for key, value in values.items()}
    return PairFinding(values={**GOOD_VALUES, **named}, budget=budget, response_length=length, failure=failure)


def budget(sigma2: float) -> Budget:
    return Budget(
        sigma2=sigma2, correlation=1.0, predicted_ess=1.0, observed_ess=1.0, max_length=math.log(2) / max(sigma2, 1e-30)
    )


def test_a_healthy_model_is_ok_and_says_by_how_much() -> None:
    verdict = judge(census(), pair(budget(1e-6)))
    assert verdict.verdict == "ok"
    assert verdict.modules == ()
    text = " ".join(verdict.reasons)
    assert "12.7 bits" in text and "2^20" in text and "0.10%" in text and "5.00%" in text and "1e-06" in text


def test_a_forward_overflow_is_unsafe_and_names_the_first_module() -> None:
    rows = (row(DOWN, "forward", 1e5), row("model.layers.1", "forward", 2e5), row("model.layers.2", "forward", 3e5))
    verdict = judge(census(*rows, first_forward=rows[0].spot), None)
    assert verdict.verdict == "unsafe"
    assert verdict.modules == (DOWN,)
    assert "forward pass" in verdict.reasons[0] and DOWN in verdict.reasons[0] and "1e+05" in verdict.reasons[0]


def test_other_modules_that_overflow_by_themselves_follow_worst_first() -> None:
    rows = [row(DOWN, "forward", 1e5), row("model.layers.2.mlp.gate_proj", "forward", 1e6)]
    rows += [row("model.layers.3.mlp.down_proj", "input", 1e7), row("model.layers.3.input_layernorm", "gradient", 1e9)]
    verdict = judge(census(*rows, first_forward=rows[0].spot), None)
    assert verdict.modules == (DOWN, "model.layers.3.mlp.down_proj", "model.layers.2.mlp.gate_proj")


def test_a_residual_stream_that_overflows_by_itself_is_named() -> None:
    spot = Spot(module="model.layers.1", kind="forward")
    verdict = judge(census(row(DOWN, "forward", 4e4), row(spot.module, "forward", 7e4), first_forward=spot), None)
    assert verdict.modules == ("model.layers.1",)


def test_at_most_ten_modules_are_named() -> None:
    rows = [row(f"model.layers.{n}.mlp.down_proj", "forward", 1e5 + n) for n in range(20)]
    assert len(judge(census(*rows, first_forward=rows[0].spot), None).modules) == MAX_MODULES


def test_a_backward_overflow_at_every_scale_is_unsafe_and_says_backward() -> None:
    rows = (row(UP, "backward", 7e4), row(UP, "forward", 1.0))
    verdict = judge(census(*rows, first_backward=rows[0].spot, largest_safe_loss_scale=0.5, zeroed_fraction=None), None)
    assert verdict.verdict == "unsafe"
    assert verdict.modules == (UP,)
    assert verdict.reasons[0].startswith("In the backward pass, the gradient with respect to the output of")


@pytest.mark.parametrize(("lost", "expected"), [(0.0099, "ok"), (0.01, "unsafe"), (0.2, "unsafe")])
def test_one_gradient_in_a_hundred_may_not_be_lost(lost: float, expected: str) -> None:
    verdict = judge(census(zeroed_fraction=lost, zeroed_modules=(UP,)), None)
    assert verdict.verdict == expected
    assert verdict.modules == ((UP,) if expected == "unsafe" else ())


@pytest.mark.parametrize(("largest", "expected"), [(16376.0, "ok"), (16400.0, "watch")])
@pytest.mark.parametrize("kind", ["forward", "input", "weight", "backward", "gradient"])
def test_two_bits_of_headroom_are_required(kind: Kind, largest: float, expected: str) -> None:
    verdict = judge(census(row(DOWN, kind, largest), row(UP, "forward", 1.0)), None)
    assert verdict.verdict == expected
    if expected == "watch":
        assert verdict.modules == (DOWN,)
        assert ("backward pass" in verdict.reasons[0]) == (kind in ("backward", "gradient"))


def test_little_headroom_of_the_residual_stream_is_blamed_on_the_branch_that_wrote_it() -> None:
    rows = (row(DOWN, "forward", 2e4), row("model.layers.1", "forward", 2.1e4))
    rows += (row("model.layers.2.post_attention_layernorm", "input", 2.1e4),)
    assert judge(census(*rows), None).modules == (DOWN,)
    assert cramped(census(*rows)) == (rows[0].spot,)
    assert cramped(census(*rows[1:]))[0] == rows[1].spot


@pytest.mark.parametrize(
    ("name", "healthy", "sick"),
    [
        ("k3__mean", 1e-3, 1.1e-3),
        ("prob_gap__max", 0.5, 0.6),
        ("prob_gap__min", -0.5, -0.6),
        ("ess_fraction", 0.5, 0.49),
        ("k3__mean", 1e-9, math.nan),
    ],
)
def test_a_mismatch_outside_its_band_gives_watch(name: str, healthy: float, sick: float) -> None:
    assert judge(census(), pair(**{name: healthy})).verdict == "ok"
    verdict = judge(census(), pair(**{name: sick}))
    assert verdict.verdict == "watch"
    assert name.replace("__", "/") in verdict.reasons[0]


def test_the_effective_sample_size_is_predicted_at_the_configured_length() -> None:
    assert judge(census(), pair(budget(1e-3), length=693)).verdict == "ok"
    verdict = judge(census(), pair(budget(1e-3), length=694))
    assert verdict.verdict == "watch"
    assert "694 tokens" in verdict.reasons[0] and "up to 693 tokens" in verdict.reasons[0]


def test_a_pair_that_cannot_run_is_unsafe() -> None:
    verdict = judge(census(), pair(failure="the logits are not finite."))
    assert verdict.verdict == "unsafe"
    assert verdict.reasons == ("The matched pair cannot be run in FP16: the logits are not finite.",)


def test_overflow_says_nothing_of_the_gradients_behind_it() -> None:
    rows = (row(DOWN, "forward", 1e5), row(UP, "backward", 1e9))
    found = overflowing(census(*rows, first_forward=rows[0].spot, first_backward=rows[1].spot))
    assert found == (rows[0].spot,)
    assert overflowing(census()) == ()


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ({"fp16": "ok", "bf16": "ok", "fp32": "ok"}, "fp16"),
        ({"fp16": "unsafe", "bf16": "ok", "fp32": "ok"}, "bf16"),
        ({"fp16": "watch", "bf16": "ok", "fp32": "ok"}, "bf16"),
        ({"fp16": "watch", "bf16": "watch", "fp32": "ok"}, "fp16"),
        ({"fp16": "unsafe", "bf16": "watch", "fp32": "unsafe"}, "bf16"),
        ({"fp16": "unsafe", "bf16": "unsafe", "fp32": "unsafe"}, "fp32"),
    ],
)
def test_a_half_precision_is_recommended_unless_both_are_unsafe(verdicts: dict[DtypeName, Any], expected: str) -> None:
    made = {name: Verdict(verdict=word, reasons=("because",), modules=()) for name, word in verdicts.items()}
    assert recommend(made) == expected


@pytest.mark.parametrize(
    ("k3", "largest", "agrees"),
    [
        (MAX_AGREEING_K3, MAX_AGREEING_LOG_RATIO, True),
        (2 * MAX_AGREEING_K3, 1e-4, False),
        (1e-9, 2 * MAX_AGREEING_LOG_RATIO, False),
        (math.nan, 1e-4, False),
    ],
)
def test_a_gap_that_fp32_does_not_explain_is_a_bug(k3: float, largest: float, agrees: bool) -> None:
    found = engine_agreement(pair(k3__mean=k3, log_ratio__max_abs=largest))
    assert found.agrees == agrees
    assert ("BUG" in found.reason and "--localize" in found.reason) == (not agrees)


def test_agreement_that_was_not_measured_is_unknown_not_a_bug() -> None:
    assert engine_agreement(None).agrees
    found = engine_agreement(pair(failure="the engine died"))
    assert found.agrees and "Unknown" in found.reason and "the engine died" in found.reason
