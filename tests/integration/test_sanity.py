"""A small sanity test end to end: a perfectible set, arms that differ in precision only, a verdict, a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from betterhalf.batches import StepBatch
from betterhalf.config.load import config_difference, load_config
from betterhalf.config.schema import RunConfig
from betterhalf.errors import ContractError, InputError
from betterhalf.run_dir import RunDir, read_json, read_jsonl
from betterhalf.runs import loop
from betterhalf.runs import sanity as sanity_module
from betterhalf.runs.measure import Measured
from betterhalf.runs.perfect import build_perfectible
from betterhalf.runs.sanity import sanity
from betterhalf.tasks.perfectible import read_kept
from betterhalf.training.trainer import Trainer

Configured = Callable[..., RunConfig]
SMALL_SANITY = {"candidates": 24, "samples": 10, "evaluation_samples": 4, "pass_accuracy": 0.3}


@pytest.fixture(scope="module")
def sanity_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run one small sanity test, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("sanity") / "run"
    config = RunConfig.model_validate(
        {
            "name": "small",
            "task": {"type": "arithmetic", "num_prompts": 64},
            "sampling": {"max_tokens": 40},
            "training": {"steps": 2, "prompts_per_step": 4, "group_size": 4, "optimizer_steps": 2},
            "optimizer": {"learning_rate": 1e-4},
            "sanity": SMALL_SANITY,
            "logging": {"console": "quiet"},
        }
    )
    sanity(config, str(folder))
    return folder


def test_the_answer_has_the_promised_shape(sanity_run: Path) -> None:
    summary = read_json(sanity_run / "summary.json")
    assert summary["passed"] is True
    assert list(summary["arms"]) == ["fp16", "bf16"]
    for arm in summary["arms"].values():
        assert set(arm) == {
            "passed",
            "first_reward",
            "final_reward",
            "verdict",
            "changes",
            "final_accuracy",
            "mismatch_k3",
            "mismatch_max_abs",
            "skipped_steps",
            "seconds",
        }
        assert 0 < arm["final_accuracy"] <= 1
    ratio = summary["arms"]["bf16"]["mismatch_k3"] / summary["arms"]["fp16"]["mismatch_k3"]
    assert summary["k3_ratio"] == pytest.approx(ratio)
    assert summary["k3_ratio"] > 20
    assert (sanity_run / "report.html").is_file()


def test_the_arms_differ_in_precision_only(sanity_run: Path) -> None:
    fp16, bf16 = (
        RunConfig.model_validate(read_json(sanity_run / "arms" / name / "config.json")) for name in ("fp16", "bf16")
    )
    assert [change.key for change in config_difference(fp16, bf16)] == ["precision.preset"]


def test_an_arm_with_a_table_changes_what_it_says_and_nothing_else(small_config: Configured, tmp_path: Path) -> None:
    tables = {"aligned": {"precision": {"preset": "bf16"}, "engine": {"rounding": "aligned"}}}
    settings = {**SMALL_SANITY, "arms": ["bf16", "aligned"], "arm": tables, "arms_at_once": 2}
    summary = sanity(small_config(sanity=settings), str(tmp_path / "run"))
    assert summary["arms"]["aligned"]["changes"] == {"precision.preset": "bf16", "engine.rounding": "aligned"}
    assert summary["arms"]["bf16"]["mismatch_k3"] > 10 * summary["arms"]["aligned"]["mismatch_k3"]
    bf16, aligned = (load_config(tmp_path / "run" / "arms" / name) for name in ("bf16", "aligned"))
    assert [change.key for change in config_difference(bf16, aligned)] == ["engine.rounding"]
    rows = read_jsonl(tmp_path / "run" / "arms" / "bf16" / "metrics.jsonl")
    assert summary["arms"]["bf16"]["first_reward"] == rows[0]["rollout/reward/mean"]
    assert summary["arms"]["bf16"]["final_reward"] == rows[-1]["rollout/reward/mean"]


@pytest.mark.parametrize(
    ("table", "error", "words"),
    [
        ({"precision": {"rollout_dtype": "fp32"}}, ContractError, "in the arm other: .* differ in precision"),
        ({"precision": {"fp32_modules": ["model.layers.9"]}}, InputError, "in the arm other: .*model.layers.9"),
        (
            {"algorithm": {"preset": "rloo"}, "training": {"group_size": 1}},
            InputError,
            "in the arm other: .*group_size",
        ),
        ({"sampling": {"top_p": 0.9}, "engine": {"type": "vllm"}}, InputError, "in the arm other: .*top_p=0.9"),
        ({"precision": {"preset": "fp16"}}, InputError, "the arms fp16 and other have the same settings"),
    ],
)
def test_an_arm_that_cannot_run_is_refused_before_anything_does(
    small_config: Configured, tmp_path: Path, table: dict[str, object], error: type[Exception], words: str
) -> None:
    config = small_config(sanity={**SMALL_SANITY, "arms": ["fp16", "other"], "arm": {"other": table}})
    with pytest.raises(error, match=words):
        sanity(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("engine", "expected"), [("e8m2", ["e8m2", "e8m3"]), ("fp32", ["e8m3"])])
def test_the_emulated_formats_of_all_arms_are_named(engine: str, expected: list[str]) -> None:
    mixed = {"precision": {"preset": "fp32", "rollout_dtype": engine, "allow_difference": True}}
    config = RunConfig.model_validate({"sanity": {"arms": ["fp16", "e8m3", "mixed"], "arm": {"mixed": mixed}}})
    assert sanity_module.emulated_formats(config) == expected


def test_the_arms_start_from_the_same_weights_and_draw_the_same_prompts(sanity_run: Path) -> None:
    first = {
        name: [
            row["prompt_id"] for row in read_jsonl(sanity_run / "arms" / name / "rollouts.jsonl") if row["step"] == 1
        ]
        for name in ("fp16", "bf16")
    }
    assert first["fp16"] == first["bf16"] != []


def test_arms_train_on_kept_prompts_only(sanity_run: Path) -> None:
    provenance, kept = read_kept(sanity_run / "perfectible.jsonl")
    assert provenance.engine_dtype == "fp32"
    assert all(2 <= row.solved <= 8 for row in kept)
    names = {row.prompt_id for row in kept}
    assert 0 < len(names) <= 24
    for arm in ("fp16", "bf16"):
        seen = {row["prompt_id"] for row in read_jsonl(sanity_run / "arms" / arm / "rollouts.jsonl")}
        assert seen <= names


def test_a_finished_run_resumes_without_training_again(sanity_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a finished arm was trained again")

    before = read_json(sanity_run / "summary.json")
    monkeypatch.setattr(sanity_module, "run_training", forbidden)
    config = RunConfig.model_validate(read_json(sanity_run / "config.json"))
    after = sanity(config, str(sanity_run), resume=True)
    assert after["arms"] == before["arms"]


def test_an_interrupted_count_goes_on_and_gives_the_same_set(small_config: Configured, tmp_path: Path) -> None:
    config = small_config(sanity=SMALL_SANITY)
    whole, _ = build_perfectible(config, RunDir.create(tmp_path / "whole", resume=False))
    lines = whole.read_text().splitlines(keepends=True)
    half = RunDir.create(tmp_path / "half", resume=False)
    half.perfectible.write_text("".join(lines[:17]) + lines[17][:20])  # header, 16 rows, a truncated one
    build_perfectible(config, half)
    assert half.perfectible.read_text() == whole.read_text()


def test_nothing_perfectible_says_how_many_were_too_easy_and_too_hard(small_config: Configured, tmp_path: Path) -> None:
    config = small_config(sanity={**SMALL_SANITY, "lower": 0.99, "upper": 1.0, "candidates": 6})
    with pytest.raises(InputError, match=r"none of 6 prompts is perfectible: 0 too easy .* 6 too hard"):
        sanity(config, str(tmp_path / "run"))


def test_a_failed_first_arm_fails_the_command(betterhalf: Callable[..., object], tmp_path: Path) -> None:
    ended = betterhalf(
        "sanity",
        "sanity.candidates=8",
        "sanity.samples=6",
        "sanity.lower=0",
        "sanity.upper=1",
        "sanity.pass_accuracy=1.0",
        "sanity.evaluation_samples=4",
        "training.steps=1",
        "training.prompts_per_step=4",
        "arms=fp16",
        f"run_dir={tmp_path / 'run'}",
        "--json",
    )
    answer = json.loads(ended.stdout.splitlines()[-1])  # type: ignore[attr-defined]
    assert ended.returncode == 1  # type: ignore[attr-defined]
    assert answer["passed"] is False
    assert answer["k3_ratio"] is None


def test_resuming_with_other_settings_is_refused_and_changes_nothing(sanity_run: Path) -> None:
    before = (sanity_run / "config.json").read_text()
    saved = RunConfig.model_validate(read_json(sanity_run / "config.json"))
    laxer = saved.model_copy(update={"sanity": saved.sanity.model_copy(update={"pass_accuracy": 0.1})})
    with pytest.raises(InputError, match=r"sanity\.pass_accuracy"):
        sanity(laxer, str(sanity_run), resume=True)
    assert (sanity_run / "config.json").read_text() == before


def test_an_arm_its_own_precision_brings_down_is_a_failed_arm_and_the_others_still_run(
    small_config: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.measure

    def broken_in_fp16(trainer: Trainer, batch: StepBatch, config: RunConfig, step: int, behind: int) -> Measured:
        measured = real(trainer, batch, config, step, behind)
        if config.precision.roles().compute_dtype == "fp16" and step == 2:
            next(iter(measured.scores.values())).logprobs_C[0] = float("nan")
        return measured

    monkeypatch.setattr(loop, "measure", broken_in_fp16)
    # In this process: an arm in a process of its own would not see the patched measurement.
    settings = {**SMALL_SANITY, "pass_accuracy": 0.1, "arms_at_once": 1}
    summary = sanity(small_config(sanity=settings), str(tmp_path / "run"))
    assert summary["passed"] is False
    assert "trainer logprobs are not finite" in summary["reasons"]["fp16"]
    assert summary["arms"]["fp16"]["mismatch_k3"] > 0  # of the step whose measurement was valid
    assert summary["arms"]["bf16"]["passed"] is True
    assert summary["k3_ratio"] > 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"arms": []}, "at least 1"),
        ({"arms": ["fp16", "fp16"]}, "names an arm twice"),
        ({"lower": 0.9, "upper": 0.1}, "exceeds sanity.upper"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RunConfig.model_validate({"sanity": settings})
