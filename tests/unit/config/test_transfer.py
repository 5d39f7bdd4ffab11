"""Path of the weights: `auto` takes the first that placement and devices allow, and others are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from betterhalf.config.schema import RunConfig


def config(transfer: str = "auto", of: dict[str, Any] | None = None, **cluster: Any) -> RunConfig:
    section = {"backend": "ray", "transfer": transfer, **cluster}
    return RunConfig.model_validate({"cluster": section, "engine": of or {"type": "vllm"}})


def gpus(trainer: float, engine: float) -> dict[str, Any]:
    return {"trainer": {"gpus": trainer}, "engine": {"gpus": engine}}


SHARED = {"placement": "colocated", **gpus(0.5, 0.5)}
PAIR = {"type": "vllm", "tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("engine", "cluster", "path"),
    [
        ({"type": "vllm"}, gpus(1, 1), "nccl"),
        ({"type": "native"}, gpus(1, 1), "nccl"),
        (PAIR, gpus(1, 2), "nccl"),
        ({"type": "vllm"}, SHARED, "ipc"),
        ({"type": "native"}, SHARED, "object_store"),
        ({"type": "vllm"}, gpus(0.5, 0.5), "object_store"),
        ({"type": "vllm"}, gpus(1, 0), "object_store"),
        ({"type": "vllm"}, {}, "object_store"),
        ({"type": "native"}, {"placement": "colocated"}, "object_store"),
    ],
)
def test_auto_takes_the_first_path_that_the_placement_allows(
    engine: dict[str, Any], cluster: dict[str, Any], path: str
) -> None:
    assert config(of=engine, **cluster).transfer == path
    assert config(path, of=engine, **cluster).transfer == path


@pytest.mark.parametrize(
    ("transfer", "engine", "cluster", "words"),
    [
        ("nccl", "vllm", {}, "cluster.trainer.gpus=0 and cluster.engine.gpus=0. Give ranks and engines GPUs"),
        ("nccl", "vllm", gpus(1, 0), "cluster.trainer.gpus=1 and cluster.engine.gpus=0"),
        ("nccl", "vllm", gpus(0.5, 1), "needs a whole GPU for each process"),
        ("nccl", "vllm", SHARED, "Set cluster.placement=separate, or set cluster.transfer=auto"),
        ("ipc", "vllm", gpus(1, 1), "Set cluster.placement=colocated, or set cluster.transfer=auto"),
        ("ipc", "vllm", {"placement": "colocated"}, "moves weights between GPUs"),
        ("ipc", "native", SHARED, "engine.type=native is not one. Set engine=vllm"),
    ],
)
def test_a_path_that_cannot_be_taken_is_refused_with_the_fix(
    transfer: str, engine: str, cluster: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=f"cluster.transfer={transfer} ") as refusal:
        config(transfer, of={"type": engine}, **cluster)
    assert words in str(refusal.value)


def test_the_object_store_can_always_be_asked_for() -> None:
    assert config("object_store", **gpus(1, 1)).transfer == "object_store"


def test_without_a_cluster_there_is_no_path_to_choose() -> None:
    with pytest.raises(ValidationError, match=r"cluster\.transfer needs cluster\.backend=ray"):
        RunConfig.model_validate({"cluster": {"transfer": "nccl"}})
