"""Verbs on adapters as on full weights: report, watchdog, doctor, sweep, sanity, and a reference policy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapter_folders import peft_adapter
from tests.family_matrix import module_logprobs
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from betterhalf.config.grid import load_grid
from betterhalf.config.load import configuration_of, load_config
from betterhalf.config.schema import ModelConfig
from betterhalf.examine.doctor import doctor
from betterhalf.models.loading import load_model
from betterhalf.run_dir import read_json, read_jsonl
from betterhalf.runs.sweep import sweep

pytest.importorskip("peft", reason="needs PEFT; pip install betterhalf[lora]")

Ends = Callable[..., str]
Rows = list[dict[str, Any]]

SMOKE = Path(__file__).parents[2] / "experiments" / "smoke" / "demo.toml"
SMALL = (
    *("training.steps=2", "training.prompts_per_step=4", "training.group_size=4", "training.optimizer_steps=1"),
    *("training.checkpoint_every=1", "optimizer.learning_rate=2e-3", "logging.console=quiet"),
)
LOST, KL = "mismatch/lost_update_fraction", "policy/reference_kl/mean"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter of the demo model whose product is not 0."""
    folder = tmp_path_factory.mktemp("adapter")
    peft_adapter(load_model(ModelConfig(name="demo")).module, folder, lora_alpha=4)
    return folder


def scaled(folder: Path, layer: str, factor: float) -> Path:
    """Multiply B of all layers whose name contains `layer`, in place."""
    file = folder / "adapter_model.safetensors"
    values = load_file(file)
    save_file({k: v * factor if layer in k and "lora_B" in k else v for k, v in values.items()}, file, {"format": "pt"})
    return folder


@pytest.fixture
def train(ends: Ends, tmp_path: Path) -> Callable[..., Path]:
    """Train the demo model for two small steps, and return the folder of the run."""

    def run(*settings: str, name: str = "run", status: int = 0) -> Path:
        folder = tmp_path / name
        ends(status, "train", SMOKE, *SMALL, f"run_dir={folder}", *settings)
        return folder

    return run


def rows(run: Path) -> Rows:
    same = ("time/", "system/")
    return [{k: v for k, v in row.items() if not k.startswith(same)} for row in read_jsonl(run / "metrics.jsonl")]


def test_the_page_of_a_run_shows_lost_updates_and_the_merge(train: Callable[..., Path], adapter: Path) -> None:
    run = train(f"lora.adapter={adapter}")
    page = (run / "report.html").read_text(encoding="utf-8")
    first, last = (row[LOST] for row in rows(run))
    (said,) = re.findall(r'<p id="lost-updates-d" hidden>(.*?)</p>', page)
    assert f"2 steps, first {first:.4g}, last {last:.4g}" in said and 0 < last < 1
    assert f"rank 4, scale 1, from {adapter}, merged in fp32, rounded once" in page


def test_lost_updates_wake_the_watchdog_from_the_first_merge_on(train: Callable[..., Path]) -> None:
    """New adapters are 0 in step 1: nothing is lost yet, and the level is not one that cannot fire."""
    level = f'watchdog.levels=[{{metric = "{LOST}", above = 1e-9, action = "stop"}}]'
    whole, run = train("lora.rank=4", name="whole"), train("lora.rank=4", level, status=3)
    assert rows(run) == rows(whole)[:1]
    (stop,) = read_jsonl(run / "watchdog.jsonl")
    assert (stop["step"], stop["value"]) == (2, rows(whole)[1][LOST])
    train("lora.rank=4", "watchdog.levels=[]", "--resume")
    assert rows(run) == rows(whole)


# -- a reference policy


def k3(policy: Tensor, reference: Tensor) -> Tensor:
    gap = reference - policy
    return gap.exp() - 1 - gap


def estimated(run: Path, policy: Any, reference: Any, tokenizer: PreTrainedTokenizerFast) -> float:
    """Return the mean of k3 over the completion tokens of step 2, by plain transformers modules."""
    values = []
    for row in read_jsonl(run / "rollouts.jsonl"):
        if row["step"] == 2:
            prompt, completion = tokenizer.encode(row["prompt"]), row["token_ids"]
            ids = (*prompt, *completion)
            pair = (module_logprobs(module, ids)[len(prompt) - 1 :] for module in (policy, reference))
            values.append(k3(*pair))
    assert len(values) == 16
    return float(torch.cat(values).mean())


def test_the_reference_is_the_base_with_the_adapter_as_it_was(train: Callable[..., Path], adapter: Path) -> None:
    from peft import PeftModel

    settings = ("precision=fp32", "algorithm.kl.coefficient=0.1", "logging.rollouts_per_step=16")
    run = train(f"lora.adapter={adapter}", *settings)
    first, second = rows(run)
    assert first[KL] == first["policy/reference_kl/max"] == first["policy/kl_loss"] == 0.0
    base = load_model(ModelConfig(name="demo"))
    policy, start = (
        PeftModel.from_pretrained(load_model(ModelConfig(name="demo")).module, str(adapter)).eval() for _ in range(2)
    )
    trained = load_file(run / "checkpoints" / "step-000001" / "model.safetensors")
    prefixed = {f"base_model.model.{name}": value for name, value in trained.items()}
    assert not policy.load_state_dict(prefixed, strict=False).unexpected_keys
    assert second[KL] == pytest.approx(estimated(run, policy, start, base.tokenizer), rel=1e-3)
    assert estimated(run, policy, base.module, base.tokenizer) > 3 * second[KL], "the base is no reference here"


@pytest.mark.parametrize("merge", ["weights", "adapter"])
def test_a_resumed_run_keeps_the_reference_of_its_start(
    train: Callable[..., Path], adapter: Path, merge: str, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    settings = (f"lora.adapter={own}", f"lora.merge={merge}", "algorithm.kl.coefficient=0.1")
    whole = train(*settings, name="whole")
    assert [row[KL] == 0.0 for row in rows(whole)] == [True, False]
    cut = Path(shutil.copytree(whole, tmp_path / "cut"))
    shutil.rmtree(cut / "checkpoints" / "step-000002")
    train(*settings, "--resume", name="cut")
    assert rows(cut) == rows(whole)
    for name in ("model.safetensors", "optimizer.safetensors"):
        mine, theirs = (run / "checkpoints" / "step-000002" / name for run in (cut, whole))
        assert mine.read_bytes() == theirs.read_bytes()


def test_a_resumed_run_refuses_an_adapter_that_has_changed_since(
    train: Callable[..., Path], adapter: Path, tmp_path: Path, ends: Ends
) -> None:
    own = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    settings = (f"lora.adapter={own}", "algorithm.kl.coefficient=0.1")
    run = train(*settings)
    shutil.rmtree(run / "checkpoints" / "step-000002")
    scaled(own, "", 2)
    said = ends(2, "train", SMOKE, *SMALL, *settings, f"run_dir={run}", "--resume")
    assert "is not the model that this run loads: its files have changed" in said


# -- other verbs

EXAMINED = {
    "task": {"type": "arithmetic", "num_prompts": 8},
    "doctor": {"prompts": 2, "group_size": 1, "max_tokens": 12},
    "probe": {"bootstrap": 20},
    "logging": {"console": "quiet"},
}


def test_doctor_finds_the_overflow_of_an_adapter_and_recommends_a_cure_with_it(adapter: Path, tmp_path: Path) -> None:
    own = scaled(Path(shutil.copytree(adapter, tmp_path / "adapter")), "layers.1.mlp.down_proj", 1e6)
    found = doctor("demo", configuration_of(EXAMINED | {"lora": {"adapter": str(own)}}), str(tmp_path / "run"))
    verdict = found["verdicts"]["fp16"]
    assert verdict["verdict"] == "unsafe" and found["verdicts"]["bf16"]["verdict"] != "unsafe"
    assert any(name.startswith("model.layers.1.mlp.down_proj") for name in verdict["modules"])
    file = tmp_path / "recommended.toml"
    file.write_text(found["config"], encoding="utf-8")
    recommended = load_config(file)
    assert recommended.lora.adapter == str(own) and recommended.precision.preset == found["recommended"]


def test_doctor_of_new_adapters_finds_the_base(tmp_path: Path) -> None:
    """B is 0, so that values are the base's, and only the gradients of B are not 0."""
    plain, adapted = (
        doctor("demo", configuration_of(EXAMINED | {"lora": lora}), str(tmp_path / f"run-{number}"))
        for number, lora in enumerate(({}, {"rank": 2}))
    )
    assert adapted["recommended"] == plain["recommended"] == "fp16" and adapted["passed"]
    assert adapted["engine_agrees"] == plain["engine_agrees"]
    assert [pair["k3"] for pair in adapted["mismatch"]] == [pair["k3"] for pair in plain["mismatch"]]


SWEEP = """
device = "cpu"
logging.console = "quiet"
lora.rank = 2
[task]
type = "arithmetic"
[training]
steps = 2
prompts_per_step = 4
group_size = 4
optimizer_steps = 1
[optimizer]
learning_rate = 2e-3
[sweep]
evaluate = "fp32"
evaluation_prompts = 8
curves = ["mismatch/lost_update_fraction"]
[sweep.axes]
"lora.merge" = ["weights", "adapter"]
"""


def test_the_form_of_adapters_is_an_axis_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file, run = tmp_path / "adapters.sweep.toml", tmp_path / "sweep"
    file.write_text(SWEEP, encoding="utf-8")
    result = sweep(load_grid(file, ()), str(run))
    assert (result["cells"], result["finished"], result["failed"]) == (2, 2, {})
    accuracies = [row["accuracy"] for row in read_jsonl(run / "results.jsonl") if row["kind"] == "cell"]
    assert all(0 < accuracy <= 1 for accuracy in accuracies), "evaluated with the adapters of their checkpoints"
    # Unmerged adapters lose nothing, and have no curve.
    (curve,) = read_jsonl(run / "curves.jsonl")
    assert curve["label"] == "merge=weights"
    assert curve[LOST][0] is None and 0 < curve[LOST][1] < 1


def test_sanity_selects_prompts_and_trains_every_arm_from_the_adapter(
    ends: Ends, adapter: Path, tmp_path: Path
) -> None:
    run = tmp_path / "sanity"
    sizes = ("sanity.candidates=12", "sanity.samples=5", "sanity.evaluation_samples=2", "sanity.pass_accuracy=0.1")
    command = ("sanity", SMOKE, *SMALL, *sizes)
    ends(0, *command, f"lora.adapter={adapter}", f"run_dir={run}")
    assert read_json(run / "summary.json")["arms"].keys() == {"fp16", "bf16"}
    for arm in ("fp16", "bf16"):
        (lora,) = (r for r in read_json(run / "arms" / arm / "contract.json")["rows"] if r["region"] == "lora")
        assert f"from {adapter}" in lora["trainer"]
    # With this adapter the policy is noise, so that it solves no prompt.
    noise = scaled(Path(shutil.copytree(adapter, tmp_path / "adapter")), "", 1e3)
    said = ends(2, *command, f"lora.adapter={noise}", "sampling.max_tokens=36", f"run_dir={tmp_path / 'noise'}")
    assert "none of 12 prompts is perfectible: 0 too easy (solved over 80% of the time), 12 too hard" in said
