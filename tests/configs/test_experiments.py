"""Every experiment file loads, twins differ in precision only, and the README has a row for each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.paper_plans import FILES as PAPER
from tests.paper_plans import paper_plan, sentence

from betterhalf.config.grid import load_grid
from betterhalf.config.load import arm_settings, config_difference, load_config, same_except
from betterhalf.config.schema import AlgorithmConfig, ArithmeticTask, SweepConfig

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FILES = sorted(EXPERIMENTS.rglob("*.toml"))
SWEEPS = [file for file in FILES if file.name.endswith(".sweep.toml")]
FP16_TWINS = [file for file in FILES if file.stem.endswith("_fp16")]
MIXED = [file for file in FILES if file.stem.startswith("train-")]


def relative(file: Path) -> str:
    return str(file.relative_to(EXPERIMENTS))


def twin(file: Path) -> Path:
    return file.with_name(file.name.replace("_fp16", "_bf16"))


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_every_experiment_loads(file: Path) -> None:
    assert load_config(file).name == file.stem.removesuffix(".sweep")


@pytest.mark.parametrize("file", SWEEPS, ids=relative)
def test_every_sweep_expands(file: Path) -> None:
    grid = load_grid(file)
    assert len(grid.cells) > 1 and {cell.config.sweep.axes == {} for cell in grid.cells} == {True}


def test_axes_are_in_sweep_files_only() -> None:
    with_axes = [file for file in FILES if load_config(file).sweep != SweepConfig()]
    assert with_axes == SWEEPS != []


def test_there_are_twins_and_none_is_alone() -> None:
    bf16_twins = [file for file in FILES if file.stem.endswith("_bf16")]
    assert len(FP16_TWINS) >= 10
    assert sorted(map(twin, FP16_TWINS)) == bf16_twins


@pytest.mark.parametrize("file", FP16_TWINS, ids=relative)
def test_twins_differ_in_precision_only(file: Path) -> None:
    fp16, bf16 = load_config(file), load_config(twin(file))
    changed = [(change.key, change.left, change.right) for change in config_difference(fp16, bf16)]
    assert changed == [("name", file.stem, twin(file).stem), ("precision.preset", "fp16", "bf16")]


@pytest.mark.parametrize("file", MIXED, ids=relative)
def test_mixed_precisions_run_what_their_name_says_and_differ_in_precision_only(file: Path) -> None:
    trained, sampled = re.fullmatch(r"train-(\w+)_rollout-(\w+)", file.stem).groups()  # type: ignore[union-attr]
    config = load_config(file)
    roles = config.precision.roles()
    assert (roles.compute_dtype, roles.rollout_dtype, roles.kv_dtype) == (trained, sampled, sampled)
    assert config.precision.allow_difference
    assert same_except(config, load_config(file.with_name("grpo_fp16.toml")), "precision", "name")


ABLATIONS = [f for f in FP16_TWINS if relative(f.parent) in ("ablation/demo", "paper/sanity")]


@pytest.mark.parametrize("algorithm_file", ABLATIONS, ids=relative)
def test_an_ablation_changes_one_axis_besides_precision(algorithm_file: Path) -> None:
    base = load_config(algorithm_file.with_name("grpo_fp16.toml"))
    config = load_config(algorithm_file)
    axes = ("algorithm",), ("engine.rounding",)
    assert any(same_except(base, config, "name", "precision", *axis) for axis in axes)
    # In the algorithm, only the preset changes, and the choices that follow from it.
    assert config.algorithm == AlgorithmConfig(preset=config.algorithm.preset)


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_the_readme_has_one_row_for_every_file(file: Path) -> None:
    rows = [line for line in (EXPERIMENTS / "README.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert [f"`{relative(file)}`" in row for row in rows].count(True) == 1


def test_the_readme_has_no_row_without_a_file() -> None:
    named = re.findall(r"^\| `([^`]+\.toml)`", (EXPERIMENTS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(map(relative, FILES))


def test_the_demo_is_the_default_of_the_model_and_task() -> None:
    """`betterhalf evaluate demo` uses the schema's defaults, so they must be the task of the demo model."""
    assert load_config(None).task == load_config(EXPERIMENTS / "base/demo.toml").task
    assert load_config(None).model == load_config(EXPERIMENTS / "base/demo.toml").model


def test_the_arms_of_the_collapse_change_what_their_names_say() -> None:
    config = load_config(EXPERIMENTS / "sanity/collapse.toml")
    arms = {name: arm_settings(config, name) for name in config.sanity.arms}
    roles = {name: arm.precision.roles() for name, arm in arms.items()}
    assert [(name, role.compute_dtype, role.rollout_dtype) for name, role in roles.items()] == [
        ("fp16", "fp16", "fp16"),
        ("bf16", "bf16", "bf16"),
        ("e8m2", "e8m2", "e8m2"),
        ("e8m2_aligned", "e8m2", "e8m2"),
        ("e8m2_dual_clip", "e8m2", "e8m2"),
        ("coarse_trainer", "e8m2", "fp32"),
        ("coarse_engine", "fp32", "e8m2"),
    ]
    assert same_except(arms["e8m2"], arms["e8m2_aligned"], "engine.rounding")
    assert same_except(arms["e8m2"], arms["e8m2_dual_clip"], "algorithm.surrogate.dual_clip")
    assert all(same_except(arms["e8m2"], arms[name], "precision") for name in ("fp16", "bf16", "coarse_trainer"))
    assert all(arm.algorithm.surrogate.dual_clip is None for name, arm in arms.items() if name != "e8m2_dual_clip")


def test_the_base_of_the_collapse_is_the_task_of_its_model() -> None:
    config = load_config(EXPERIMENTS / "base/collapse.toml")
    assert (config.model.name, config.task.type) == ("demo-small", "arithmetic")
    assert config.task == ArithmeticTask(terms=5)
    assert config.sampling.max_tokens > 20


@pytest.mark.parametrize("folder", ["sanity", "lora", "octothinker_3b", "qwen3_14b", "qwen3_30b_a3b"])
def test_the_paper_s_experiments_fit_their_cluster_and_their_rows_hold_the_plan(folder: str, tmp_path: Path) -> None:
    """Plan one file of a folder: its others differ in the algorithm and in the precision, both halves of two bytes."""
    files = [file for file in PAPER if file.parent.name == folder and "fp32" not in file.stem]
    found = paper_plan(files[0], tmp_path)
    assert found.fits and found.memory.devices[0].limit_bytes is not None
    rows = (EXPERIMENTS / "README.md").read_text(encoding="utf-8").splitlines()
    planned = [row for row in rows for file in files if row.startswith(f"| `{relative(file)}`")]
    assert len(planned) == len(files) >= 2 and all(sentence(found) in row for row in planned)


def test_the_paper_s_settings_are_those_of_its_runs() -> None:
    """Numbers of arXiv 2510.26788: prompts, completions, optimizer steps, tokens, learning rate, bounds of ratios."""
    expected = {
        "sanity/grpo_token_tis_fp16": (64, 8, 4, 8192, 1e-6, 1.28, 3.0, 1e-15),
        "lora/grpo_token_tis_fp16": (64, 8, 4, 3000, 4e-5, 1.2, 2.0, 1e-8),
        "octothinker_3b/grpo_fp16": (128, 8, 8, 3000, 1e-6, 1.2, None, 1e-8),
        "qwen3_14b/dapo_fp16": (512, 16, 16, 20480, 1e-6, 1.28, None, 1e-8),
        "qwen3_30b_a3b/grpo_token_tis_fp16": (512, 16, 16, 20480, 1e-6, 1.28, 3.0, 1e-15),
    }
    for name, numbers in expected.items():
        config = load_config(EXPERIMENTS / "paper" / f"{name}.toml")
        algorithm, training, optimizer = config.algorithm, config.training, config.optimizer
        assert (
            *(training.prompts_per_step, training.group_size, training.optimizer_steps, config.sampling.max_tokens),
            *(optimizer.learning_rate, algorithm.surrogate.upper, algorithm.correction.upper, optimizer.eps),
        ) == numbers
        assert config.lora.active == name.startswith("lora")


def test_every_experiment_of_the_paper_names_its_cluster() -> None:
    assert {load_config(file).cluster.needed_gpus for file in PAPER} == {8, 64}
