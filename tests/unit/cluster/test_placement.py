"""Slots and bundles of a run: separate processes add up, colocated ones share what their rank reserves."""

from __future__ import annotations

from typing import Any

import pytest

from betterhalf.cluster.placement import placement_of
from betterhalf.config.cluster import ClusterConfig


def cluster(**settings: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"backend": "ray", **settings})


def test_separate_processes_have_a_bundle_each_with_their_own_threads() -> None:
    settings = {"trainers": 2, "engines": 1, "trainer": {"cpus": 2, "gpus": 1}, "engine": {"cpus": 3, "threads": 5}}
    placed = placement_of(cluster(**settings))
    assert [(slot.bundle, slot.cpus, slot.gpus, slot.threads) for slot in placed.ranks] == [(0, 2, 1, 2), (1, 2, 1, 2)]
    assert [(slot.bundle, slot.cpus, slot.gpus, slot.threads) for slot in placed.engines] == [(2, 3, 0, 5)]
    assert [dict(bundle) for bundle in placed.bundles] == [{"CPU": 2, "GPU": 1}, {"CPU": 2, "GPU": 1}, {"CPU": 3}]


def test_a_colocated_engine_is_in_the_bundle_of_its_rank_and_takes_no_cpu_of_its_own() -> None:
    settings = {"placement": "colocated", "trainers": 2, "engines": 1}
    settings |= {"trainer": {"cpus": 1, "gpus": 0.5}, "engine": {"cpus": 4, "gpus": 0.3}}
    placed = placement_of(cluster(**settings))
    assert [(slot.bundle, slot.cpus, slot.gpus, slot.threads) for slot in placed.engines] == [(0, 0, 0.3, 4)]
    assert [dict(bundle) for bundle in placed.bundles] == [{"CPU": 4, "GPU": 0.8}, {"CPU": 4, "GPU": 0.5}]


@pytest.mark.parametrize("placement", ["separate", "colocated"])
@pytest.mark.parametrize("gpus", [0, 0.1, 0.5])
def test_the_bundles_hold_what_the_configuration_says_that_it_needs(placement: str, gpus: float) -> None:
    settings = cluster(
        placement=placement, trainers=3, engines=3, trainer={"cpus": 2, "gpus": gpus}, engine={"gpus": gpus}
    )
    placed = placement_of(settings)
    assert placed.totals() == {"CPU": settings.needed_cpus, "GPU": pytest.approx(settings.needed_gpus)}
    for slots in (placed.ranks, placed.engines):
        for slot in slots:
            assert slot.cpus <= placed.bundles[slot.bundle]["CPU"]
            assert slot.gpus <= placed.bundles[slot.bundle].get("GPU", 0.0)
