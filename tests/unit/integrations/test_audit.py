"""The audit: each framework's verdict as its source has it, recognition, versions, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from betterhalf import cli
from betterhalf.errors import InputError
from betterhalf.integrations.audit.decide import dtype_of
from betterhalf.integrations.audit.frameworks import FRAMEWORKS
from betterhalf.integrations.audit.records import ROLES
from betterhalf.integrations.audit.run import audit_file

CONFIGS = Path(__file__).parents[2] / "configs" / "audit"

CHECKPOINT = "depends on the checkpoint's dtype"

# Values of (compute, masters, reduction, wire, engine, kv, scaler), and whether the audit passes. Written from a
# reading of each framework's source (docs/audit.md), not from the program's output.
EXPECTED: dict[str, tuple[tuple[str, ...], bool]] = {
    "trl_colocate_fp16.yaml": (("fp16", "fp32", "depends*", "fp32", CHECKPOINT, CHECKPOINT, "dynamic"), False),
    "trl_server_fp16.json": (("fp16", "fp32", "depends*", "fp32", "depends*", "depends*", "dynamic"), False),
    "trl_defaults.yaml": (("bf16", "fp32", "depends*", "fp32", "bf16", "bf16", "none"), True),
    "trl_async_fp16.yaml": (("fp16", "fp32", "depends*", "fp32", "depends*", "depends*", "dynamic"), False),
    "verl_veomni.yaml": (("bf16", "fp32", "fp32", "fp32", "bf16", "bf16", "none"), True),
    "verl_torchtitan_fp16.sh": (("bf16", "fp32", "fp32", "bf16", "fp16", "fp16", "none"), False),
    "verl_fsdp_documented_key.sh": (("bf16", "fp32", "fp32", "fp32", "fp16", "fp16", "none"), False),
    "verl_fsdp_fp16.yaml": (("fp16", "fp32", "fp32", "fp32", "fp16", "fp16", "dynamic"), True),
    "verl_megatron_fp16.sh": (("fp16", "fp32", "fp32", "fp16", "fp16", "fp16", "dynamic"), True),
    "openrlhf_fp16.sh": (("fp16", "fp32", "fp16", "fp16", "bf16", "bf16", "dynamic"), False),
    "slime_fp16.sh": (("fp16", "fp32", "fp32", "fp16", "fp16", "fp16", "dynamic"), False),
    "prime_rl_fp16_engine.toml": (("bf16", "fp32", "fp32", "bf16", "fp16", "fp16", "none"), False),
    "skyrl_fsdp_fp16.yaml": (("bf16", "fp32", "fp32", "fp16", "fp16", "fp16", "none"), False),
    "skyrl_megatron.sh": (("bf16", "fp32", "fp32", "bf16", "bf16", "bf16", "none"), True),
    "nemo_rl_dtensor_fp16.yaml": (("fp16", "fp32", "fp32", "fp16", "fp16", "fp16", "none"), False),
    "nemo_rl_megatron_half_set.yaml": (("fp16", "fp32", "fp16", "fp16", "fp16", "fp16", "none"), False),
    "nemo_rl_megatron_fp16.yaml": (("fp16", "fp32", "fp16", "fp16", "fp16", "fp16", "dynamic"), True),
    "nemo_rl_sglang.yaml": (("bf16", "fp32", "fp32", "bf16", "bf16", "bf16", "none"), True),
    "nemo_rl_megatron_generation_fp16.yaml": (("fp16", "fp32", "fp32", "fp16", "fp16", "fp16", "dynamic"), True),
    "areal_archon.yaml": (("bf16", "bf16", "fp32", "bf16", "bf16", "bf16", "none"), False),
    "areal_megatron_fp16.yaml": (("fp16", "fp32", "fp32", "fp16", "fp16", "fp16", "dynamic"), True),
    "areal_fsdp_fp16.yaml": (("fp16", "fp32", "fp32", "fp16", "fp16", "fp16", "none"), False),
    "roll_megatron_fp16.yaml": (("fp16", "fp32", "fp16", "fp16", "fp16", "fp16", "dynamic"), True),
    "roll_fsdp2_model_dtype.yaml": (("bf16", "fp32", "fp32", "fp32", "fp16", "fp16", "none"), False),
    "roll_fsdp2_fp16.yaml": (("fp16", "fp16", "fp32", "fp16", "fp16", "fp16", "dynamic"), False),
}
SHOWN = ("compute", "masters", "reduction", "wire", "engine", "kv", "scaler")

# A word of the sentence that names each configuration's problem, and a word of the way to FP16.
SAID = {
    "trl_colocate_fp16.yaml": ("without a message", "trl vllm-serve"),
    "verl_fsdp_documented_key.sh": ("fsdp_config.dtype has no effect", "mixed_precision.param_dtype = fp16"),
    "trl_async_fp16.yaml": ("GradScaler refuses", "vllm serve MODEL --dtype float16"),
    "verl_torchtitan_fp16.sh": ("torchtitan.dtype has no effect", "cannot train in FP16"),
    "areal_archon.yaml": ("master weights in bf16", "neither a loss scaler nor FP32 master weights"),
    "openrlhf_fp16.sh": ("first weight sync", "cannot run RL in FP16"),
    "slime_fp16.sh": ("assert update_successful", "cannot train in FP16"),
    "prime_rl_fp16_engine.toml": ("computes in bf16 and the engine in fp16", "cannot train in FP16"),
    "skyrl_fsdp_fp16.yaml": ("autocast still computes in BF16", "cannot train in FP16"),
    "nemo_rl_dtensor_fp16.yaml": ("without a loss scaler", "megatron_cfg.enabled = true"),
    "nemo_rl_megatron_half_set.yaml": ("refused at start", "optimizer.fp16 = true"),
    "areal_megatron_fp16.yaml": ("read by nothing", "have no effect"),
    "areal_fsdp_fp16.yaml": ("without a loss scaler", "megatron:..."),
    "roll_fsdp2_model_dtype.yaml": ("model_args.dtype of actor_train has no effect", "megatron_train"),
    "roll_fsdp2_fp16.yaml": ("never calls zero_grad", "megatron_train"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_example_runs_what_its_framework_s_source_says(name: str) -> None:
    expected, passed = EXPECTED[name]
    audit = audit_file(CONFIGS / name)
    found = {finding.role: finding.value for finding in audit.findings}
    for role, value in zip(SHOWN, expected, strict=True):
        assert found[role] == value or (value == "depends*" and found[role].startswith("depends on ")), (role, found)
    assert audit.passed is passed
    assert found["logprobs"] == "fp32" or found["logprobs"].startswith("depends on flash-attn")


@pytest.mark.parametrize("name", SAID)
def test_the_problem_and_the_way_to_fp16_are_named(name: str) -> None:
    audit = audit_file(CONFIGS / name)
    problem, way = SAID[name]
    assert any(problem in sentence for sentence in (*audit.differences, *audit.notes))
    assert way in " ".join((*audit.change, audit.advice))


def test_there_are_examples_for_every_framework_and_no_file_without_a_verdict() -> None:
    files = {file.name for file in CONFIGS.iterdir()} - {"nemo_rl_base.yaml"}
    assert files == set(EXPECTED)
    assert {audit_file(CONFIGS / name).framework for name in EXPECTED} == set(FRAMEWORKS)


@pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_every_table_decides_every_role_without_conditions_at_the_end(framework: object) -> None:
    """A role whose last rule has conditions could be left undecided, and a framework without a last recipe, too."""
    rules = {role: [rule for rule in framework.rules if rule.role == role] for role in ROLES}  # type: ignore[attr-defined]
    assert {role for role, found in rules.items() if not found or found[-1].when} == set()
    last = framework.recipes[-1].when  # type: ignore[attr-defined]
    assert last == () or all(condition.role == "scaler" for condition in last)
    assert all(rule.source and rule.why for found in rules.values() for rule in found)


def test_a_setting_that_looks_like_precision_without_a_rule_is_named_and_fails(tmp_path: Path) -> None:
    text = (CONFIGS / "verl_fsdp_fp16.yaml").read_text() + "trainer:\n  activation_dtype: bfloat16\n"
    path = tmp_path / "config.yaml"
    path.write_text(text)
    audit = audit_file(path)
    assert audit.unknown == ("trainer.activation_dtype = bfloat16",) and not audit.passed


def test_a_script_with_trl_s_asynchronous_trainer_is_not_taken_for_the_other_one(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    engines = {}
    for script in ("grpo.py", "async_grpo.py"):
        path.write_text(f"accelerate launch examples/{script} --num_generations 8\n")
        engines[script] = next(finding for finding in audit_file(path).findings if finding.role == "engine").value
    assert engines["grpo.py"] == "bf16"  # without vLLM, the trainer's own module samples
    assert engines["async_grpo.py"].startswith("depends on --dtype of vllm serve")


def test_a_trainer_that_cannot_send_weights_to_its_engine_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    both = "policy: {precision: bfloat16, megatron_cfg: {enabled: %s}, generation: {backend: %s, sglang_cfg: {}}}\n"
    for on, backend, said in (
        ("true", "sglang", "only DTensor workers send weights to SGLang"),
        ("false", "megatron", "only Megatron's workers sample with Megatron"),
    ):
        path.write_text(both % (on, backend))
        assert any(said in difference for difference in audit_file(path).differences)


def test_veomni_without_mixed_precision_has_bf16_master_weights(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("actor_rollout_ref: {actor: {strategy: veomni, veomni: {mixed_precision: false}}}\n")
    audit = audit_file(path)
    found = {finding.role: finding.value for finding in audit.findings}
    assert (found["compute"], found["masters"], found["reduction"], found["wire"]) == ("bf16",) * 4
    assert any("master weights in bf16" in difference for difference in audit.differences)


def test_a_value_that_is_resolved_at_launch_is_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text('actor_rollout_ref:\n  rollout:\n    dtype: "${oc.env:ROLLOUT_DTYPE}"\n')
    engine = next(finding for finding in audit_file(path).findings if finding.role == "engine")
    assert engine.value == "depends on ${oc.env:ROLLOUT_DTYPE}, which the file does not resolve"


@pytest.mark.parametrize(("name", "text"), [("a.yaml", "${oc.env:HALF}"), ("a.sh", "$HALF"), ("a.sh", "$(half)")])
def test_a_switch_that_is_resolved_at_launch_is_not_taken_as_off(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(
        f"fp16: {text}\nuse_vllm: true\nnum_generations: 8\n"
        if name == "a.yaml"
        else f"trl grpo --use_vllm true --fp16 {text}\n"
    )
    found = {finding.role: finding.value for finding in audit_file(path).findings}
    assert found["compute"] == found["scaler"] == f"depends on {text}, which the file does not resolve"
    assert found["masters"] == "fp32"  # does not depend on the switch
    assert not audit_file(path).passed


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"fp16": true,\r\n"use_vllm": true, "num_generations": 8}\r\n')
    assert next(finding for finding in audit_file(path).findings if finding.role == "compute").value == "fp16"


def test_a_yaml_merge_is_no_key_that_is_set_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("x: &a {fp16: false}\n<<: *a\nfp16: true\nuse_vllm: true\nnum_generations: 8\n")
    assert next(finding for finding in audit_file(path).findings if finding.role == "compute").value == "fp16"


def test_the_last_of_two_equal_keys_counts_and_a_tilde_removes_one(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    start = "python -m verl.trainer.main_ppo actor_rollout_ref.rollout.dtype=bfloat16 "
    values = {}
    for end in ("++actor_rollout_ref.rollout.dtype=float16", "~actor_rollout_ref.rollout.dtype="):
        path.write_text(start + end)
        values[end[0]] = next(f for f in audit_file(path).findings if f.role == "engine")
    assert values["+"].value == "fp16"
    assert values["~"].value == "bf16" and "is not set" in values["~"].rule


@pytest.mark.parametrize(
    ("text", "short"),
    [
        *(("float16", "fp16"), ("torch.bfloat16", "bf16"), ("half", "fp16"), ("FP32", "fp32"), ("float", "fp32")),
        *(("fp8_e4m3", "fp8"), ("float8_e5m2", "fp8"), ("auto", None), ("fp17", None), ("float160", None)),
    ],
)
def test_names_of_dtypes(text: str, short: str | None) -> None:
    assert dtype_of(text) == short


YAML = "actor_rollout_ref:\n  rollout:\n    dtype: float16\n"

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)
"""Ten million values in seven lines."""


@pytest.mark.parametrize(
    ("name", "text", "option", "message"),
    [
        ("a.yaml", "lr: 1.0e-6\n", None, "no key by which audit recognises a framework.*verl 0.9.1"),
        ("a.yaml", YAML, "easyr1", "does not know the framework 'easyr1'. It knows areal 1.0.4"),
        ("a.yaml", YAML, "verl==0.7.0", "no rules for verl 0.7.0: they were read from 0.9.1"),
        ("a.yaml", YAML + "actor_train: {model_args: {dtype: fp16}}\n", None, "may be of roll or verl.*--framework"),
        ("a.yaml", YAML.replace("float16", "fp17"), None, "fp17, which is no dtype"),
        ("a.yaml", YAML + "  actor: {strategy: automodel}\n", None, "no rules for .*strategy = automodel"),
        ("a.yaml", "actor: {backend: 'titan:d2'}\nrollout: {backend: 'vllm:d1'}\n", "areal", "no rules for .*titan"),
        ("a.yaml", "policy: {precision: float16, generation: {backend: trtllm}}\n", None, "no rules for .*trtllm"),
        ("a.yaml", "defaults: lost.yaml\npolicy: {precision: float16}\n", None, "inherits from lost.yaml"),
        ("a.yaml", "a: [", None, "is not valid YAML"),
        (
            "a.toml",
            "[trainer.optim]\nlr = 1\n[trainer.model]\nreduce_dtype='float16'\n",
            None,
            "takes bfloat16 or float32",
        ),
        ("a.json", "[1]", None, "holds no keys"),
        ("a.sh", " \n", None, "a.sh is empty. Give audit"),
        ("a.py", "args = GRPOConfig(fp16=True)\n", None, "is Python, which audit does not run. .* as JSON"),
        ("a.yaml", "fp16: true\nuse_vllm: true\nfp16: false\n", None, "not valid YAML: it sets fp16 twice"),
        ("a.json", '{"fp16": true, "fp16": false}', None, "not valid JSON: it sets fp16 twice"),
        ("a.yaml", "a: &a [*a]\n", None, "nests values too deeply, or inside themselves"),
        ("a.json", "[" * 50_000 + "]" * 50_000, None, "nests values too deeply"),
        ("a.yaml", BOMB, None, "aliases stand for more than 100,000 values"),
        ("a.yaml", "#" * 1_000_001, None, "a.yaml has more than 1000 kB"),
        ("a.sh", "train.py --pretrain x --ds.param_dtype fp16", None, "a key of OpenRLHF before 0.10"),
        (
            "a.sh",
            "train.py --hf-checkpoint x 'open",
            None,
            "a quote or an array that never closes.*begins with .train.py",
        ),
        ("a.sh", "true\n" * 9 + "echo it's\n" + "true\n" * 20_000, None, "never closes.*begins with .echo it's"),
        ("a.toml", "[actor_rollout_ref]\nx = 1\n", None, "is a toml file, but verl is configured in yaml or shell"),
    ],
)
def test_bad_input_ends_with_status_2_and_the_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, option: str | None, message: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        audit_file(path, option)
    assert cli.main(["audit", str(path), *(["--framework", option] if option else [])]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_two_launches_in_one_script_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text("python -m verl.trainer.main_ppo actor_rollout_ref.rollout.dtype=half\n" * 2)
    with pytest.raises(InputError, match="starts training 2 times"):
        audit_file(path)


def test_the_verb_prints_the_table_and_json_and_fails_on_a_difference(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(CONFIGS / "verl_fsdp_documented_key.sh")
    assert cli.main(["audit", path]) == 1
    shown = capsys.readouterr().out
    assert "verl, by rules read from 0.9.1" in shown and "rollout engine      fp16" in shown
    assert cli.main(["audit", path, "--framework", "verl==0.9.1", "--json"]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["roles"]["compute"]["value"] == "bf16"
    assert result["roles"]["engine"]["key"] == "actor_rollout_ref.rollout.dtype"
    assert result["differences"] == ["the trainer computes in bf16 and the engine in fp16"]
    assert cli.main(["audit", str(CONFIGS / "verl_fsdp_fp16.yaml"), "--json"]) == 0


def test_the_audit_loads_no_torch() -> None:
    code = "import sys; from betterhalf import cli; cli.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    path = str(CONFIGS / "trl_defaults.yaml")
    subprocess.run([sys.executable, "-c", code, "audit", path], check=True, capture_output=True)


DOCS = Path(__file__).parents[3] / "docs"


def test_the_page_names_every_framework_with_its_versions() -> None:
    rows = [line for line in (DOCS / "audit.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    for framework in FRAMEWORKS.values():
        assert any(framework.title in row and all(version in row for version in framework.versions) for row in rows)


def test_our_keys_on_the_page_for_verl_exist() -> None:
    from betterhalf.config.keys import all_keys

    text = (DOCS / "verl.md").read_text(encoding="utf-8").split("## Which metric")[0]
    cells = [row.split(" | ")[1] for row in text.splitlines() if row.startswith("| `")]
    named = [word.strip("`").split(" = ")[0] for cell in cells for word in cell.split(", ") if word.startswith("`")]
    whole = [name for name in named if not name.startswith((".", '"')) and "." in name]
    assert len(whole) > 20
    assert set(whole) <= set(all_keys())
