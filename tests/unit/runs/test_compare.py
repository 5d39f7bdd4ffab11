"""The comparison of runs: numbers of hand-made folders, settings that differ, and the forms of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from betterhalf import cli
from betterhalf.config.load import configuration_of, resolved_json
from betterhalf.errors import InputError
from betterhalf.run_dir import RunDir, append_jsonl, write_json_atomic
from betterhalf.runs.compare import compare_runs


def write_run(
    path: Path, rewards: list[float], *, summary: dict[str, Any] | None = None, k3: float = 1e-6, **settings: Any
) -> Path:
    """Write a run folder with one row for each reward; the ratio is 1 + step / 10, and step 2 is skipped once."""
    path.mkdir(parents=True)
    run = RunDir(path)
    write_json_atomic(run.config, resolved_json(configuration_of(settings)))
    write_json_atomic(run.environment, {})
    for step, reward in enumerate(rewards, start=1):
        row = {"rollout/reward/mean": reward, "mismatch/k3/mean": k3 * step, "policy/ratio/max": 1 + step / 10}
        append_jsonl(run.metrics, {"step": step, **row, "optim/skipped": float(step == 2)})
    if summary is not None:
        write_json_atomic(run.summary, summary)
    return path


def test_each_run_is_reduced_to_the_numbers_computed_by_hand(tmp_path: Path) -> None:
    rewards = [0.2] * 5 + [0.5] * 15 + [0.9] * 20
    learned = write_run(tmp_path / "a", rewards, summary={"verb": "train", "seconds": 12.5})
    running = write_run(tmp_path / "b", [0.25, 0.75])
    first, second = compare_runs([learned, running]).runs
    assert (first.name, first.verb, first.outcome, first.steps, first.seconds) == ("a", "train", "learned", 40, 12.5)
    assert first.first_reward == pytest.approx(0.2)
    assert first.final_reward == pytest.approx(0.9)  # the mean of the last 20 steps
    assert first.k3 == pytest.approx(1e-6 * sum(range(1, 41)) / 40)
    assert (first.ratio_max, first.skipped) == (pytest.approx(5.0), 1)
    assert (second.outcome, second.steps, second.seconds, second.accuracy) == ("unfinished", 2, None, None)


def test_steps_whose_k3_is_not_finite_are_counted_and_shown(tmp_path: Path) -> None:
    broken, healthy = write_run(tmp_path / "a", [0.5, 0.5], k3=2e-6), write_run(tmp_path / "b", [0.5])
    # infinity is null in the file
    append_jsonl(RunDir(broken).metrics, {"step": 3, "rollout/reward/mean": 0.5, "mismatch/k3/mean": float("inf")})
    found = compare_runs([broken, healthy])
    assert [(run.k3, run.k3_not_finite) for run in found.runs] == [
        (pytest.approx(3e-6), 1),
        (pytest.approx(1e-6), None),
    ]
    assert "finite" in str(found) and "finite" not in str(compare_runs([healthy]))


def test_ranks_and_engines_are_compared_where_a_run_had_any(tmp_path: Path) -> None:
    alone = write_run(tmp_path / "a", [0.5])
    spread = write_run(tmp_path / "b", [0.5], cluster={"backend": "ray", "trainers": 2})
    assert [run.cluster for run in compare_runs([alone, spread]).runs] == [None, "ray 2+1"]
    assert "ray 2+1" in str(compare_runs([alone, spread]))
    assert "cluster" not in str(compare_runs([alone])).splitlines()[0]
    assert compare_runs([alone, spread]).differences["cluster.trainers"] == (1, 2)


def test_a_run_that_collapsed_or_stopped_says_so(tmp_path: Path) -> None:
    collapsed = write_run(tmp_path / "a", [0.8] * 30 + [0.05] * 30, summary={"verb": "train"})
    stopped = write_run(tmp_path / "b", [0.8] * 30, summary={"verb": "train", "stopped": "step 31: k3 above 1"})
    evaluated = write_run(tmp_path / "c", [], summary={"verb": "evaluate", "avg@8": 0.625})
    found = compare_runs([collapsed, stopped, evaluated]).runs
    assert [run.outcome for run in found] == ["collapsed", "stopped", "finished"]
    assert [run.accuracy for run in found] == [None, None, 0.625]


def test_only_settings_that_change_numbers_are_compared(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [0.5], name="a", precision="fp16", logging={"console": "quiet"})
    b = write_run(tmp_path / "b", [0.5], name="b", precision="bf16", training={"steps": 7})
    assert compare_runs([a, b]).differences == {"precision.preset": ("fp16", "bf16"), "training.steps": (100, 7)}


def test_rules_of_the_watchdog_are_compared_unless_they_only_warn(tmp_path: Path) -> None:
    warn = {"metric": "mismatch/k3/mean", "above": 1e-3, "action": "warn"}
    mask = {"metric": "mismatch/k3/mean", "above": 1e-2, "steps": 2, "action": "mask"}
    levels = {"silent": [], "warns": [warn], "masks": [warn, mask]}
    silent, warns, masks = (
        write_run(tmp_path / name, [0.5], watchdog={"levels": rules}) for name, rules in levels.items()
    )
    assert compare_runs([silent, warns]).differences == {}
    assert compare_runs([warns, masks]).differences == {"watchdog.levels": ([], [mask | {"below": None}])}
    assert 'watchdog.levels=[{"metric": "mismatch/k3/mean"' in str(compare_runs([warns, masks]))


def test_the_arms_of_a_sanity_run_and_the_runs_of_a_sweep_are_compared(tmp_path: Path) -> None:
    sanity, sweep = tmp_path / "sanity", tmp_path / "sweep"
    write_run(sanity / "arms" / "fp16", [0.9], summary={"passed": True, "final_accuracy": 0.97})
    write_run(sanity / "arms" / "bf16", [0.9], summary={"passed": False, "final_accuracy": 0.5})
    write_json_atomic(RunDir(sanity).summary, {"verb": "sanity", "arms": {"fp16": {}, "bf16": {}}})
    write_run(sweep / "runs" / "seed-1", [0.1])
    append_jsonl(RunDir(sweep).results, {"kind": "sweep"})
    found = compare_runs([sanity, sweep]).runs
    assert [run.name for run in found] == ["fp16", "bf16", "seed-1"]
    assert [(run.passed, run.accuracy) for run in found] == [(True, 0.97), (False, 0.5), (None, None)]


def test_names_are_as_long_as_needed(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / folder / "arms" / "fp16", [0.9]) for folder in ("x", "y")]
    assert [run.name for run in compare_runs(paths).runs] == ["x/fp16", "y/fp16"]


def test_a_summary_with_values_of_the_wrong_kind_is_shown_with_dashes(tmp_path: Path) -> None:
    damaged = {"verb": 3, "seconds": "long", "final_accuracy": [], "passed": "yes"}
    found = compare_runs([write_run(tmp_path / "runs", [0.5], summary=damaged)])
    (run,) = found.runs
    assert (run.name, run.verb, run.seconds, run.accuracy, run.passed) == ("runs", "3", None, None, None)
    assert str(found).splitlines()[-1].split() == ["runs", "short", "1", "0.500", "0.500", "1.0e-06", "1.1", "0", "-"]


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        compare_runs([tmp_path / "nothing"])
    with pytest.raises(InputError, match="there is no run to compare"):
        compare_runs([])
    append_jsonl(RunDir(tmp_path).results, {"kind": "sweep"})
    with pytest.raises(InputError, match="holds no run folders. `betterhalf report"):
        compare_runs([tmp_path])


def test_the_command_prints_the_table_and_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(
        tmp_path / "a", [0.25] * 30, summary={"verb": "train", "seconds": 3.0}, precision="e8m3", device="cpu"
    )
    b = write_run(tmp_path / "b", [0.25, 0.75], device="cpu", precision="fp16")
    assert cli.main(["compare", str(a), str(b)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "a flat 30 0.250 0.250 1.6e-05 4 1 3" in lines
    assert "b unfinished 2 0.250 0.750 1.5e-06 1.2 1 -" in lines
    assert "a: precision.preset=e8m3 (emulated)" in lines
    assert "b: precision.preset=fp16" in lines
    assert lines[-1].startswith("e8m3 is emulated")


def test_settings_that_are_lists_are_compared(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [0.25], optimizer={"betas": [0.9, 0.95]}, precision="e8m3", device="cpu")
    b = write_run(tmp_path / "b", [0.25], optimizer={"betas": [0.8, 0.95]}, precision="e8m3", device="cpu")
    lines = str(compare_runs([a, b])).splitlines()
    assert [line.strip() for line in lines[-2:]] == ["a: optimizer.betas=[0.9, 0.95]", "b: optimizer.betas=[0.8, 0.95]"]
    assert "optimizer.betas" in compare_runs([a, b])._repr_html_()


def test_the_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a", [0.25, 0.75], precision="fp16")
    b = write_run(tmp_path / "b", [0.25, 0.75], precision="bf16")
    assert cli.main(["compare", str(a), str(b), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["verb"] == "compare"
    assert [run["final_reward"] for run in found["runs"]] == [0.75, 0.75]
    assert found["differences"] == {"precision.preset": ["fp16", "bf16"]}
    assert cli.main(["compare", str(tmp_path / "missing")]) == 2


def test_a_notebook_gets_tables_and_figures(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [0.25, 0.75], precision="fp16")
    b = write_run(tmp_path / "b", [0.25, 0.75], precision="bf16")
    html = compare_runs([a, b])._repr_html_()
    assert "<td>precision.preset</td><td>fp16</td><td>bf16</td>" in html
    assert html.count("<iframe") == 1 and "&lt;svg" in html
    assert "The settings are the same." in str(compare_runs([a, a]))
