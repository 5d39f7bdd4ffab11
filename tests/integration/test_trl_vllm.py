"""TRL with a colocated vLLM, both real, on a CPU: what the callback reads of the engine, and what it measures."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from betterhalf.run_dir import RunDir, read_json, read_jsonl

pytestmark = [
    pytest.mark.extra,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("trl", "vllm")), reason="needs TRL and vLLM"
    ),
]

ROOT = Path(__file__).parents[2]


def trained(folder: Path, checkpoint: str, dtype: str) -> RunDir:
    """Train in a process of its own, which vLLM changes, and return the folder of the callback."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "src")))
    more = {"PYTHONPATH": paths, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.trl_colocated", str(folder), checkpoint, dtype]
    found = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return RunDir(folder / "run")


def test_an_fp16_checkpoint_gives_fp16_on_both_sides_with_equal_weights(tmp_path: Path) -> None:
    run = trained(tmp_path, "float16", "fp16")
    contract = read_json(run.contract)
    rows = {row["region"]: row for row in contract["rows"]}
    assert contract["ok"]
    for region in ("compute", "wire", "kv"):
        assert (rows[region]["trainer"], rows[region]["engine"]) == ("fp16", "fp16")
    assert rows["weights"]["status"] == "equal"
    assert rows["engine"]["engine"] == "vLLM, colocated"
    assert rows["logprobs"]["engine"] == "processed_logprobs"
    assert rows["attention"]["engine"].startswith("vLLM ")
    rollouts, measured = read_jsonl(run.rollouts), read_jsonl(run.metrics)
    assert [row["step"] for row in measured] == [1, 2]
    for row in measured:
        mine = [rollout for rollout in rollouts if rollout["step"] == row["step"]]
        gaps = [
            pi - mu for one in mine for pi, mu in zip(one["trainer_logprobs"], one["behavior_logprobs"], strict=True)
        ]
        assert len(gaps) == row["mismatch/tokens"] > 0
        assert row["mismatch/k1/mean"] == pytest.approx(-statistics.fmean(gaps), rel=1e-9)
        # Wrong, shifted or unscaled logprobs would give gaps of the order of 1; FP16 gives some thousandths.
        assert 0 < max(map(abs, gaps)) < 0.1


def test_a_bf16_checkpoint_gives_an_engine_in_bf16_whatever_fp16_says(tmp_path: Path) -> None:
    run = trained(tmp_path, "bfloat16", "fp16")
    contract = read_json(run.contract)
    rows = {row["region"]: row for row in contract["rows"]}
    assert not contract["ok"]
    for region in ("compute", "wire", "kv"):
        assert (rows[region]["trainer"], rows[region]["engine"], rows[region]["status"]) == ("fp16", "bf16", "differs")
    assert read_json(run.config)["precision"] == {"compute_dtype": "fp16", "rollout_dtype": "bf16"}
