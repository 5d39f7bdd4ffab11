"""Emulated formats in trainer and engine: seven stored bits are BF16 itself, and fewer are on the grid everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.parity.test_islands import fixed_packs, gaps, half, k3, logprobs, random_model, wings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from betterhalf.algorithms.presets import PRESETS
from betterhalf.batches import Denominators
from betterhalf.config.schema import RunConfig
from betterhalf.errors import ConfigError, WatchdogError
from betterhalf.examine.doctor import doctor
from betterhalf.examine.probe import probe
from betterhalf.examine.probe_text import probe_sentences
from betterhalf.models.loading import load_model
from betterhalf.precision import formats
from betterhalf.precision.contract import compare
from betterhalf.precision.formats import FormatFacts, is_on_grid
from betterhalf.precision.roles import build_precision
from betterhalf.report.page import write_report
from betterhalf.rollout.build import build_engine
from betterhalf.run_dir import RunDir
from betterhalf.runs.assembly import Parts, assemble
from betterhalf.runs.evaluate import evaluate
from betterhalf.runs.export import export
from betterhalf.runs.loop import train_step
from betterhalf.runs.progress import Progress
from betterhalf.runs.train import run_training, train
from betterhalf.runs.weight_sync import sync_weights
from betterhalf.setup import model_checks
from betterhalf.training.policy_trainer import PolicyTrainer

MATMULS = ("native", "fp32_sums")
DENOMINATORS = Denominators(sequences=8, tokens=160, max_tokens=20)


# -- seven stored bits


def demo_parts(matmul: str, name: str, rounding: str) -> Parts:
    """Return the parts of a run of the demo model in BF16, or in the format `name` instead of it."""
    config = RunConfig.model_validate(
        {
            "model": {"name": "demo"},
            "precision": {"preset": "bf16", "half_matmul": matmul},
            "engine": {"rounding": rounding},
            "task": {"type": "arithmetic", "num_prompts": 16},
            "sampling": {"max_tokens": 30},
            "training": {"steps": 3, "prompts_per_step": 4, "group_size": 4, "optimizer_steps": 2},
            "optimizer": {"learning_rate": 1e-3},
            "logging": {"console": "quiet"},
        }
    )
    parts = assemble(config)
    half_roles = dict.fromkeys(("compute_dtype", "wire_dtype", "rollout_dtype", "kv_dtype"), name)
    # `model_copy` does not validate, and so takes a name that no configuration can have.
    precision = replace(parts.precision, roles=parts.precision.roles.model_copy(update=half_roles))
    model = load_model(config.model)
    engine = build_engine(config, model.hf_config, model.stop_token_ids, precision)
    return replace(
        parts,
        precision=precision,
        sides=replace(parts.sides, engine=engine, trainer=PolicyTrainer(model, config=config, precision=precision)),
    )


def three_steps(parts: Parts) -> tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, str]]:
    """Return metrics of three steps, and the masters and the engine's digests after them."""
    sync_weights(parts)
    progress, rows = Progress(policy_version=0), []
    for _ in range(3):
        result = train_step(parts, progress)
        progress = result.progress
        rows.append({key: v for key, v in result.metrics.items() if not key.startswith(("time/", "system/"))})
    parts.task.close()
    return rows, parts.trainer.state().model, parts.engine.digests()


@pytest.mark.parametrize("rounding", ["engine", "aligned"])
@pytest.mark.parametrize("matmul", MATMULS)
def test_seven_stored_bits_are_bf16_bit_for_bit_over_a_run(
    matmul: str, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(formats.FORMATS, "e8m7", FormatFacts(significand_bits=8, exponent_bits=8))  # type: ignore[misc]
    rows, weights, digests = three_steps(demo_parts(matmul, "e8m7", rounding))
    expected_rows, expected_weights, expected_digests = three_steps(demo_parts(matmul, "bf16", rounding))
    assert [repr(row) for row in rows] == [repr(row) for row in expected_rows]
    assert all(torch.equal(weights[name], expected) for name, expected in expected_weights.items())
    assert digests == expected_digests
    assert rows[-1]["policy/version"] == 6


# -- the grid


class _Results(TorchDispatchMode):
    """Keep every BF16 result that operations return, to be looked at once a surrounding mode has rounded it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            # Memory that is only allocated may hold anything.
            if isinstance(part, Tensor) and part.dtype == torch.bfloat16 and "empty" not in func.name():
                self.kept.append((func.name(), part))
        return out


@contextmanager
def every_result_is_on_grid(name: Any) -> Iterator[_Results]:
    with _Results() as seen:
        yield seen
    for operation, result in seen.kept:
        values = result.coalesce().values() if result.is_sparse else result
        assert is_on_grid(values.detach(), name), operation


def e8m3(matmul: str = "fp32_sums", *islands: str) -> dict[str, Any]:
    return half("e8m3", *islands) | {"half_matmul": matmul}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("matmul", MATMULS)
def test_every_bf16_tensor_of_a_pass_forward_and_backward_is_on_the_grid(family: str, matmul: str) -> None:
    trainer, _, _ = wings(random_model(family), e8m3(matmul))
    packs = fixed_packs(trainer.config)
    with every_result_is_on_grid("e8m3") as seen:
        trainer.forward_backward(packs, PRESETS["reinforce"], DENOMINATORS)
        trainer.measure(packs)
    assert {"aten::_to_copy", "aten::mul.Tensor", "aten::add.Tensor", "aten::silu_backward"} <= {
        x for x, _ in seen.kept
    }
    trainer.optim_step(1e-2)
    for name, parameter in trainer.weights.computing():
        assert is_on_grid(parameter, "e8m3"), name
    with every_result_is_on_grid("e8m3"):
        trainer.forward_backward(packs, PRESETS["reinforce"], DENOMINATORS)


def test_the_check_sees_a_pass_that_is_not_rounded() -> None:
    trainer, _, _ = wings(random_model(), {"preset": "bf16"})
    with pytest.raises(AssertionError, match="aten::"), every_result_is_on_grid("e8m6"):
        trainer.measure(fixed_packs(trainer.config))


@pytest.mark.parametrize("matmul", MATMULS)
def test_measured_logprobs_are_those_of_training_and_differ_from_bf16(matmul: str) -> None:
    trainer, _, _ = wings(random_model(), e8m3(matmul))
    for pack in fixed_packs(trainer.config):
        assert torch.equal(trainer.measure([pack])[0].logprobs_C, trainer.score(pack).detach())
    plain, _, _ = wings(random_model(), {"preset": "bf16", "half_matmul": matmul})
    assert (logprobs(plain) - logprobs(trainer)).abs().mean() > 0.01


@pytest.mark.parametrize("island", ["model.layers.1.mlp", "model.layers.1.self_attn"])
def test_islands_and_checkpointing_work_in_an_emulated_format(island: str) -> None:
    trainer, engine, _ = wings(random_model(), e8m3("fp32_sums", island))
    packs = fixed_packs(trainer.config)
    with every_result_is_on_grid("e8m3"):
        trainer.forward_backward(packs, PRESETS["reinforce"], DENOMINATORS)
    again, _, _ = wings(random_model(), e8m3("fp32_sums", island), activation_checkpointing=True)
    again.forward_backward(packs, PRESETS["reinforce"], DENOMINATORS)
    for (name, found), (_, expected) in zip(again.weights.gradients(), trainer.weights.gradients(), strict=True):
        assert torch.equal(found, expected), name
    assert compare(trainer.report(), engine.report(), allow_difference=False).ok


# -- both sides


@pytest.mark.parametrize("rounding", ["engine", "aligned"])
@pytest.mark.parametrize("matmul", MATMULS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_operation_of_the_engine_is_on_the_grid_and_the_contract_shows_it(
    family: str, matmul: str, rounding: str
) -> None:
    trainer, engine, _ = wings(random_model(family), e8m3(matmul), rounding)

    def tap(operation: str, layer: int | None, value: Tensor) -> Tensor:
        assert is_on_grid(value, "e8m3"), (operation, layer)
        return value

    engine.decoder.tap = tap
    gaps(trainer, engine)
    contract = compare(trainer.report(), engine.report(), allow_difference=False)
    assert contract.ok and trainer.report().digests == engine.digests()
    rows = {row.region: (row.trainer, row.engine) for row in contract.rows}
    assert all(rows[region] == ("e8m3", "e8m3") for region in ("compute", "wire", "kv", "held weights", "norm"))
    assert "emulated" in contract.table()


@pytest.mark.parametrize("matmul", MATMULS)
def test_mismatch_grows_fourfold_with_each_bit_and_alignment_removes_it(matmul: str) -> None:
    found = {}
    for name in ("bf16", "e8m5", "e8m3"):
        trainer, engine, _ = wings(random_model(), {"preset": name, "half_matmul": matmul}, "engine")
        found[name] = k3(gaps(trainer, engine))
    assert 4 < found["e8m5"] / found["bf16"] < 64 and 4 < found["e8m3"] / found["e8m5"] < 64
    trainer, engine, _ = wings(random_model(), e8m3("fp32_sums"), "aligned")
    assert k3(gaps(trainer, engine)) < 0.3 * found["e8m3"]


def test_one_coarse_side_is_a_difference_that_the_contract_names() -> None:
    precision = {"preset": "bf16", "compute_dtype": "e8m3", "half_matmul": "fp32_sums", "allow_difference": True}
    trainer, engine, _ = wings(random_model(), precision)
    contract = compare(trainer.report(), engine.report(), allow_difference=False)
    assert contract.first_difference == "compute is e8m3 in the trainer and bf16 in the engine"
    coarse_cache = {"preset": "bf16", "kv_dtype": "e8m3", "half_matmul": "fp32_sums", "allow_difference": True}
    trainer, engine, _ = wings(random_model(), coarse_cache)
    rows = compare(trainer.report(), engine.report(), allow_difference=True).rows
    assert [(row.trainer, row.engine, row.status) for row in rows if row.region == "kv"] == [
        ("bf16", "e8m3", "differs")
    ]


def test_the_engine_reports_a_wire_that_is_finer_than_its_name() -> None:
    trainer, engine, _ = wings(random_model(), e8m3())
    assert engine.report().dtypes["wire"] == "e8m3"
    finer = ((name, tensor.detach().bfloat16()) for name, tensor in trainer.weights.trainable())
    engine.load_weights(finer, policy_version=1)
    assert engine.report().dtypes["wire"] == "bf16" and engine.report().dtypes["weights"] == "e8m3"


def test_a_trainer_continues_from_the_state_of_another_bit_for_bit() -> None:
    trainer, _, _ = wings(random_model(), e8m3())
    trainer.forward_backward(fixed_packs(trainer.config), PRESETS["reinforce"], DENOMINATORS)
    trainer.optim_step(1e-2)
    other, _, _ = wings(random_model(), e8m3())
    assert not torch.equal(logprobs(other), logprobs(trainer))
    other.load(trainer.state())
    assert torch.equal(logprobs(other), logprobs(trainer))
    assert other.report().digests == trainer.report().digests
    assert trainer.scaler.scale == 1


# -- whole commands


def run_config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": "demo"},
            "precision": {"preset": "e8m3"},
            "task": {"type": "arithmetic", "num_prompts": 16},
            "sampling": {"max_tokens": 24},
            "training": {"steps": 1, "prompts_per_step": 4, "group_size": 4, "checkpoint_every": 1},
            "probe": {"prompts": 4, "group_size": 2, "bootstrap": 20, "gradient_completions": 4},
            "logging": {"console": "quiet"},
            **sections,
        }
    )


def test_a_run_says_emulated_and_exports_numbers_of_the_grid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = RunDir.create(tmp_path / "run", resume=False), run_config(logging={"console": "lines"})
    assert run_training(config, run, resume=False, label="x")["emulated"] == ["e8m3"]
    assert "x: e8m3 (emulated)  step 1/1" in capsys.readouterr().err
    assert "e8m3 is emulated: BF16 arithmetic" in write_report([run.path], run.report).read_text()
    assert export(str(run.path), str(tmp_path / "exported"))["dtype"] == "e8m3"
    assert "compute with them in real BF16" in capsys.readouterr().err
    measured = evaluate(str(run.path), config, str(tmp_path / "evaluated"))
    assert measured["precision"] == "e8m3" and measured["emulated"] == ["e8m3"]
    assert capsys.readouterr().err.startswith("e8m3 is emulated")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(x.dtype == torch.bfloat16 and is_on_grid(x, "e8m3") for x in exported.values())


def test_a_probe_measures_emulated_pairs_with_gradient_and_localisation(tmp_path: Path) -> None:
    config = run_config(precision={"pairs": ["e8m3/e8m3", "e8m2/fp32"]})
    result = probe("demo", config, str(tmp_path / "probe"), gradient=True, localize=True)
    assert [(pair["train"], pair["rollout"]) for pair in result["pairs"]] == [("e8m3", "e8m3"), ("e8m2", "fp32")]
    assert all(pair["k3"] > 1e-6 for pair in result["pairs"])
    errors = {row["train"]: row["relative_error"] for row in result["gradient"]["rows"]}
    assert errors["e8m3"] > 4 * errors["bf16"] > 0
    assert any(sentence.startswith("e8m2 and e8m3 are emulated") for sentence in probe_sentences(result))
    assert "e8m2 and e8m3 are emulated" in (tmp_path / "probe" / "report.html").read_text()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"engine": {"type": "vllm"}}, "engine=vllm cannot emulate it; set engine=native"),
        ({"training": {"compile_layers": True}}, "compiled layers cannot round to it"),
        ({}, "it is emulated on a CPU only; set device=cpu"),
    ],
)
def test_nothing_is_loaded_where_a_format_cannot_be_emulated(
    sections: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not sections:
        monkeypatch.setattr(model_checks, "choose_device", lambda _config: torch.device("cuda"))
    with pytest.raises(ConfigError, match=f"e8m3 is an emulated format, and {words}"):
        assemble(run_config(**sections))
    pairs = run_config(precision={"pairs": ["bf16/e8m3"]}, **sections)
    with pytest.raises(ConfigError, match=words):
        probe("no such model", pairs, str(tmp_path / "probe"))
    with pytest.raises(ConfigError, match="CPU only"):
        build_precision(run_config().precision, torch.device("cuda"))


def test_the_doctor_examines_hardware_formats_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^e8m3 is an emulated format, .*no such model precision\.pairs=e8m3/e8m3"):
        doctor("no such model", run_config(), str(tmp_path / "doctor"))


def test_what_a_stopped_run_advises_works(tmp_path: Path) -> None:
    run, levels = str(tmp_path / "run"), [{"metric": "mismatch/k3/mean", "above": 0, "action": "stop"}]
    config = run_config(watchdog={"levels": levels}, probe={"prompts": 2, "group_size": 1, "bootstrap": 20})
    with pytest.raises(WatchdogError, match=f"diverge with `betterhalf probe {run} --localize`; continue"):
        train(config, run, resume=False)
    result = probe(run, config, str(tmp_path / "probe"), localize=True)
    assert len(result["pairs"]) == 10 and result["pairs"][-1]["rollout"] == "e8m3"
    assert result["localize"]["dtype"] == "e8m3"
    with pytest.raises(ConfigError, match=f"^{run} is set to e8m3, an emulated.* with `betterhalf probe {run} --local"):
        doctor(run, config, str(tmp_path / "doctor"))
