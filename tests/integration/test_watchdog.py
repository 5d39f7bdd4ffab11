"""The watchdog in whole runs: it stops before the step's update, and a resumed run acts like an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from betterhalf.config.schema import RunConfig
from betterhalf.errors import ConfigError, WatchdogError
from betterhalf.run_dir import RunDir, read_json, read_jsonl
from betterhalf.runs import loop
from betterhalf.runs.assembly import Parts
from betterhalf.runs.progress import Progress
from betterhalf.runs.sanity import sanity
from betterhalf.runs.train import run_training, train

Configured = Callable[..., RunConfig]
Ends = Callable[..., str]
ALWAYS = {"metric": "mismatch/k3/mean", "above": 0.0}


def rows_without_times(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "system/"))}
        for row in read_jsonl(run / "metrics.jsonl")
    ]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def perturb(parts: Parts, size: float = 0.5) -> None:
    """Add noise, `size` times as large as the weights, to all weights of the native engine."""
    generator = torch.Generator().manual_seed(0)
    weights = parts.engine._weights  # type: ignore[attr-defined]
    noisy = {}
    for name, held in weights.narrowed():
        noise = torch.randn(held.shape, generator=generator) * held.float().std(correction=0) * size
        noisy[name] = held + noise.to(held.dtype)
    weights.load(noisy.items())


@pytest.fixture
def perturbed_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Perturb the engine after the weight sync that ends the given step."""
    sync, synced = loop.sync_weights, 0

    def arm(step: int) -> None:
        def sync_and_perturb(parts: Parts) -> Any:
            nonlocal synced
            contract = sync(parts)
            synced += 1
            if synced == step:
                perturb(parts)
            return contract

        monkeypatch.setattr(loop, "sync_weights", sync_and_perturb)

    return arm


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_healthy_run_leaves_the_watchdog_silent(precision: str, small_config: Configured, tmp_path: Path) -> None:
    config = small_config(precision={"preset": precision})
    run = RunDir.create(tmp_path / "run", resume=False)
    run_training(config, run, resume=False, label="x")
    assert not run.watchdog.exists()
    rows, gaps = read_jsonl(run.metrics), read_jsonl(run.mismatch)
    assert [row["step"] for row in gaps] == [1, 2]
    for row, gap in zip(rows, gaps, strict=True):
        assert row["budget/predicted_ess"] == pytest.approx(row["budget/observed_ess"], abs=1e-3)
        assert row["budget/observed_ess"] == row["mismatch/ess_fraction"] > 0.99
        assert 1e3 < row["budget/max_length"] < 1e9
        for bins in (gap["by_probability"], gap["by_position"]):
            assert sum(part["tokens"] for part in bins) == row["mismatch/tokens"]
        assert sum(length for length, _ in gap["completions"]) == row["mismatch/tokens"]


def test_a_perturbed_engine_stops_the_run_within_the_step_and_the_run_resumes(
    train: Ends, perturbed_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = ("training.steps=4", "training.checkpoint_every=0")
    whole, run = tmp_path / "whole", tmp_path / "stopped"
    train(0, *settings, f"run_dir={whole}")
    with monkeypatch.context():
        perturbed_after(2)
        said = train(3, *settings, f"run_dir={run}")
    for words in ("step 3", "mismatch/k3/mean is ", "above 0.1", "betterhalf doctor", "--localize", "--resume"):
        assert words in said
    assert rows_without_times(run) == rows_without_times(whole)[:2]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert read_json(run / "checkpoints" / "step-000002" / "state.json")["trainer"]["policy_version"] == 2
    stop = next(row for row in read_jsonl(run / "watchdog.jsonl") if row["action"] == "stop")
    assert stop["step"] == 3 and stop["value"] == stop["measured"]["mismatch/k3/mean"] > 0.1
    assert stop["measured"]["budget/predicted_ess"] < 0.01
    summary = read_json(run / "summary.json")
    assert summary["steps"] == 2 and summary["stopped"].startswith("step 3: mismatch/k3/mean is ")

    monkeypatch.undo()
    train(0, *settings, f"run_dir={run}", "--resume")
    assert rows_without_times(run) == rows_without_times(whole)
    assert [row["action"] for row in read_jsonl(run / "watchdog.jsonl")] == ["stop"]
    assert "stopped" not in read_json(run / "summary.json")
    for name, tensor in weights(whole, 4).items():
        assert torch.equal(tensor, weights(run, 4)[name]), name


def test_a_stop_in_the_first_step_leaves_a_run_that_goes_on_with_other_levels(
    small_config: Configured, tmp_path: Path
) -> None:
    folder = str(tmp_path / "run")
    with pytest.raises(WatchdogError, match="stopped the run in step 1"):
        train(small_config(watchdog={"levels": [{**ALWAYS, "action": "stop"}]}), folder, resume=False)
    assert read_json(tmp_path / "run" / "summary.json")["steps"] == 0
    summary = train(small_config(watchdog={"levels": []}), folder, resume=True)
    assert summary["steps"] == 2
    assert read_json(tmp_path / "run" / "config.json")["watchdog"]["levels"] == []


def test_an_interrupted_run_keeps_mask_learning_rate_and_counts(
    small_config: Configured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    levels = [
        {**ALWAYS, "steps": 2, "action": "mask"},
        {**ALWAYS, "steps": 3, "action": "halve_learning_rate"},
    ]
    config = small_config(
        watchdog={"levels": levels}, training={"steps": 7, "prompts_per_step": 2, "checkpoint_every": 2}
    )
    run_training(config, RunDir.create(tmp_path / "whole", resume=False), resume=False, label="x")
    collect = loop.collect_groups

    def interrupted(parts: Parts, progress: Progress, *more: Any) -> Any:
        if progress.step == 5:
            raise KeyboardInterrupt
        return collect(parts, progress, *more)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "collect_groups", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_training(config, RunDir.create(tmp_path / "cut", resume=False), resume=False, label="x")
    run_training(config, RunDir.create(tmp_path / "cut", resume=True), resume=True, label="x")

    rows = rows_without_times(tmp_path / "whole")
    assert [row["optim/learning_rate"] / 3e-4 for row in rows] == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert rows == rows_without_times(tmp_path / "cut")
    for name in ("watchdog.jsonl", "mismatch.jsonl", "checkpoints/step-000007/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    fired = [(row["step"], row["action"]) for row in read_jsonl(tmp_path / "cut" / "watchdog.jsonl")]
    assert fired == [(2, "mask"), (3, "halve_learning_rate"), (6, "halve_learning_rate")]


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_the_mask_works_in_the_step_that_switches_it_on(
    algorithm: str, small_config: Configured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fractions, collect = {}, loop.collect_groups

    def collect_perturbed(parts: Parts, *more: Any) -> Any:
        # Small enough that some completions are still right: only groups with an advantage are trained on and masked.
        perturb(parts, 0.2)
        return collect(parts, *more)

    for action in ("warn", "mask"):
        config = small_config(
            algorithm={"preset": algorithm},
            # Few packs are measured; the others must be scored once the mask needs proximal logprobs.
            mismatch={"sample_fraction": 0.3},
            training={"tokens_per_micro_batch": 120, "prompts_per_step": 12, "steps": 1},
            watchdog={"levels": [{**ALWAYS, "action": action}]},
        )
        with monkeypatch.context() as patched:
            patched.setattr(loop, "collect_groups", collect_perturbed)
            run = RunDir.create(tmp_path / action, resume=False)
            run_training(config, run, resume=False, label="x")
        fractions[action] = [row["policy/mask_fraction"] for row in read_jsonl(run.metrics)]
    assert fractions["warn"] == [0]
    assert min(fractions["mask"]) > 0


def test_levels_that_cannot_act_are_refused_before_anything_is_loaded(
    small_config: Configured, train: Ends, tmp_path: Path
) -> None:
    said = train(2, 'watchdog.levels=[{metric = "mismatch/k3/meen", above = 1.0}]')
    assert "watchdog.levels[0].metric" in said and "Did you mean 'mismatch/k3/mean'?" in said
    assert not (tmp_path / "run").exists()
    config = small_config(algorithm={"preset": "dppo_tv"}, watchdog={"levels": [{**ALWAYS, "action": "mask"}]})
    with pytest.raises(ConfigError, match="algorithm=icepop"):
        sanity(config, str(tmp_path / "sanity"))
    assert not (tmp_path / "sanity").exists()


def test_a_level_whose_metric_is_not_measured_is_announced(
    small_config: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = [{"metric": "mismatch/k3/mean", "above": 1.0}, {"metric": "task/made_up", "above": 1.0}]
    config = small_config(watchdog={"levels": levels}, logging={"console": "lines"})
    run_training(config, RunDir.create(tmp_path / "run", resume=False), resume=False, label="x")
    shown = capsys.readouterr().err
    assert shown.count("cannot fire") == 1 and "watchdog.levels[1] (task/made_up) cannot fire" in shown


def test_an_arm_that_the_watchdog_stops_has_failed_and_the_other_arm_runs(
    small_config: Configured, tmp_path: Path
) -> None:
    # Between the k3 of FP16 (about 1e-8 here) and of BF16 (1e-6).
    levels = [{"metric": "mismatch/k3/mean", "above": 1.5e-7, "action": "stop"}]
    config = small_config(
        watchdog={"levels": levels},
        sanity={
            "arms": ["bf16", "fp16"],
            "candidates": 24,
            "samples": 10,
            "evaluation_samples": 4,
            "pass_accuracy": 0.3,
        },
    )
    summary = sanity(config, str(tmp_path / "run"))
    assert summary["passed"] is False
    assert "the watchdog stopped the run in step 1" in summary["reasons"]["bf16"]
    assert summary["arms"]["fp16"]["passed"] is True
    assert "fp16" not in summary["reasons"]
