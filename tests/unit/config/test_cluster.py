"""The sections `[cluster]` and `[pipeline]`: what they accept, and the fix that each refusal names."""

from __future__ import annotations

import json

import pytest

from betterhalf.config.cluster import ClusterConfig
from betterhalf.config.load import config_difference, load_config, resolved_json
from betterhalf.config.schema import RunConfig
from betterhalf.errors import ConfigError

RAY = ("cluster.backend=ray",)


def test_the_default_is_one_process_and_no_overlap() -> None:
    config = RunConfig()
    assert (config.cluster.backend, config.cluster.trainers, config.cluster.engines) == ("local", 1, 1)
    assert config.cluster.max_restarts == 3
    assert config.pipeline.max_staleness == 0


def test_two_ranks_and_two_engines_differ_from_one_process_in_the_cluster_alone() -> None:
    large = load_config(None, [*RAY, "cluster.trainers=2", "cluster.engines=2", "cluster.address=auto"])
    changed = [change.key for change in config_difference(RunConfig(), large)]
    assert changed == ["cluster.address", "cluster.backend", "cluster.engines", "cluster.trainers"]
    assert RunConfig.model_validate(json.loads(json.dumps(resolved_json(large)))) == large


def test_threads_follow_the_cpus_unless_they_are_set() -> None:
    cluster = load_config(None, [*RAY, "cluster.trainer.cpus=4", "cluster.engine.threads=2"]).cluster
    assert (cluster.trainer_threads, cluster.engine_threads) == (4, 2)


def test_separate_processes_add_up_and_colocated_ones_share() -> None:
    ranks, engines = {"cpus": 2, "gpus": 0.5}, {"cpus": 3, "gpus": 0.5}
    sizes = {"backend": "ray", "trainers": 4, "engines": 2, "trainer": ranks, "engine": engines}
    assert ClusterConfig.model_validate(sizes).needed_cpus == 4 * 2 + 2 * 3
    shared = ClusterConfig.model_validate({**sizes, "placement": "colocated"})
    assert shared.needed_cpus == 4 * 3
    assert shared.needed_gpus == 4 * 0.5 + 2 * 0.5


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "head.example.org:6379", "[::1]:6379"])
def test_addresses_of_a_cluster(address: str) -> None:
    assert load_config(None, [*RAY, f"cluster.address={address}"]).cluster.address == address


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.trainers=2"], "cluster.trainers needs cluster.backend=ray"),
        (["cluster.address=auto"], "cluster.address needs cluster.backend=ray"),
        (["cluster.trainer.gpus=1"], "cluster.trainer needs cluster.backend=ray"),
        ([*RAY, "cluster.engines=0"], "cluster.engines = 0 must be at least 1."),
        ([*RAY, "cluster.trainers=0"], "cluster.trainers = 0 must be at least 1."),
        ([*RAY, "cluster.trainer.gpus=2"], "cluster.trainer.gpus = 2 must be at most 1."),
        ([*RAY, "cluster.engine.gpus=1.5"], "Set cluster.engine.gpus=1."),
        ([*RAY, "cluster.address=head"], 'cluster.address = "head" is not an address. Give HOST:PORT'),
        ([*RAY, "cluster.address=10.0.0.1:70000"], "is not an address"),
        ([*RAY, "cluster.address=ray://head:10001"], "Start betterhalf on a host of the cluster"),
        ([*RAY, "cluster.backend=slurm"], 'cluster.backend = "slurm" is not one of local, ray.'),
        (
            [*RAY, "cluster.trainer=2"],
            "cluster.trainer is a section. Set one of its keys, such as cluster.trainer.cpus.",
        ),
        (
            [*RAY, "cluster.placement=colocated", "cluster.engines=2"],
            "exceeds cluster.trainers=1. Lower cluster.engines",
        ),
        ([*RAY, "cluster.placement=colocated", "cluster.trainer.gpus=1"], "Set both above 0 or both to 0"),
        (
            [*RAY, "cluster.placement=colocated", "cluster.trainer.gpus=1", "cluster.engine.gpus=1"],
            "add up to more than 1. Set 0.5 and 0.5.",
        ),
        ([*RAY, "cluster.call_seconds=5", "cluster.collective_seconds=5"], "Lower cluster.collective_seconds."),
        (
            [*RAY, "cluster.trainers=65"],
            "cluster.trainers=65 exceeds the 64 rollouts of an optimizer step",
        ),
        (
            [*RAY, "cluster.engines=1000"],
            "cluster.engines=1000 exceeds the 32 prompts of a step, and one engine samples all completions",
        ),
        ([*RAY, "cluster.trainers=2", "precision=e8m4"], "cannot gather them in the emulated format e8m4"),
        ([*RAY, "device=cpu", "cluster.trainer.gpus=1"], "device=cpu contradicts"),
        ([*RAY, "cluster.engine.gpus=2"], "engine=vllm with engine.tensor_parallel_size=2."),
        (
            [*RAY, "engine=vllm", "engine.tensor_parallel_size=2", "cluster.engine.gpus=1"],
            "does not fit an engine that uses 2 GPUs. Set cluster.engine.gpus=2",
        ),
        (["pipeline.max_staleness=1"], "Set cluster.backend=ray and cluster.placement=separate"),
        ([*RAY, "cluster.placement=colocated", "pipeline.max_staleness=1"], "or pipeline.max_staleness=0."),
        ([*RAY, "pipeline.max_staleness=2"], "pipeline.max_staleness = 2 must be at most 1."),
    ],
)
def test_what_cannot_work_is_refused_with_its_fix(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, overrides)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [*RAY, "cluster.trainers=64", "cluster.engines=8"],
        [*RAY, "cluster.placement=colocated", "cluster.trainer.gpus=0.5", "cluster.engine.gpus=0.5"],
        [*RAY, "engine=vllm", "engine.tensor_parallel_size=2", "cluster.engine.gpus=2"],
        [*RAY, "pipeline.max_staleness=1"],
        [*RAY, "cluster.trainers=1", "precision=e8m4"],
    ],
)
def test_what_can_work_is_accepted(overrides: list[str]) -> None:
    assert load_config(None, overrides).cluster.backend == "ray"
