"""The distance of two gradients, and the spread of sequence weights, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from betterhalf.diagnostics import gradient_gap as module
from betterhalf.diagnostics.gradient_gap import gradient_gap, weight_spread

REFERENCE = {"a": torch.tensor([[3.0, 0.0], [4.0, 0.0]]), "b": torch.tensor([12.0])}
"""Norm 13; three entries are not zero."""


def test_a_gradient_against_itself_has_error_0_and_cosine_1_exactly() -> None:
    torch.manual_seed(0)
    gradients = {"w": torch.randn(317, 41), "v": torch.randn(11) * 1e-9}
    gap = gradient_gap(gradients.items(), gradients)
    assert (gap.relative_error, gap.cosine, gap.zeroed_fraction) == (0.0, 1.0, 0.0)


def test_error_and_cosine_are_those_of_all_parameters_together() -> None:
    other = {"a": torch.tensor([[0.0, 0.0], [4.0, 3.0]]), "b": torch.tensor([0.0])}
    gap = gradient_gap(other.items(), REFERENCE)
    assert gap.relative_error == pytest.approx(math.sqrt(9 + 9 + 144) / 13, rel=1e-15)
    assert gap.cosine == pytest.approx(16 / (5 * 13), rel=1e-15)


def test_zeroed_are_the_non_zero_entries_of_the_reference_that_are_zero_in_the_gradient() -> None:
    other = {"a": torch.tensor([[0.0, 7.0], [4.0, 0.0]]), "b": torch.tensor([12.0])}
    assert gradient_gap(other.items(), REFERENCE).zeroed_fraction == pytest.approx(1 / 3)


def test_the_loss_scale_is_divided_out_without_making_zeros() -> None:
    scaled = {name: value * 2.0**16 for name, value in REFERENCE.items()}
    gap = gradient_gap(scaled.items(), REFERENCE, scale=2.0**16)
    assert (gap.relative_error, gap.cosine, gap.zeroed_fraction) == (0.0, 1.0, 0.0)


def test_a_difference_that_float32_cannot_hold_is_seen() -> None:
    """Dividing by 3 in float32 would round, by 3e-8 of the norm; in float64 only float64's own error remains."""
    gap = gradient_gap([("w", torch.tensor([1.0, 1.0]))], {"w": torch.tensor([1.0, 1.0])}, scale=3.0)
    assert gap.relative_error == pytest.approx(2 / 3, rel=1e-15)


def test_pieces_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    one, two = torch.randn(10, 10), torch.randn(10, 10)
    monkeypatch.setattr(module, "_PIECE", 7)
    gap = gradient_gap([("w", one)], {"w": two})
    expected = float((one.double() - two.double()).norm() / two.double().norm())
    assert gap.relative_error == pytest.approx(expected, rel=1e-12)


def test_a_gradient_that_vanished_has_error_1_and_no_direction() -> None:
    gap = gradient_gap([("w", torch.zeros(3))], {"w": torch.tensor([1.0, 2.0, 0.0])})
    assert (gap.relative_error, gap.cosine, gap.zeroed_fraction) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("own", "reference"),
    [([math.inf], [1.0]), ([math.nan], [1.0]), ([1.0], [0.0]), ([1.0], [math.nan]), ([1.0, 2.0], [1.0, -math.inf])],
)
def test_what_cannot_be_compared_is_nan(own: list[float], reference: list[float]) -> None:
    gap = gradient_gap([("w", torch.tensor(own))], {"w": torch.tensor(reference)})
    assert math.isnan(gap.relative_error) and math.isnan(gap.cosine) and math.isnan(gap.zeroed_fraction)


def test_other_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="no gradient of c"):
        gradient_gap([("c", torch.ones(1))], REFERENCE)
    with pytest.raises(ValueError, match="1 gradients, and 2 in the reference"):
        gradient_gap([("b", torch.ones(1))], REFERENCE)


def test_equal_weights_keep_every_sequence() -> None:
    spread = weight_spread(torch.full((5,), math.log(2.0), dtype=torch.float64))
    assert spread.ess_fraction == pytest.approx(1.0) and spread.max_weight == pytest.approx(2.0)


def test_unequal_weights_count_as_fewer_sequences() -> None:
    """Weights 1, 1, 4: (6^2 / 18) / 3 = 2/3."""
    spread = weight_spread(torch.tensor([0.0, 0.0, math.log(4.0)], dtype=torch.float64))
    assert spread.ess_fraction == pytest.approx(2 / 3) and spread.max_weight == pytest.approx(4.0)


def test_weights_are_bounded_as_in_the_loss() -> None:
    assert weight_spread(torch.tensor([1000.0])).max_weight == pytest.approx(math.exp(20.0))
