"""Loss scalers: the history of the scale, the statistics of unscaling, and giving up."""

from __future__ import annotations

import itertools
import json
import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from betterhalf.config.schema import LossScaleConfig
from betterhalf.distributed.world import SingleProcess
from betterhalf.errors import CheckpointError, LossScaleError
from betterhalf.precision.loss_scaler import (
    DynamicLossScaler,
    LossScaler,
    NullLossScaler,
    UnscaleReport,
    build_loss_scaler,
)

FP16_TINY = 2.0**-14


def dynamic(**settings: Any) -> LossScaler:
    return build_loss_scaler(LossScaleConfig(**settings), "fp16")


def grad_scaler_history(settings: dict[str, Any], overflows: list[bool]) -> list[float]:
    """Return the scales of torch.amp.GradScaler with an optimizer of one parameter."""
    reference = torch.amp.GradScaler("cpu", **settings)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    reference.scale(torch.zeros(()))
    scales = []
    for overflow in overflows:
        weight.grad = torch.full((1,), torch.inf if overflow else 1.0)
        reference.step(optimizer)
        reference.update()
        scales.append(reference.get_scale())
    return scales


@pytest.mark.parametrize("batch", range(10))
def test_random_histories_equal_those_of_torch_grad_scaler(batch: int) -> None:
    for seed in range(batch * 50, batch * 50 + 50):
        draw = random.Random(seed)
        factors = {
            "growth_factor": draw.choice([2.0, 1.5, 1.1, 4.0]),
            "backoff_factor": draw.choice([0.5, 0.7, 0.25]),
            "growth_interval": draw.randint(1, 6),
        }
        initial = draw.choice([2.0**16, 1.0, 3.7, 2.0**120])
        chance = draw.choice([0.0, 0.1, 0.5])
        overflows = [draw.random() < chance for _ in range(40)]
        scaler = dynamic(initial=initial, floor=0.0, hysteresis=1, **factors)
        scales = []
        for overflow in overflows:
            scaler.update(overflow)
            scales.append(scaler.scale)
        assert scales == grad_scaler_history({"init_scale": initial, **factors}, overflows)


def test_only_fp16_gets_a_dynamic_scaler() -> None:
    config = LossScaleConfig()
    kinds = [type(build_loss_scaler(config, name)) for name in ("fp16", "bf16", "fp32")]
    assert kinds == [DynamicLossScaler, NullLossScaler, NullLossScaler]


def test_a_forced_overflow_halves_the_scale_and_names_the_parameter() -> None:
    scaler = dynamic()
    grads = {"a": torch.ones(3), "b": torch.tensor([1.0, torch.inf]), "c": torch.tensor([torch.nan])}
    report = scaler.unscale(grads.items())
    scaler.update(report.found_inf)
    assert report.found_inf and report.first_offender == "b"
    assert report.overflow_fraction == 2 / 6
    assert scaler.scale == 2.0**15


def test_the_first_offender_follows_the_order_given() -> None:
    bad, good = torch.tensor([torch.nan]), torch.ones(2)
    assert dynamic().unscale([("z", bad.clone()), ("a", bad.clone())]).first_offender == "z"
    assert dynamic().unscale([("a", good), ("z", bad.clone()), ("b", bad.clone())]).first_offender == "z"


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, 2**19 - 1, 2**19, 2**19 + 5])
def test_one_broken_entry_is_found_wherever_it_is(value: float, place: int) -> None:
    grad = torch.full((2**19 + 6,), 0.5)
    grad[place] = value
    report = dynamic(initial=4.0).unscale([("weight", grad)])
    assert report.found_inf and report.overflow_fraction == 1 / grad.numel()
    assert grad[1].item() == 0.125


def test_gradients_are_divided_by_the_scale_in_place() -> None:
    scaler = dynamic(initial=1024.0)
    matrix, strided = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3).t()
    report = scaler.unscale([("m", matrix), ("s", strided), ("empty", torch.empty(0))])
    assert torch.equal(matrix, torch.arange(6.0).view(2, 3) / 1024)
    assert torch.equal(strided, torch.arange(6.0).view(2, 3).t() / 1024)
    assert not report.found_inf and report.first_offender is None


def test_huge_finite_gradients_do_not_count_as_infinite() -> None:
    grad = torch.full((64,), torch.finfo(torch.float32).max)
    report = dynamic(initial=2.0).unscale([("weight", grad)])
    assert not report.found_inf and report.overflow_fraction == 0.0


@pytest.mark.parametrize("scaler", [dynamic(initial=2.0**10), build_loss_scaler(LossScaleConfig(), "fp32")])
def test_subnormal_entries_are_counted_among_those_that_are_not_zero_and_zeros_among_all(scaler: LossScaler) -> None:
    tiny = FP16_TINY if isinstance(scaler, DynamicLossScaler) else 2.0**-126
    grad = torch.tensor([0.0, 0.0, tiny / 2, -tiny / 2, tiny, -tiny, 1.0, tiny * 0.999])
    report = scaler.unscale([("a", grad), ("b", torch.tensor([2.0, -0.0]))])
    assert report.subnormal_fraction == 3 / 7
    assert report.zero_fraction == 3 / 10


@pytest.mark.parametrize("max_norm", [1.0, 1e6, None])
def test_the_norm_is_that_of_the_unscaled_gradients_and_is_clipped(max_norm: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(40, 30, generator=generator), torch.randn(7, generator=generator), torch.zeros(2)]
    scaled = [x * 1024.0 for x in plain]
    report = dynamic(initial=1024.0).unscale(list(zip("abc", scaled, strict=True)), max_norm=max_norm)
    parameters = [torch.nn.Parameter(torch.zeros_like(x)) for x in plain]
    for parameter, gradient in zip(parameters, plain, strict=True):
        parameter.grad = gradient.clone()
    expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
    assert report.norm == pytest.approx(float(expected), rel=1e-6)
    for found, parameter in zip(scaled, parameters, strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-6, atol=0)


def test_a_norm_whose_squares_leave_fp32_is_still_a_number() -> None:
    gradient = torch.tensor([3e25, 4e25])
    report = dynamic(initial=1.0).unscale([("w", gradient)], max_norm=1.0)
    assert report.norm == pytest.approx(5e25) and not report.found_inf and report.overflow_fraction == 0.0
    torch.testing.assert_close(gradient, torch.tensor([0.6, 0.8]))


def test_a_broken_gradient_has_no_norm_and_is_not_clipped() -> None:
    good = torch.tensor([3.0, 4.0])
    report = dynamic(initial=2.0).unscale([("a", good), ("b", torch.tensor([torch.inf]))], max_norm=1.0)
    assert math.isnan(report.norm) and good.tolist() == [1.5, 2.0]


def test_entries_that_a_small_loss_scale_turns_to_zero_are_distinguished_from_subnormal_ones() -> None:
    """Gradient entries of 2^-30 to 2^-11: in FP16, 2^-25 and less becomes zero, and the rest below 2^-14 subnormal."""
    exact = 2.0 ** -torch.arange(11.0, 31.0)
    for scale, subnormal, zero in ((1.0, 10 / 14, 6 / 20), (2.0**6, 10 / 20, 0.0), (2.0**16, 0.0, 0.0)):
        half = (exact * scale).half().float()
        report = dynamic(initial=scale).unscale([("w", half)])
        assert (report.subnormal_fraction, report.zero_fraction) == (subnormal, zero)


def test_gradients_that_are_all_zero_have_no_subnormal_entries() -> None:
    report = dynamic().unscale([("a", torch.zeros(4))])
    assert (report.subnormal_fraction, report.overflow_fraction, report.found_inf) == (0.0, 0.0, False)
    assert report.zero_fraction == 1.0
    assert dynamic().unscale([]).zero_fraction == 0.0


def test_gradients_that_are_not_finite_are_not_zero() -> None:
    report = dynamic().unscale([("a", torch.tensor([torch.nan, torch.inf, 0.0, 1.0]))])
    assert report.zero_fraction == 0.25


def test_the_null_scaler_leaves_gradients_alone_and_still_finds_nan() -> None:
    scaler = build_loss_scaler(LossScaleConfig(), "bf16")
    grad = torch.tensor([1.0, torch.nan])
    report = scaler.unscale([("w", grad)])
    scaler.update(report.found_inf)
    assert report.found_inf and report.first_offender == "w" and scaler.scale == 1.0
    assert grad[0].item() == 1.0


def test_half_gradients_are_refused() -> None:
    with pytest.raises(AssertionError, match="not FP32"):
        dynamic().unscale([("w", torch.ones(2, dtype=torch.float16))])


class Ranks:
    """Threads that stand for ranks and reduce tensors among themselves."""

    def __init__(self, count: int) -> None:
        self.barrier, self.given = threading.Barrier(count, timeout=60), [torch.empty(0)] * count

    def of(self, rank: int) -> OneOfSeveral:
        return OneOfSeveral(self, rank)


class OneOfSeveral:
    """The collective of one of these threads."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank = ranks, rank

    def gather(self, values: Tensor) -> tuple[Tensor, ...]:
        self.ranks.given[self.rank] = values.clone()
        self.ranks.barrier.wait()
        gathered = tuple(self.ranks.given)
        self.ranks.barrier.wait()
        return gathered

    def max_(self, values: Tensor) -> None:
        values.copy_(torch.stack(self.gather(values)).amax(0))

    def sum_(self, values: Tensor) -> None:
        values.copy_(torch.stack(self.gather(values)).sum(0))


class Replica(SingleProcess):
    """One of several ranks that hold the same: its sum over the shards of one replica does nothing."""


Named = list[tuple[str, Tensor]]


def on_ranks(shards: list[Named], kind: Any, **settings: Any) -> list[UnscaleReport]:
    """Unscale one shard on each rank, in place."""
    ranks = Ranks(len(shards))

    def unscale(rank: int) -> UnscaleReport:
        scaler = build_loss_scaler(LossScaleConfig(initial=256.0), kind)
        return scaler.unscale(shards[rank], ranks.of(rank), **settings)

    with ThreadPoolExecutor(len(shards)) as pool:
        return list(pool.map(unscale, range(len(shards))))


def shards(broken: bool = False) -> list[Named]:
    """Return two unequal shards, and an empty one."""
    generator = torch.Generator().manual_seed(3)
    big = [("a", 900 * torch.randn(30, 7, generator=generator)), ("b", torch.full((5,), FP16_TINY / 2))]
    small = [("c", torch.tensor([0.0, 1e-6, torch.inf if broken else 2.0]))]
    return [big, small, []]


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("max_norm", [1.0, None])
@pytest.mark.parametrize("broken", [False, True])
def test_ranks_with_shards_clip_and_report_as_one_process_with_all_of_them(
    kind: Any, max_norm: float | None, broken: bool
) -> None:
    parts, together = shards(broken), [pair for shard in shards(broken) for pair in shard]
    reports = on_ranks(parts, kind, max_norm=max_norm)
    alone = build_loss_scaler(LossScaleConfig(initial=256.0), kind).unscale(together, max_norm=max_norm)
    for report in reports:
        assert report.found_inf == alone.found_inf == broken
        assert report.norm == pytest.approx(alone.norm, rel=1e-14, nan_ok=True)
        assert report.subnormal_fraction == alone.subnormal_fraction
        assert report.zero_fraction == alone.zero_fraction
        assert report.overflow_fraction == alone.overflow_fraction
    assert len({str(report.norm) for report in reports}) == 1
    assert [report.first_offender for report in reports] == (["c"] * 3 if broken else [None] * 3)
    for (_, found), (_, expected) in zip([pair for shard in parts for pair in shard], together, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


def test_replicas_do_not_add_up() -> None:
    """Each replica holds the whole gradient, so its all-reduce of sums does nothing."""
    one, alone = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])
    report = dynamic(initial=1.0).unscale([("w", one)], Replica(), max_norm=1.0)
    assert report.norm == dynamic(initial=1.0).unscale([("w", alone)], max_norm=1.0).norm == 5.0
    assert torch.equal(one, alone)


def test_the_loss_is_scaled_and_stays_differentiable() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    scaler = dynamic(initial=8.0)
    scaler.scale_loss(2 * weight).backward()
    assert weight.grad is not None and weight.grad.item() == 16.0
    assert build_loss_scaler(LossScaleConfig(), "bf16").scale_loss(2 * weight).item() == 6.0


@pytest.mark.parametrize(
    "loss", [torch.ones(1), torch.ones((), dtype=torch.float16), torch.ones((), dtype=torch.float64)]
)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_loss_that_is_not_an_fp32_scalar_is_refused(loss: Tensor, dtype: Any) -> None:
    with pytest.raises(AssertionError, match="FP32 scalar"):
        build_loss_scaler(LossScaleConfig(), dtype).scale_loss(loss)


def history(scaler: LossScaler, overflows: str) -> list[float]:
    """Return the scale after each step; 'x' is an overflow, '.' a clean step."""
    scales = []
    for mark in overflows:
        scaler.update(mark == "x")
        scales.append(scaler.scale)
    return scales


def by_deepspeeds_rules(overflows: str, hysteresis: int, growth_interval: int, consecutive: bool) -> list[float]:
    """Return the scales according to DeepSpeed's documentation.

    Each overflow uses up one of `hysteresis` attempts; with one attempt left the scale is halved instead. Attempts are
    restored when the scale grows, which it does after `growth_interval` steps without an overflow, and with
    `consecutive_hysteresis` by every step without one.
    """
    scale, attempts, last_overflow, scales = 2.0**16, hysteresis, -1, []
    for step, mark in enumerate(overflows):
        if mark == "x":
            scale, attempts = (scale / 2, attempts) if attempts == 1 else (scale, attempts - 1)
            last_overflow = step
        else:
            grows = (step - last_overflow) % growth_interval == 0
            attempts = hysteresis if grows or consecutive else attempts
            scale *= 2 if grows else 1
        scales.append(scale)
    return scales


HISTORIES = ["".join(marks) for marks in itertools.product(".x", repeat=10)]


@pytest.mark.parametrize("growth_interval", [2, 3, 400])
@pytest.mark.parametrize("hysteresis", [1, 2, 3])
@pytest.mark.parametrize("consecutive", [False, True])
def test_all_1024_histories_of_ten_steps_are_deepspeeds(
    consecutive: bool, hysteresis: int, growth_interval: int
) -> None:
    settings = {"hysteresis": hysteresis, "growth_interval": growth_interval}
    for marks in HISTORIES:
        found = history(dynamic(**settings, consecutive_hysteresis=consecutive), marks)
        assert found == by_deepspeeds_rules(marks, hysteresis, growth_interval, consecutive), marks


def test_by_default_overflows_need_not_be_in_a_row() -> None:
    """That is DeepSpeed's default too."""
    assert history(dynamic(initial=16.0, hysteresis=2), "x.xxx.x") == [16.0, 16.0, 8.0, 4.0, 2.0, 2.0, 1.0]


def test_consecutive_hysteresis_lowers_the_scale_from_the_second_overflow_in_a_row() -> None:
    scaler = dynamic(initial=16.0, hysteresis=2, consecutive_hysteresis=True)
    assert history(scaler, "x.xxx.x") == [16.0, 16.0, 16.0, 8.0, 4.0, 4.0, 4.0]


def test_the_scale_of_a_run_that_overflows_every_second_step_falls_by_default() -> None:
    every_second = "x." * 10
    assert history(dynamic(hysteresis=2), every_second)[-1] == 2.0**7
    assert history(dynamic(hysteresis=2, consecutive_hysteresis=True), every_second)[-1] == 2.0**16


def test_without_hysteresis_both_rules_are_one() -> None:
    for marks in HISTORIES:
        settings = {"hysteresis": 1, "growth_interval": 3}
        assert history(dynamic(**settings), marks) == history(dynamic(**settings, consecutive_hysteresis=True), marks)


def test_a_state_of_version_0_1_is_read() -> None:
    scaler = dynamic(hysteresis=2)
    scaler.load_state_dict({"scale": 8.0, "clean_steps": 3, "overflows_in_row": 1, "skips_at_floor": 0})
    assert history(scaler, "x") == [4.0]


def test_every_overflow_restarts_the_count_of_clean_steps() -> None:
    scaler = dynamic(initial=16.0, hysteresis=2, consecutive_hysteresis=True, growth_interval=3)
    assert history(scaler, "..x..x...") == [16.0] * 8 + [32.0]


def test_the_scale_stops_at_the_floor() -> None:
    assert history(dynamic(initial=3.0, floor=2.0), "xx.") == [2.0, 2.0, 2.0]


def test_growth_stops_before_infinity() -> None:
    assert history(dynamic(initial=2.0**126, growth_interval=1), "..") == [2.0**127, 2.0**127]


def test_without_a_floor_the_scale_never_reaches_zero() -> None:
    scaler = dynamic(initial=2.0**-124, floor=0.0, max_skips_at_floor=3)
    assert history(scaler, "xxxx") == [2.0**-125, 2.0**-126, 2.0**-126, 2.0**-126]


def test_too_many_skips_in_a_row_at_the_floor_end_the_run_with_a_fix() -> None:
    scaler = dynamic(initial=2.0, floor=1.0, max_skips_at_floor=3)
    history(scaler, "xxx.xx")
    scaler.unscale([("layers.3.weight", torch.tensor([torch.inf]))])
    with pytest.raises(LossScaleError, match=r"3 optimizer steps.*layers\.3\.weight.*learning_rate"):
        scaler.update(True)


def test_the_null_scaler_gives_up_as_well() -> None:
    scaler = build_loss_scaler(LossScaleConfig(max_skips_at_floor=2), "bf16")
    history(scaler, "x.x")
    with pytest.raises(LossScaleError, match="2 optimizer steps"):
        scaler.update(True)


@pytest.mark.parametrize("consecutive", [False, True])
def test_a_scaler_restored_through_json_continues_the_same_history(consecutive: bool) -> None:
    draw = random.Random(5)
    marks = "".join(draw.choice("..x") for _ in range(60))
    settings: dict[str, Any] = {"hysteresis": 2, "growth_interval": 3, "growth_factor": 1.7, "initial": 5.3}
    settings["consecutive_hysteresis"] = consecutive
    whole, first = dynamic(**settings), dynamic(**settings)
    expected = history(whole, marks)
    history(first, marks[:29])
    second = dynamic(**settings)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert history(second, marks[29:]) == expected[29:]


def test_skips_at_the_floor_are_part_of_the_state() -> None:
    for dtype in ("fp16", "bf16"):
        config = LossScaleConfig(initial=1.0, max_skips_at_floor=2)
        first, second = build_loss_scaler(config, dtype), build_loss_scaler(config, dtype)  # type: ignore[arg-type]
        first.update(True)
        second.load_state_dict(first.state_dict())
        with pytest.raises(LossScaleError):
            second.update(True)


def test_the_state_of_another_kind_of_scaler_is_refused() -> None:
    state = build_loss_scaler(LossScaleConfig(), "bf16").state_dict()
    with pytest.raises(CheckpointError, match="resume with the precision"):
        dynamic().load_state_dict(state)
