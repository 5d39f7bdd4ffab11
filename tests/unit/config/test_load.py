"""Loading files, `extends` and overrides: the resulting configuration, and the message of each error."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from betterhalf.config.load import config_difference, load_config, resolve_experiment, resolved_json, same_except
from betterhalf.config.overrides import expand
from betterhalf.config.render import toml_text
from betterhalf.config.schema import MathTask, PerfectibleTask, RunConfig, WatchdogLevel
from betterhalf.errors import ConfigError

FORMATS = "fp16, bf16, fp32, e8m2, e8m3, e8m4, e8m5, e8m6"
EMULATED = "Emulated formats have 8 exponent bits and 2 to 6 mantissa bits, e8m2 to e8m6."


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


def test_no_file_and_no_override_give_the_schema_defaults() -> None:
    assert load_config(None) == RunConfig()


def test_a_file_extends_another_relative_to_itself_and_wins(tmp_path: Path) -> None:
    write(tmp_path, "base/root.toml", "seed = 1\n[training]\nsteps = 7\ngroup_size = 3\noptimizer_steps = 1\n")
    write(tmp_path, "base/middle.toml", 'extends = "root.toml"\n[training]\nsteps = 8\n')
    leaf = write(tmp_path, "run/leaf.toml", 'extends = "../base/middle.toml"\nseed = 5\n')
    config = load_config(leaf)
    assert (config.seed, config.training.steps, config.training.group_size) == (5, 8, 3)


def test_overrides_win_over_files_and_the_last_one_over_the_others(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", "[training]\nsteps = 7\n")
    assert load_config(path, ["training.steps=8", "training.steps=9"]).training.steps == 9


def test_the_file_names_the_run_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "fast.toml", "")).name == "fast"
    assert load_config(write(tmp_path, "slow.toml", 'name = "mine"')).name == "mine"
    assert load_config(tmp_path / "fast.toml", ["name=other"]).name == "other"


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", 'extends = "b.toml"')
    write(tmp_path, "b.toml", 'extends = "c.toml"')
    write(tmp_path, "c.toml", 'extends = "b.toml"')
    with pytest.raises(ConfigError, match="circle: b.toml -> c.toml -> b.toml"):
        load_config(tmp_path / "a.toml")


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", 'extends = "gone.toml"')
    with pytest.raises(ConfigError, match="a.toml extends 'gone.toml', which does not exist.*the folder of a.toml"):
        load_config(path)


def test_a_toml_error_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", "seed = 1\nsteps = = 2\n")
    with pytest.raises(ConfigError, match=r"a.toml is not valid TOML: .*line 2"):
        load_config(path)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="a.toml is not valid TOML"):
        load_config(tmp_path / "a.toml")


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "demo.toml", "")
    with pytest.raises(ConfigError, match="no experiment file .*Did you mean '.*/demo.toml'"):
        load_config(tmp_path / "dmo.toml")


def test_experiments_of_the_package_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_experiment("experiments/sanity/demo.toml") == resolve_experiment("sanity/demo.toml")
    assert load_config("experiments/sanity/demo.toml").model.name == "demo"


def test_a_local_file_hides_one_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "experiments/sanity/demo.toml", "seed = 77")
    assert load_config("experiments/sanity/demo.toml").seed == 77


def test_a_run_folder_serves_as_an_experiment(tmp_path: Path) -> None:
    config = load_config(None, ["seed=3", "name=again", "algorithm.overlong_buffer=4"])
    write(tmp_path, "config.json", json.dumps(resolved_json(config)))
    assert load_config(tmp_path) == config
    assert load_config(tmp_path / "config.json", ["seed=4"]).seed == 4


def test_json_that_is_not_an_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no settings"):
        load_config(write(tmp_path, "config.json", "[1, 2]"))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("precision=bf16", "precision.preset", "bf16"),
        ("precision.rollout_dtype=bf16", "precision.rollout_dtype", "bf16"),
        ("precision.rollout_dtype=none", "precision.rollout_dtype", None),
        ("algorithm=gspo", "algorithm.preset", "gspo"),
        ("algorithm.correction=none", "algorithm.correction.level", "none"),
        ("engine=native", "engine.type", "native"),
        ("model=3", "model.name", "3"),
        ("model=org/name", "model.name", "org/name"),
        ('model="quoted name"', "model.name", "quoted name"),
        ("model.revision=1e5", "model.revision", "1e5"),
        ("name=true", "name", "true"),
        ("optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("optimizer.betas=0.8,0.9", "optimizer.betas", [0.8, 0.9]),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", [0.8, 0.9]),
        ("arms=bf16", "sanity.arms", ["bf16"]),
        ("arms=fp16, bf16,fp32", "sanity.arms", ["fp16", "bf16", "fp32"]),
        ("sanity.arms=fp32", "sanity.arms", ["fp32"]),
        ("evaluate.keep_best=True", "evaluate.keep_best", True),
        ("logging.trackers=wandb, tensorboard", "logging.trackers", ["wandb", "tensorboard"]),
        ("training.steps=1_000", "training.steps", 1000),
        ("evaluate.max_prompts=12", "evaluate.max_prompts", 12),
        ("task.terms=4", "task.terms", 4),
        ("name=a=b", "name", "a=b"),
        ("precision.pairs=matched", "precision.pairs", "matched"),
        ("precision.pairs=fp32/bf16", "precision.pairs", ["fp32/bf16"]),
        ("precision.pairs=fp32/bf16,bf16/bf16", "precision.pairs", ["fp32/bf16", "bf16/bf16"]),
        ("precision.fp32_modules=model.layers.3.mlp, 4", "precision.fp32_modules", ["model.layers.3.mlp", "4"]),
        ("precision.fp32_modules=[]", "precision.fp32_modules", []),
        ("watchdog.levels=[]", "watchdog.levels", []),
        ("engine=vllm", "engine.type", "vllm"),
    ],
)
def test_overrides_are_read_as_their_key_wants(override: str, key: str, value: Any) -> None:
    found: Any = resolved_json(load_config(None, [override]))
    for part in key.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "override",
    [
        'watchdog.levels=[{metric = "mismatch/k3/mean", above = 0.1, action = "stop"}]',
        'watchdog.levels=[{"metric": "mismatch/k3/mean", "above": 0.1, "below": null, "action": "stop"}]',
        'watchdog.levels={metric = "mismatch/k3/mean", above = 0.1, action = "stop"}',
    ],
)
def test_a_list_of_sections_is_taken_as_toml_as_json_and_one_alone(override: str) -> None:
    expected = WatchdogLevel(metric="mismatch/k3/mean", above=0.1, action="stop")
    assert load_config(None, [override]).watchdog.levels == (expected,)


def test_a_file_replaces_the_whole_list_of_sections(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", '[[watchdog.levels]]\nmetric = "budget/predicted_ess"\nbelow = 0.2\n')
    assert load_config(path).watchdog.levels == (WatchdogLevel(metric="budget/predicted_ess", below=0.2),)


def test_an_error_in_a_list_of_sections_names_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", '[[watchdog.levels]]\nmetric = "budget/predicted_ess"\nbelow = "x"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f'watchdog.levels[0].below = "x" must be a number. [{path}]'


def test_shorthand_works_in_files_and_meets_a_table_of_the_base(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", '[precision]\npreset = "fp32"\nallow_difference = true\n')
    path = write(tmp_path, "a.toml", 'extends = "base.toml"\nprecision = "bf16"\n')
    precision = load_config(path).precision
    assert (precision.preset, precision.allow_difference) == ("bf16", True)


def test_a_new_task_type_drops_the_keys_of_the_old(tmp_path: Path) -> None:
    base = write(tmp_path, "base.toml", '[task]\ntype = "arithmetic"\nterms = 5\nseed = 9\n')
    for order in (["task.path=x.jsonl", "task.type=math"], ["task=math", "task.path=x.jsonl"]):
        assert load_config(base, order).task == MathTask(path="x.jsonl")


def test_the_same_task_type_keeps_the_keys_of_the_base(tmp_path: Path) -> None:
    base = write(tmp_path, "base.toml", "[task]\nterms = 5\n")
    task = load_config(base, ["task=arithmetic", "task.seed=2"]).task
    assert task.model_dump() == {
        "type": "arithmetic",
        "style": "running_sum",
        "num_prompts": 4096,
        "held_out": 0.0,
        "held_out_seed": 0,
        "part": "train",
        "bad_rows": "refuse",
        "allow_changed_data": False,
        "seed": 2,
        "terms": 5,
    }


def test_the_task_inside_a_task_may_leave_its_type_out() -> None:
    task = load_config(None, ["task=perfectible", "task.path=p.jsonl", "task.base.terms=3"]).task
    assert isinstance(task, PerfectibleTask)
    assert task.base.model_dump()["terms"] == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learning_rate=1", "unknown key 'learning_rate'. Did you mean 'optimizer.learning_rate'?"),
        ("lr=1", "unknown key 'lr'. Did you mean 'optimizer.learning_rate'?"),
        ("training.learning_rate=1", "Did you mean 'optimizer.learning_rate'?"),
        ("optimiser.learning_rate=1", "unknown key 'optimiser.learning_rate'. Did you mean 'optimizer.learning_rate'?"),
        ("training.stpes=1", "unknown key 'training.stpes'. Did you mean 'training.steps'?"),
        ("precision.loss_scale.intial=1", "Did you mean 'precision.loss_scale.initial'?"),
        ("zzz=1", "unknown key 'zzz'. `betterhalf config EXPERIMENT` lists the valid keys."),
        ("training.steps=0", "training.steps = 0 must be at least 1."),
        ("training.steps=12.5", "training.steps = 12.5 must be a whole number."),
        ("training.steps=many", 'training.steps = "many" must be a whole number.'),
        ("seed=true", "seed = true must be a whole number."),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate = -1 must be at least 0."),
        ("optimizer.eps=0", "optimizer.eps = 0 must be above 0."),
        ("optimizer.eps=nan", "optimizer.eps = nan must be a finite number."),
        ("precision.loss_scale.backoff_factor=1", "must be below 1."),
        ("sanity.upper=1.5", "sanity.upper = 1.5 must be at most 1."),
        ("evaluate.keep_best=maybe", 'evaluate.keep_best = "maybe" must be true or false.'),
        (
            "logging.trackers=tensorboard,wanbd",
            'logging.trackers = "wanbd" is not one of wandb, trackio, mlflow, tensorboard, prometheus. '
            "Did you mean wandb?",
        ),
        ("logging.trackers=wandb,wandb", "logging.trackers=wandb,wandb names a tracker twice. Name each once."),
        (
            "logging.tensorboard=true",
            "Did you mean 'logging.trackers'? It is a list: logging.trackers=wandb,tensorboard.",
        ),
        ("trainer.project_name=x", "Did you mean 'logging.project'?"),
        (
            "precision=fp61",
            'precision.preset = "fp61" is not one of ' + FORMATS + ". Did you mean fp16?",
        ),
        ("arms=[]", "sanity.arms = [] must be a list of at least 1."),
        (
            "arms=fp16,bf61",
            'sanity.arms = "bf61" is not one of ' + FORMATS + ". Did you mean bf16?",
        ),
        (
            "precision=e8m7",
            f"{EMULATED} e8m7 is bf16 itself.",
        ),
        (
            "precision.kv_dtype=e8m9",
            f"e8m6. {EMULATED}",
        ),
        ("arms=fp16,e5m2", f"is not one of {FORMATS}. Did you mean e8m2?"),
        (
            "precision.pairs=bf16/e8m1",
            f"TRAINER/ROLLOUT. {EMULATED} Write",
        ),
        ("algorithm=grop", "Did you mean grpo?"),
        (
            "task=mth",
            'task.type = "mth" is not one of arithmetic, math, reasoning_gym, python, environment, perfectible. Did '
            "you mean math?",
        ),
        ("task=math", "task.path is required (JSONL file or Parquet file"),
        ("task=perfectible", "task.path is required (A `perfectible.jsonl` that `betterhalf sanity` wrote). Set it."),
        ("task.path=x", "task.path is not a key of the chosen task.type."),
        ("optimizer.betas=0.9", "optimizer.betas has too few values. Give all 2,"),
        ("optimizer.betas=1,2,3", "optimizer.betas = [1, 2, 3] must be a list of 2 values."),
        ("precision.pairs=mathced", "precision.pairs = 'mathced' is not full, matched or a list"),
        ("precision.pairs=fp32/bf61", "Write a list such as precision.pairs=fp16/fp16,bf16/bf16."),
        ("precision.pairs=[]", "precision.pairs is empty, so there is nothing to measure"),
        ("engine=vlm", 'engine.type = "vlm" is not one of native, vllm, python. Did you mean vllm?'),
        ("engine.kv_cache_gib=3", "engine.kv_cache_gib is not a key of the chosen engine.type."),
        ("engine.rounding=exactly", "is not one of engine, aligned, exact. Did you mean exact?"),
        ("watchdog.level=[]", "unknown key 'watchdog.level'. Did you mean 'watchdog.levels'?"),
        ("watchdog.levels=3", "watchdog.levels = 3 must be a list."),
        ("watchdog.levels=[3]", "watchdog.levels[0] = 3 does not fit"),
        ("watchdog.levels={above=1}", "watchdog.levels[0].metric is required"),
        ('watchdog.levels={metric="a"}', "has no bound. Set below or above."),
        ('watchdog.levels={metric="a",abov=1,below=1}', "unknown key 'watchdog.levels[0].abov'. Did you mean 'above'?"),
        ('watchdog.levels={metric="a",zzz=1,below=1}', "Its keys are metric, below, above, steps, action."),
        ('watchdog.levels={metric="a",below=1,steps=0}', "watchdog.levels[0].steps = 0 must be at least 1."),
        ('watchdog.levels={metric="a",below=1,action="stpo"}', "Did you mean stop?"),
        ("mismatch=4", "mismatch is a section. Set one of its keys, such as mismatch.sample_fraction."),
        ("sampling.top_p=0", "sampling.top_p = 0 must be above 0."),
        ("sampling.top_k=-2", "sampling.top_k = -2 must be at least -1."),
        ("training.optimizer_steps=9999", "exceeds the 256 rollouts of a step"),
        ("precision", "'precision' is not a setting. Write key=value"),
        ("--seed=3", "Write key=value, such as seed=3."),
    ],
)
def test_wrong_settings_are_refused_in_plain_words(override: str, words: str) -> None:
    text = message(override)
    assert words in text
    assert "\n" not in text
    assert not any(jargon in text for jargon in ("pydantic", "Input should", "validation error", "type="))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.compile_layers=true", "Set training.compile_layers=false, or engine.rounding=aligned."),
        ("precision.half_matmul=native", "Leave out precision.half_matmul, or set engine.rounding=aligned."),
        ("engine=vllm", "engine.rounding is not a key of the chosen engine.type."),
    ],
)
def test_exact_rounding_is_refused_where_it_cannot_hold(override: str, words: str) -> None:
    assert load_config(None, ["engine.rounding=exact"]).exact
    assert not load_config(None, ["engine=vllm"]).exact
    with pytest.raises(ConfigError) as refused:
        load_config(None, ["engine.rounding=exact", override])
    assert words in str(refused.value)


def test_all_errors_are_reported_at_once_with_their_sources(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", "stpes = 3\n[training]\nsteps = 0\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["seed=-1"])
    first, *others = str(caught.value).splitlines()
    assert first == "the configuration has 3 errors:"
    assert sorted(line.strip() for line in others) == [
        "seed = -1 must be at least 0. [command line]",
        f"training.steps = 0 must be at least 1. [{path}]",
        f"unknown key 'stpes'. Did you mean 'training.steps'? [{path}]",
    ]


def test_an_error_between_keys_names_every_source_of_its_section(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", '[task]\ntype = "arithmetic"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["task.held_out=2.5"])
    assert str(caught.value).endswith(f"[{path}, command line]")


def test_differences_name_each_changed_key_once() -> None:
    left = load_config(None, ["seed=1"])
    right = load_config(None, ["seed=2", "precision=bf16"])
    changes = config_difference(left, right)
    assert [(c.key, c.left, c.right) for c in changes] == [("precision.preset", "fp16", "bf16"), ("seed", 1, 2)]
    assert str(changes[0]) == 'precision.preset: "fp16" -> "bf16"'
    assert config_difference(left, left) == []


def test_a_difference_in_a_list_of_sections_shows_both() -> None:
    (change,) = config_difference(load_config(None), load_config(None, ["watchdog.levels=[]"]))
    assert change.key == "watchdog.levels"
    assert str(change).endswith(
        '{ metric = "experts/change_fraction/mean", above = 0.05, steps = 1, action = "warn" }, '
        '{ metric = "policy/ratio/max_negative", above = 50.0, steps = 1, action = "warn" }] -> []'
    )


def test_same_except_means_whole_keys() -> None:
    left = load_config(None)
    right = load_config(None, ["precision=bf16", "precision.loss_scale.floor=0"])
    assert same_except(left, right, "precision")
    assert same_except(left, right, "precision.preset", "precision.loss_scale")
    assert not same_except(left, right, "precision.loss_scale")
    assert not same_except(left, right, "prec")
    assert same_except(left, left)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
rates = st.floats(min_value=1e-12, max_value=1.0)
ratios = st.none() | st.fixed_dictionaries(
    {"level": st.sampled_from(["none", "token", "sequence"])},
    optional={"upper": st.none() | rates, "keep_weight": st.booleans()},
)
tasks = st.fixed_dictionaries({"type": st.just("arithmetic")}, optional={"terms": st.integers(2, 16)}) | (
    st.fixed_dictionaries({"type": st.just("math"), "path": texts})
)
levels = st.fixed_dictionaries(
    {"metric": texts, "below": rates}, optional={"above": st.none() | rates, "steps": st.integers(1, 9)}
)
configs = st.builds(
    lambda **parts: RunConfig.model_validate(parts),
    name=texts,
    seed=st.integers(0, 2**62),
    model=st.fixed_dictionaries({"name": texts, "revision": st.none() | texts}),
    task=tasks | st.fixed_dictionaries({"type": st.just("perfectible"), "path": texts, "base": tasks}),
    algorithm=st.fixed_dictionaries({"surrogate": ratios, "correction": ratios}),
    optimizer=st.fixed_dictionaries({"learning_rate": rates, "eps": rates, "betas": st.tuples(rates, rates)}),
    precision=st.fixed_dictionaries(
        {"preset": st.sampled_from(["fp16", "bf16", "fp32"])},
        optional={
            "pairs": st.sampled_from(["full", "matched", ("fp16/bf16",)]),
            "fp32_modules": st.lists(texts, max_size=2).map(tuple),
        },
    ),
    engine=st.fixed_dictionaries({"type": st.sampled_from(["native", "vllm"])}),
    watchdog=st.fixed_dictionaries({"levels": st.lists(levels, max_size=3).map(tuple)}),
    sanity=st.fixed_dictionaries(
        {"arms": st.lists(st.sampled_from(["fp16", "bf16", "fp32"]), min_size=1, unique=True).map(tuple)}
    ),
)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_resolved_json_loads_back_equal(config: RunConfig) -> None:
    text = json.dumps(resolved_json(config), allow_nan=False)
    assert RunConfig.model_validate(json.loads(text)) == config
    assert config_difference(RunConfig.model_validate_json(text, strict=True), config) == []


@settings(max_examples=60, deadline=None)
@given(configs)
def test_toml_text_loads_back_equal(config: RunConfig) -> None:
    assert RunConfig.model_validate(expand(tomllib.loads(toml_text(config)))) == config
