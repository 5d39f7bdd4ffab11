"""Comparison of the experts of trainer and engine, and balance of load, by hand."""

from __future__ import annotations

import pytest
import torch

from betterhalf.diagnostics.experts import (
    ExpertLayer,
    change_metrics,
    changed_tokens,
    expert_counts,
    expert_layers,
    joined,
    load_metrics,
)
from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.metrics.names import check_known

TRAINER = torch.tensor([[[0, 1], [2, 3]], [[1, 0], [2, 3]], [[4, 1], [3, 0]], [[2, 0], [1, 0]]], dtype=torch.uint8)
"""Four tokens, two layers, two of five experts."""
ENGINE = torch.tensor([[[1, 0], [3, 2]], [[1, 0], [2, 1]], [[0, 1], [3, 1]], [[2, 0], [0, 1]]], dtype=torch.uint8)
"""Other order in the first token; another expert in the first layer of one token, and in the second of two."""


def test_sets_of_experts_are_compared_whatever_their_order() -> None:
    assert change_metrics(changed_tokens(TRAINER, ENGINE)) == pytest.approx(
        {
            "experts/change_fraction/mean": (1 / 4 + 2 / 4) / 2,
            "experts/change_fraction/max_layer": 2 / 4,
            "experts/change_fraction/any_layer": 2 / 4,
        }
    )
    assert set(change_metrics(changed_tokens(TRAINER, TRAINER)).values()) == {0.0}


def test_load_is_relative_to_an_even_one() -> None:
    counts = expert_counts(TRAINER, 5)
    assert counts.tolist() == [[3, 3, 1, 0, 1], [2, 1, 2, 3, 0]]
    # Eight choices of five experts: 1.6 each. No token chose expert 3 in the first layer, nor 4 in the second.
    assert load_metrics(counts) == pytest.approx(
        {"experts/load/mean": 3 / 1.6, "experts/load/max": 3 / 1.6, "experts/unused_fraction": 2 / 10}
    )


def test_each_layer_has_its_own_changes_load_and_unused_experts() -> None:
    counts = expert_counts(TRAINER, 5)
    assert expert_layers(counts, changed_tokens(TRAINER, ENGINE)) == (
        ExpertLayer(change_fraction=1 / 4, load=3 / 1.6, unused=1),
        ExpertLayer(change_fraction=2 / 4, load=3 / 1.6, unused=1),
    )
    assert [layer.change_fraction for layer in expert_layers(counts, None)] == [None, None]


def test_packs_of_different_formats_are_joined_and_every_metric_is_listed() -> None:
    assert joined([TRAINER, ENGINE.to(torch.int16)]).shape == (8, 2, 2)
    names = {**change_metrics(changed_tokens(TRAINER, ENGINE)), **load_metrics(expert_counts(TRAINER, 5))}
    check_known(dict.fromkeys(names, 0.0))
    assert CATALOGUE["experts/change_fraction/mean"].band == (None, 0.05)
