"""Expansion of a sweep file: labels, configurations, choices of combinations, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from betterhalf.config.grid import Grid, combination_of, load_grid
from betterhalf.config.load import load_config
from betterhalf.config.render import toml_text
from betterhalf.config.schema import SweepConfig
from betterhalf.errors import ConfigError

Expand = Callable[..., Grid]

HEAD = """
[training]
steps = 7

[sweep]
seeds = [3, 4]

"""
AXES = """
[sweep.axes]
precision = ["fp16", "bf16"]
"engine.rounding" = ["engine", "aligned"]

[sweep.axes.algorithm]
plain = {}
dual = {"algorithm.preset" = "grpo", algorithm.surrogate.dual_clip = 3}
"""


@pytest.fixture
def expand(tmp_path: Path) -> Expand:
    """Expand the text of a sweep file, with overrides."""

    def load(text: str, *overrides: str) -> Grid:
        file = tmp_path / "small.sweep.toml"
        file.write_text(text, encoding="utf-8")
        return load_grid(file, overrides)

    return load


def test_every_combination_has_a_cell_with_a_readable_label(expand: Expand) -> None:
    grid = expand(HEAD + AXES)
    assert len(grid.cells) == 16 and grid.config.name == "small"
    first, last = grid.cells[0], grid.cells[-1]
    assert first.label == "precision=fp16,rounding=engine,algorithm=plain,seed=3"
    assert last.label == "precision=bf16,rounding=aligned,algorithm=dual,seed=4"
    assert last.combination == "precision=bf16,rounding=aligned,algorithm=dual"
    assert dict(last.point) == {"precision": "bf16", "rounding": "aligned", "algorithm": "dual"}


def test_a_cell_has_the_settings_of_its_values_and_of_the_file_and_no_axes(expand: Expand) -> None:
    config = expand(HEAD + AXES, "optimizer.learning_rate=1e-3").cells[-1].config
    roles = config.precision.roles()
    assert (roles.compute_dtype, config.engine.rounding, config.seed) == ("bf16", "aligned", 4)
    assert (config.algorithm.surrogate.dual_clip, config.training.steps) == (3.0, 7)
    assert config.optimizer.learning_rate == 1e-3
    assert config.name == "precision=bf16,rounding=aligned,algorithm=dual,seed=4"
    assert config.sweep == SweepConfig()


def test_a_cell_of_the_plain_label_is_the_experiment_itself(expand: Expand, tmp_path: Path) -> None:
    cell = expand(HEAD + AXES).cells[0]
    plain = load_config(tmp_path / "small.sweep.toml", ["precision=fp16", "engine.rounding=engine", "seed=3"])
    assert cell.config == plain.model_copy(update={"name": cell.label, "sweep": SweepConfig()})


def test_without_seeds_the_label_has_none_and_the_seed_is_that_of_the_configuration(expand: Expand) -> None:
    cells = expand("seed = 9\n[sweep.axes]\n'optimizer.learning_rate' = [1e-4, 2]\n").cells
    assert [cell.label for cell in cells] == ["learning_rate=0.0001", "learning_rate=2"]
    assert [cell.config.seed for cell in cells] == [9, 9]


def test_the_combination_follows_from_a_label_with_a_seed(expand: Expand) -> None:
    cells = [*expand(HEAD + AXES).cells, *expand("[sweep]\nseeds = [10, 0]\n").cells]
    assert [combination_of(cell.label) for cell in cells] == [cell.combination for cell in cells]
    assert combination_of("precision=fp16") is None


def test_seeds_alone_are_a_sweep(expand: Expand) -> None:
    cells = expand("[sweep]\nseeds = [0, 1]\n").cells
    assert [(cell.label, cell.combination) for cell in cells] == [("seed=0", "all"), ("seed=1", "all")]


def test_only_and_exclude_choose_combinations(expand: Expand) -> None:
    def combinations(*overrides: str) -> set[str]:
        return {cell.combination for cell in expand(HEAD + AXES, *overrides).cells}

    assert len(combinations("sweep.exclude=[{algorithm='dual'}]")) == 4
    assert len(combinations("sweep.exclude=[{algorithm='dual', precision='bf16'}]")) == 6
    two = combinations("sweep.only=[{algorithm='dual', 'engine.rounding'='aligned'}, {precision=['bf16']}]")
    assert len(two) == 5
    assert len(expand(HEAD + AXES, "sweep.exclude=[{seed=3}]").cells) == 8


def test_axes_of_one_last_part_keep_their_full_keys(expand: Expand) -> None:
    text = "[sweep.axes]\n'precision.kv_dtype' = ['fp16']\n'sanity.samples' = [1, 2]\n'evaluate.samples' = [1]\n"
    assert [axis.name for axis in expand(text).axes] == ["kv_dtype", "sanity.samples", "evaluate.samples"]
    assert expand(text).axes[1].numbers == (1.0, 2.0)


def test_values_become_names_of_folders(expand: Expand) -> None:
    text = "[sweep.axes]\n'precision.fp32_modules' = [[], ['lm_head']]\n'model.name' = ['a/b c', 'demo']\n"
    labels = [cell.label for cell in expand(text).cells]
    assert labels[0] == "fp32_modules=none,model=a-b-c" and labels[-1] == "fp32_modules=lm_head,model=demo"


def test_an_axis_knows_whether_its_labels_are_its_values(expand: Expand) -> None:
    text = "[sweep.axes]\nprecision = ['fp16']\n'training.steps' = [1, 2]\n'model.name' = ['a/b']\nx.a = {name = 'y'}\n"
    axes = expand(text).axes
    assert [(axis.name, axis.labelled) for axis in axes] == [
        ("precision", False),
        ("steps", False),
        ("model", True),
        ("x", True),
    ]


def test_a_negative_number_keeps_its_sign(expand: Expand) -> None:
    cells = expand("[sweep]\nseeds = [-1, 1]\nexclude = [{seed = -1}]\n").cells
    assert [cell.config.seed for cell in cells] == [1]


def test_the_text_of_a_sweep_s_configuration_loads_again(expand: Expand, tmp_path: Path) -> None:
    config = expand(HEAD + AXES, "sweep.exclude=[{'engine.rounding'='aligned'}]").config
    (tmp_path / "copy.toml").write_text(toml_text(config), encoding="utf-8")
    assert load_config(tmp_path / "copy.toml") == config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("[sweep.axes]\n'engine.roundng' = ['x']\n", (), r"unknown key 'engine.roundng'. Did you mean 'engine.round"),
        ("[sweep.axes]\n'engine.roundng' = ['x']\n", (), r"\[axis engine.roundng, x\]"),
        ("[sweep.axes.a]\nb = {training.stps = 1}\n", (), r"'training.stps'. Did you mean 'training.steps'.*axis a, b"),
        ("[sweep.axes]\n'engine.rounding' = ['alined']\n", (), r"not one of engine, aligned.*axis engine.rounding, al"),
        ("[sweep.axes]\nengine.rounding = ['engine']\n", (), "Write a dotted key in quotes"),
        ("[sweep.axes]\nprecision = 'fp16'\n", (), "is not a list. Write it as a list"),
        ("[sweep.axes]\nprecision = []\n", (), "has no values. List at least one"),
        ("[sweep.axes]\nprecision = ['fp16', 'fp16']\n", (), "the value fp16 twice. Name each value once"),
        ("[sweep.axes]\nseed = [1, 2]\n", (), "list the seeds in sweep.seeds"),
        ("[sweep]\nseeds = [1, 1]\n", (), "names a seed twice"),
        ("[training]\nsteps = 1\n", (), r"neither axes nor seeds. Add a table \[sweep.axes\]"),
        (HEAD, ("seed=4",), r"seed is set by the command line.*Write sweep.seeds=4 instead of seed=4"),
        (AXES, ("precision=fp16",), "precision.preset is set by the command line and by the axis precision"),
        (AXES, ("sweep.only=[{precison='fp16'}]",), "'precison', which is no axis of the sweep. Did you mean 'precis"),
        (AXES, ("sweep.only=[{precision='fp8'}]",), "'fp8', which is no value of the axis precision. Its values are"),
        (AXES, ("sweep.only=[{precision='fp16'}]", "sweep.exclude=[{precision='fp16'}]"), "leave no combination"),
        (
            "[sweep.axes]\n'model.name' = ['a/b', 'a b']\n",
            (),
            "'a/b' and 'a b', which would both be written a-b in the n",
        ),
        ("[sweep.axes]\n'model.name' = ['A', 'a']\n", (), "cells model=A and model=a would differ in upper and lower"),
        ("[sweep.axes.x]\n'a b' = {}\n'a-b' = {training.steps = 1}\n", (), "values 'a b' and 'a-b', which would both"),
        ("[sweep.axes.x]\na = {seed = 0}\nb = {}\n", (), "the axis x sets the seed"),
        ("[sweep.axes.x]\na = {training.steps = 3}\nb = {training.steps = 3}\n", (), "x=a and x=b have the same setti"),
        ("[sweep.axes]\n'model.name' = ['" + "a" * 201 + "']\n", (), "too many for the name of a folder"),
        (
            "[sweep.axes]\n'algorithm.preset' = ['grpo']\n[sweep.axes.x]\na = {algorithm = 'gspo'}\n",
            (),
            "algorithm.preset is set by the axis algorithm.preset and by the axis x. Leave one of them out",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_a_fix(
    expand: Expand, text: str, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(text, *overrides)
