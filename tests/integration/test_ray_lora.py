"""LoRA on two ranks and an engine under a local Ray: the numbers of one process, and only what changed is sent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from betterhalf.cluster.build import BACKENDS
from betterhalf.cluster.engine_process import ClusterEngine
from betterhalf.config.schema import RunConfig
from betterhalf.run_dir import RunDir, read_json, read_jsonl
from betterhalf.runs.train import train

pytestmark = pytest.mark.extra
pytest.importorskip("ray", reason="needs Ray; scripts/install --ray")
pytest.importorskip("peft", reason="needs PEFT; pip install betterhalf[lora]")

CLUSTER = {"backend": "ray", "trainers": 2, "engines": 1, "start_seconds": 900.0}
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "precision": {"preset": "fp32"},
    "cluster": CLUSTER,
    "lora": {"rank": 8},
    "optimizer": {"learning_rate": 2e-3},
    "training": {"steps": 3, "optimizer_steps": 1},
    "logging": {"rollouts_per_step": 16},
}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Return what engines are sent: whether it is everything, and its size in bytes."""
    found: list[tuple[bool, int]] = []
    load = ClusterEngine.load_weights

    def noted(engine: ClusterEngine, weights: Any) -> Any:
        found.append((weights.whole() is weights, weights.num_bytes))
        return load(engine, weights)

    monkeypatch.setattr(ClusterEngine, "load_weights", noted)
    return found


@pytest.mark.parametrize("merge", ["weights", "adapter"])
def test_a_run_has_the_numbers_of_one_process_and_sends_what_changed(
    merge: str,
    sent: list[tuple[bool, int]],
    small_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config = small_config(**SETTINGS | {"lora": {"rank": 8, "merge": merge}})
    train(config, str(tmp_path / "ray"), resume=False)
    (first, *later) = sent
    assert first[0] and not any(whole for whole, _ in later) and len(later) == 3
    assert all(size < first[1] for _, size in later)
    if merge == "adapter":
        assert all(size < 0.2 * first[1] for _, size in later), "the adapter alone"
    monkeypatch.setitem(BACKENDS, "ray", BACKENDS["local"])
    train(config, str(tmp_path / "here"), resume=False)
    found, expected = (RunDir(tmp_path / name) for name in ("ray", "here"))
    assert read_json(found.contract)["ok"] is True
    assert [row["token_ids"] for row in read_jsonl(found.rollouts)] == [
        row["token_ids"] for row in read_jsonl(expected.rollouts)
    ]
    for row, other in zip(read_jsonl(found.metrics), read_jsonl(expected.metrics), strict=True):
        assert row["policy/version"] == other["policy/version"]
        assert row["optim/grad_norm"] == pytest.approx(other["optim/grad_norm"], rel=1e-4)
        assert row["mismatch/k3/mean"] < 1e-9


@pytest.mark.filterwarnings("ignore")  # vLLM's dependencies warn
def test_vllm_gets_what_changed(
    sent: list[tuple[bool, int]], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    pytest.importorskip("vllm", reason="needs vLLM; scripts/install --vllm")
    config = small_config(**SETTINGS, engine={"type": "vllm"})
    train(config, str(tmp_path / "run"), resume=False)
    (first, *later) = sent
    assert first[0] and len(later) == 3 and all(not whole and size < first[1] for whole, size in later)
    contract = read_json(RunDir(tmp_path / "run").contract)
    assert contract["ok"] is True
    rows = read_jsonl(RunDir(tmp_path / "run").metrics)
    assert [row["policy/version"] for row in rows] == [1, 2, 3]
    assert all(row["mismatch/k3/mean"] < 1e-8 for row in rows)
