"""A run under a local Ray that samples one step ahead equals one whose two sides are in this process."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from betterhalf.cluster.build import BACKENDS
from betterhalf.config.schema import RunConfig
from betterhalf.run_dir import RunDir, read_jsonl
from betterhalf.runs.train import train

pytestmark = [
    pytest.mark.extra,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed; run scripts/install --ray"
    ),
]

AHEAD: dict[str, Any] = {
    "device": "cpu",
    "precision": {"preset": "fp32"},
    "cluster": {"backend": "ray", "engines": 2},
    "pipeline": {"max_staleness": 1},
    "training": {"steps": 4, "checkpoint_every": 3, "optimizer_steps": 2},
    "logging": {"rollouts_per_step": 16},
}


def test_completions_and_losses_are_those_of_two_sides_in_this_process(
    small_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = small_config(**AHEAD)
    train(config, str(tmp_path / "ray"), resume=False)
    monkeypatch.setitem(BACKENDS, "ray", BACKENDS["local"])
    train(config, str(tmp_path / "here"), resume=False)
    found, expected = (RunDir(tmp_path / name) for name in ("ray", "here"))

    assert [row["token_ids"] for row in read_jsonl(found.rollouts)] == [
        row["token_ids"] for row in read_jsonl(expected.rollouts)
    ]
    rows = read_jsonl(found.metrics)
    assert [row["staleness/versions"] for row in rows] == [0, 2, 2, 0]
    for row, other in zip(rows, read_jsonl(expected.metrics), strict=True):
        assert row.keys() == other.keys()
        for name in row:
            if name.startswith(("rollout/", "optim/", "policy/")) and name != "optim/first_offender":
                assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
        assert row["staleness/k3/mean"] == pytest.approx(other["staleness/k3/mean"], rel=1e-3, abs=1e-12)
        assert row["mismatch/k3/mean"] < 1e-10
    assert [row["time/ahead_seconds"] > 0 for row in rows] == [False, True, True, False]
