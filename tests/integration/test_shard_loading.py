"""Ranks read their own rows of a model's files: no rank holds the whole, and the values are those of the whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from tests.model_folders import VOCABULARY, as_bin, write_model
from tests.ranks import run_ranks
from tests.tiny_models import tiny_config
from torch import Tensor
from torch import distributed as dist

from betterhalf.cluster.rank_process import RankFacts, RankProcess
from betterhalf.config.schema import ModelConfig, RunConfig
from betterhalf.distributed.group import GroupCollective
from betterhalf.models.description import describe_model
from betterhalf.models.loading import LoadedModel, load_weights
from betterhalf.models.skeleton import skeleton
from betterhalf.setup.trained_policy import TrainedPolicy
from betterhalf.training.shards import write_manifest, write_shards

MIB = 2**20
RANKS = 3
"""Number of ranks; 32 rows, and 1,024, leave fewer to the last."""
LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
}
"""About 100 million parameters: 384 MiB in FP32."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """One rank after its start."""

    facts: RankFacts
    state: dict[str, Tensor]
    buffers: dict[str, Tensor]
    version: int


def config_of(folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": str(folder)},
            "device": "cpu",
            "precision": {"preset": "fp32"},
            "cluster": {"backend": "ray", "trainers": RANKS},
        }
    )


def started(
    ranks: GroupCollective, folder: Path, trained: Any = None, *, restores: bool = False
) -> tuple[RankFacts, RankProcess]:
    """Load and build one rank as the controller does, in the group that the test has joined."""
    rank = RankProcess(config_of(folder), keep_reference=False, trained=trained)
    facts = rank.load(ranks.rank)
    sent = [facts.model_config]
    dist.broadcast_object_list(sent, src=0)
    with patch("betterhalf.cluster.rank_process.join", lambda membership, device: ranks):
        rank.build(ranks.membership, sent[0], restores)
    return facts, rank


def build(ranks: GroupCollective, folder: Path, trained: Any = None, *, restores: bool = False) -> Built:
    facts, rank = started(ranks, folder, trained, restores=restores)
    trainer = rank._trainer
    return Built(
        facts=facts,
        state={name: tensor.clone() for name, tensor in trainer.weights.state().items()},
        buffers={name: buffer.clone() for name, buffer in trainer.module.named_buffers()},
        version=trainer.policy_version,
    )


def resident(name: str) -> int:
    """Return VmRSS or VmHWM, the memory of this process now or at its peak, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def added_memory(ranks: GroupCollective, folder: Path) -> tuple[int, bool]:
    """Return the memory that the start of a rank adds at its peak, and whether its masters are the rows of the files.

    The start of a tiny model before loads the code.
    """
    Path("/proc/self/clear_refs").write_text("5")  # lowers VmHWM to VmRSS
    before = resident("VmRSS")
    _, rank = started(ranks, folder)
    added = resident("VmHWM") - before
    weights = rank._trainer.weights
    held, ranges = weights.state(), weights.ranges()
    equal, seen = True, set()
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            equal &= torch.equal(held[name], tensor[ranges[name].rows].float())
            seen.add(name)
    return added, equal and seen == held.keys()


def run_all(ranks: GroupCollective, folders: dict[str, Path], trained: Callable[[], TrainedPolicy]) -> dict[str, Any]:
    found: dict[str, Any] = {name: build(ranks, folder) for name, folder in folders.items() if name != "large"}
    found["trained"] = build(ranks, folders["experts"], trained)
    found["restored"] = build(ranks, folders["tied"], restores=True)
    found["large"] = added_memory(ranks, folders["large"]) if sys.platform == "linux" else None
    return found


class Results:
    """Results of all ranks, which run every case in the same processes."""

    def __init__(self, base: Path, write_gguf: Callable[..., Path]) -> None:
        self.folders = {
            "tied": write_model(base / "tied", "qwen3", head_dim=4, tie_word_embeddings=True),
            "bf16": write_model(base / "bf16", dtype=torch.bfloat16, tie_word_embeddings=False),
            "experts": write_model(
                base / "experts", "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
            ),
            "bin": as_bin(write_model(base / "bin", dtype=torch.bfloat16)),
            "gguf": write_gguf(base / "small.gguf"),
            "large": write_model(base / "large", dtype=torch.bfloat16, shard="40MB", **LARGE),
        }
        write_trained(base / "checkpoint", self.folders["experts"])
        self.ranks = run_ranks(run_all, RANKS, self.folders, partial(trained_policy, base / "checkpoint"))

    def joined(self, name: str) -> dict[str, Tensor]:
        """Return the rows of all ranks together."""
        parts = [found[name].state for found in self.ranks]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def trained_policy(folder: Path) -> TrainedPolicy:
    return TrainedPolicy(step=5, policy_version=4, path=folder, base_digest="", source="the checkpoint")


def write_trained(folder: Path, model: Path) -> None:
    """Write a checkpoint of one rank, with the weights of the model's files plus 1."""
    folder.mkdir()
    weights = {name: parameter.detach() + 1 for name, parameter in whole_of(model).module.named_parameters()}
    write_manifest(folder, (write_shards(folder, "model", weights, {}),))


def whole_of(folder: Path) -> LoadedModel:
    return load_weights(describe_model(ModelConfig(name=str(folder))))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, write_gguf: Callable[..., Path]) -> Results:
    return Results(tmp_path_factory.mktemp("models"), write_gguf)


@pytest.mark.parametrize("name", ["tied", "bf16", "experts", "bin", "gguf"])
def test_masters_of_all_ranks_are_the_weights_of_the_whole_model(results: Results, name: str) -> None:
    whole, joined = whole_of(results.folders[name]), results.joined(name)
    expected = dict(whole.module.named_parameters())
    assert joined.keys() == expected.keys()
    for key, parameter in expected.items():
        assert joined[key].dtype == torch.float32 and torch.equal(joined[key], parameter), key
    for found in results.ranks:
        buffers = dict(whole.module.named_buffers())
        assert found[name].buffers.keys() == buffers.keys()
        assert all(torch.equal(found[name].buffers[key], buffer) for key, buffer in buffers.items())


@pytest.mark.parametrize("name", ["tied", "bf16", "experts"])
def test_every_rank_reads_safetensors_and_knows_the_model(results: Results, name: str) -> None:
    whole = whole_of(results.folders[name])
    for found in results.ranks:
        facts = found[name].facts
        assert facts.machine["weights"] == "read by each rank"
        assert facts.parameters == sum(parameter.numel() for parameter in whole.module.parameters())
        assert facts.notes == whole.notes


@pytest.mark.parametrize("name", ["bin", "gguf"])
def test_rank_0_alone_reads_what_cannot_be_read_in_parts(results: Results, name: str) -> None:
    first, *others = (found[name].facts for found in results.ranks)
    assert first.machine["weights"] == "read by rank 0" and first.parameters > 0
    assert all(other.machine == first.machine for other in others)
    assert [(other.parameters, other.model_config) for other in others] == [(None, None)] * (RANKS - 1)


def test_trained_weights_replace_those_of_the_files(results: Results) -> None:
    before, after = results.joined("experts"), results.joined("trained")
    assert all(torch.equal(after[name], before[name] + 1) for name in before)
    assert [found["trained"].version for found in results.ranks] == [4] * RANKS


def test_weights_that_a_checkpoint_replaces_are_not_read(results: Results) -> None:
    read, unread = results.joined("tied"), results.joined("restored")
    assert {name: rows.shape for name, rows in unread.items()} == {name: rows.shape for name, rows in read.items()}
    assert not any(rows.any() for rows in unread.values())


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_no_rank_holds_the_whole_model_while_it_starts(results: Results) -> None:
    module = skeleton(tiny_config("llama", vocab_size=VOCABULARY, **LARGE))
    whole = 4 * sum(parameter.numel() for parameter in module.parameters())
    assert whole > 380 * MIB
    for added, equal in (found["large"] for found in results.ranks):
        assert equal, "masters differ from the files"
        print(f"whole model {whole / MIB:.0f} MiB in FP32; the start of a rank adds {added / MIB:.0f} MiB")
        # its third of the masters, and rows of one weight at a time
        assert whole / RANKS <= added < whole / RANKS + 40 * MIB
