"""The arithmetic behind the tables of the benchmarks, without their measurements."""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a script of the folder as a module, as its neighbours import it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def _modules_stay_local() -> Iterator[None]:
    """Remove the scripts from `sys.modules`: their short names must not shadow other modules in later tests."""
    yield
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_benchmark_finds_what_it_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert benchmark(name, monkeypatch).__doc__


@pytest.mark.parametrize(("better", "ratio"), [("higher", 4.0), ("lower", 0.25)])
def test_a_ratio_above_one_means_ours_is_better(better: str, ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    row = benchmark("side_by_side", monkeypatch).Row(what="", ours=8.0, peer=2.0, target=1.0, better=better)
    assert row.ratio == ratio
    assert row.as_json() == {"what": "", "ours": 8.0, "peer": 2.0, "ratio": ratio, "target": 1.0}


def test_sides_alternate_after_a_warm_up_and_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    # Start and end of each timed call: ours takes 1, 9, 2 and the peer 3, 4, 5 seconds.
    marks = iter([0, 1, 0, 3, 0, 9, 0, 4, 0, 2, 0, 5])
    sides = benchmark("side_by_side", monkeypatch)
    taken = sides.take_turns(
        lambda: calls.append("ours"), lambda: calls.append("peer"), repeats=3, clock=lambda: float(next(marks))
    )
    assert taken == (2.0, 4.0)
    assert calls == ["ours", "peer"] * 4


def test_the_exponent_of_a_power_law_is_found_and_noise_is_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted_exponent = benchmark("scaling", monkeypatch).fitted_exponent
    assert fitted_exponent([1, 2, 4, 8], [3.0 * size**1.5 for size in (1, 2, 4, 8)]) == pytest.approx(1.5, rel=1e-12)
    assert fitted_exponent([16, 64], [5.0, 5.0]) == pytest.approx(0.0, abs=1e-12)
    # log2: (0, 0), (1, 2), (2, 1) has the least-squares slope 1/2.
    assert fitted_exponent([1, 2, 4], [1.0, 4.0, 2.0]) == pytest.approx(0.5, rel=1e-12)


def test_a_meter_keeps_nested_times_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    overhead = benchmark("overhead", monkeypatch)
    now = iter([0.0, 1.0, 3.0, 10.0])
    meter = overhead.Meter(lambda: next(now))
    with meter.time("step"), meter.time("sync"):
        pass
    assert meter.seconds == {"step": 10.0, "step/sync": 2.0}


def test_made_up_rewards_leave_only_the_wanted_groups_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_step = benchmark("whole_step", monkeypatch)
    task = whole_step.Scripted([], group_size=2, equal_share=0.5)
    assert task.rewards([], ["a", "b", "aa", "b"], []) == [0.0, 0.0, 0.001, 1.001]


def test_a_pack_gives_every_token_but_the_first_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = benchmark("packs", monkeypatch).pack_of(torch.tensor([[5, 6, 7], [8, 9, 4]]))
    assert pack.token_ids_T.tolist() == [5, 6, 7, 8, 9, 4]
    assert pack.position_ids_T.tolist() == [0, 1, 2, 0, 1, 2]
    assert [segment.length for segment in pack.segments] == [3, 3]
    assert pack.loss_rows_C.tolist() == [0, 1, 3, 4]
    assert pack.target_ids_C.tolist() == [6, 7, 9, 4]
    assert pack.sequence_index_C.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("tied", [True, False])
def test_the_work_on_a_gpu_is_that_of_the_weights_and_of_causal_attention(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = benchmark("gpu", monkeypatch)
    hf = Qwen2Config(**gpu.ARCHITECTURES["tiny"] | {"tie_word_embeddings": tied})
    module = Qwen2ForCausalLM(hf)
    matrices = sum(p.numel() for name, p in module.named_parameters() if p.ndim == 2 and (tied or "embed" not in name))
    assert gpu.multiplied(hf) == matrices
    # Two sequences of 3 tokens see 1 + 2 + 3 keys; each of QK^T and PV is 2 x 64 operations in each of 2 layers.
    attention = 2 * (1 + 2 + 3) * 2 * 2 * 64 * 2
    assert gpu.train_flops(hf, sequences=2, length=3) == 6 * matrices * 6 + 3 * attention
    # Two sequences of 5 tokens: keys and values of one head of 32, in 2 layers, 2 bytes each.
    assert gpu.decode_bytes(hf, sequences=2, length=5) == 2 * (matrices + 2 * 5 * 2 * 32 * 2)


def test_two_trees_compare_every_metric_but_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = benchmark("two_trees", monkeypatch).differing
    old = [{"metrics": {"time/step_seconds": 1.0, "policy/loss": 0.1, "optim/grad_norm": None}}] * 2
    assert compared(old, old) == (4, [])
    slower = {"time/step_seconds": 2.0, "system/peak_memory_gib": 3.0, "optim/grad_norm": None}
    new = [old[0], {"metrics": {**slower, "policy/loss": 0.1 + 2**-56}}]
    assert compared(old, new) == (4, ["step 2, policy/loss: 0.1 -> 0.10000000000000002"])


def test_the_figure_of_the_collapse_names_the_arms_that_the_run_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arm, rewards in (("fp16", (0.6, 1.0)), ("e8m2", (0.4, 0.0))):
        folder = tmp_path / "arms" / arm
        folder.mkdir(parents=True)
        rows = [json.dumps({"step": step, "rollout/reward/mean": reward}) for step, reward in enumerate(rewards, 1)]
        (folder / "metrics.jsonl").write_text("\n".join(rows))
    script = benchmark("study_figures", monkeypatch)
    (drawing,) = script.figures("collapse", tmp_path)
    assert [line["y"] for line in drawing.tables["values"]] == [[0.6, 1], [0.4, 0]]
    svg = script.beside([drawing])
    assert ">FP16</text>" in svg and ">2 bits</text>" in svg and "aligned" not in svg
    assert "emulated" in svg


def test_points_of_a_sweep_are_its_runs_and_lines_their_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"kind": "cell", "point": {"precision": name, "rounding": "engine"}, "reward_final": reward, "k3_first": k3}
        for name, reward, k3 in (("fp16", 0.9, 1e-7), ("fp16", 1.0, 1e-5), ("e8m2", 0.1, 0.0), ("e8m2", 0.0, 0.1))
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reward, k3 = benchmark("study_figures", monkeypatch).figures("formats", tmp_path)
    assert reward.tables["values"][0]["x"] == [2, 10] and reward.tables["values"][0]["y"] == [0.05, 0.95]
    # The geometric mean of 1e-7 and 1e-5 is 1e-6; a k3 of 0 has no place on the axis.
    assert k3.tables["values"][0]["y"] == [0.1, 1e-6]
    assert sorted(k3.tables["clouds"][0]["y"]) == [1e-7, 1e-5, 0.1]


def test_points_of_long_runs_combine_the_seeds_of_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 steps of two seeds in BF16, whose ratio is unknown in the first step; the second seed has one spike."""
    quiet = {"rollout/reward/mean": [0.0] * 100, "policy/ratio/max_negative": [None, *[2.0] * 99]}
    spike = {"rollout/reward/mean": [1.0] * 100, "policy/ratio/max_negative": [None, *[1.0] * 48, 40.0, *[1.0] * 50]}
    rows = [{"combination": "precision=bf16", **curve} for curve in (quiet, spike)]
    (tmp_path / "curves.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reward, ratio = benchmark("study_figures", monkeypatch).figures("long", tmp_path)
    assert [(line["x"], line["y"]) for line in reward.tables["values"]] == [([50, 100], [0.5, 0.5])]
    assert [(line["x"], line["y"]) for line in ratio.tables["values"]] == [([50, 100], [40, 2])]


def test_a_reward_is_compared_over_an_event_whose_step_was_sampled_before_its_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = benchmark("long_runs", monkeypatch)
    rewards = [1.0] * 30 + [0.5] * 30
    assert script.changes(rewards, [29]) == [-0.5]
    assert script.changes(rewards, [34]) == [0.5 - (15 * 1.0 + 5 * 0.5) / 20]
    assert script.changes(rewards, [18, 40]) == [], "too few steps on a side"
    assert script.fallen([0.8] * 10 + [0.0] * 10) == 17, "0.24, after 0.32"
    assert script.fallen(rewards) is None


def test_predictors_are_judged_by_hand_counted_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    script = benchmark("predict_break", monkeypatch)
    values, broken = [3.0, 2.0, 2.0, 1.0], [True, True, False, False]
    assert script.auc(values, broken) == (1 + 1 + 0.5 + 1) / 4
    assert script.balanced_accuracy(values, broken, 2.5) == (1 / 2 + 1) / 2
    assert script.balanced_accuracy(values, broken, 1.5) == (1 + 1 / 2) / 2
    assert script.best_threshold([1.0, 2.0, 4.0, 8.0], [False, False, True, True]) == 3.0


def test_a_perfect_predictor_of_breaks_is_found_on_runs_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, curves = [{"kind": "sweep", "settings": {}}], []
    for index in range(12):
        broken, label = index % 2 == 0, f"cell {index}"
        results.append(
            {
                "kind": "cell",
                "label": label,
                "combination": str(index // 4),
                "outcome": "collapsed",
                "emulated": ["e8m2"],
            }
        )
        results[-1] |= {"point": {"precision": "e8m2"}, "exponent_first": 1.0}
        if not broken:
            results[-1]["outcome"] = "learned"
        k3 = [0.2 if broken else 0.1] * 3 + [9.0]
        curves.append({"label": label, "mismatch/k3/mean": k3, "rollout/reward/mean": [index / 12] * 4})
    for name, rows in (("results.jsonl", results), ("curves.jsonl", curves)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    script = benchmark("predict_break", monkeypatch)
    runs = script.runs_of(tmp_path, 3)
    assert len(runs) == 12 and sum(run.broken for run in runs) == 6
    found = script.judged(runs, "k3")
    assert found["auc"][0] == found["held_out"][0] == 1.0
    assert script.judged(runs, "x")["auc"][0] == 0.5
    assert script.different([*runs, *runs], None) == runs
    assert {run.combination for run in script.different(runs, "/1")} == {f"{tmp_path.name}/0", f"{tmp_path.name}/2"}


def test_the_bits_of_a_run_are_those_of_its_own_precision_or_of_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    script = benchmark("predict_break", monkeypatch)

    def bits(shared: str | None, *emulated: str, **point: str) -> float:
        found: float = script.predictors({"point": point, "emulated": emulated}, {}, 5, shared)["mantissa bits"]
        return -found

    assert bits(None, precision="bf16") == bits("bf16", steps="4") == 7
    assert bits("fp16", "e8m2", sides="e8m2-fp16") == 2 and bits(None, steps="4") == 23


def test_the_page_on_scaling_holds_the_tables_that_plan_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    script = benchmark("plan_table", monkeypatch)
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.replaced(page, script.tables()) == page
    assert script.replaced(page, "other") != page


def test_the_controller_gives_every_pack_to_a_rank_that_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    script = benchmark("ranks", monkeypatch)
    assert script.row(3, 6, 16, 0.0, 1).startswith("| 3 | 96 |")


def test_the_controllers_share_and_the_possible_overlap_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 10 s of which 4 s are sampling can take 6 s; 2 of 40 s are the controller's."""
    script = benchmark("ray_step", monkeypatch)
    turn = script.Turn(seconds=(10.0, 10.0, 13.0), generate=(4.0, 4.0, 4.0), wall=20.0, controller=1.0)
    assert script.possible_speed_up([turn]) == pytest.approx(10 / 6)
    assert script.controller_share([turn, turn]) == pytest.approx(0.05)


def test_a_turn_ends_after_its_steps_and_overlaps_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    script = benchmark("ray_step", monkeypatch)
    config = script.configured("demo", "fp16", 2, 1, "native", (4, 8, 16))
    assert (config.cluster.backend, config.cluster.trainers, config.training.group_size) == ("ray", 2, 8)
    parts = types.SimpleNamespace(config=config)
    monkeypatch.setattr(script, "replace", lambda parts, config: config)
    found = script.overlapping(parts, 7, 1)
    assert (found.training.steps, found.pipeline.max_staleness) == (7, 1)
    assert script.overlapping(parts, 7, 0).pipeline.max_staleness == 0
