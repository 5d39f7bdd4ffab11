"""Several runs on a cluster: arms of a sanity run and cells of a sweep, one after another, each on a Ray of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from betterhalf import cli
from betterhalf.run_dir import RunDir, read_json

pytestmark = [pytest.mark.extra, pytest.mark.slow]
pytest.importorskip("ray", reason="needs Ray; scripts/install --ray")

SMOKE = Path(__file__).parents[2] / "experiments" / "smoke" / "demo.toml"
TINY = (
    *("cluster.backend=ray", "cluster.start_seconds=900", "training.steps=2", "training.prompts_per_step=2"),
    *("training.group_size=2", "training.optimizer_steps=1", "sampling.max_tokens=30", "logging.console=quiet"),
)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_arms_of_a_sanity_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("sanity.candidates=16", "sanity.samples=2", "sanity.lower=0", "sanity.evaluation_samples=1")
    more = ("sanity.upper=1", "sanity.pass_accuracy=0", f"run_dir={tmp_path / 'run'}", "--json")
    assert cli.main(["sanity", str(SMOKE), *TINY, *settings, *more]) == 0
    assert last_line(capsys)["passed"] is True
    run = RunDir(tmp_path / "run")
    for arm in map(run.arm, ("fp16", "bf16")):
        assert read_json(arm.summary)["steps"] == 2
        assert read_json(arm.environment)["cluster"]["ranks"] == 1
    assert "1 rank and 1 engine (separate) on a Ray of its own" in run.report.read_text()


def test_cells_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.sweep.toml"
    file.write_text(f'extends = "{SMOKE}"\n[sweep.axes]\nprecision = ["fp16", "bf16"]\n')
    assert cli.main(["sweep", str(file), *TINY, f"run_dir={tmp_path / 'run'}", "--json"]) == 0
    result = last_line(capsys)
    assert (result["finished"], result["failed"]) == (2, {})
    for cell in map(RunDir(tmp_path / "run").cell, ("precision=fp16", "precision=bf16")):
        assert read_json(cell.environment)["cluster"]["backend"] == "ray"
