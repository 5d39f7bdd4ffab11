"""A GRPO run of TRL with the callback: its numbers by hand, its folder, and what it refuses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.trl_trainers import grpo_trainer

from betterhalf import load_run
from betterhalf.errors import ContractError, InputError
from betterhalf.integrations.trl import BetterhalfCallback, checks, sides
from betterhalf.integrations.trl.watch import Drawn
from betterhalf.report.page import write_report
from betterhalf.run_dir import RunDir, read_json, read_jsonl
from betterhalf.runs.compare import compare_runs

pytestmark = [pytest.mark.extra, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("trl", reason="needs TRL; pip install 'betterhalf[trl]'")


def trained(tmp_path: Path, dtype: str, *, name: str = "run", **changes: Any) -> tuple[Any, RunDir]:
    """Train with the callback, which keeps every rollout, and return the trainer and the folder."""
    trainer = grpo_trainer(tmp_path / f"trl-{name}", dtype, **changes)
    trainer.add_callback(BetterhalfCallback(trainer, tmp_path / name, record_generate=True, rollouts_per_step=8))
    trainer.train()
    return trainer, RunDir(tmp_path / name)


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return trained(tmp_path_factory.mktemp(request.param), request.param, name=request.param)[1]


def test_the_mismatch_is_that_of_the_recorded_logprobs_by_hand(run: RunDir) -> None:
    rollouts, rows = read_jsonl(run.rollouts), read_jsonl(run.metrics)
    # Where no prompt is padded, this small model may sample and score with the same bits.
    assert max(row["mismatch/k3/mean"] for row in rows) > 1e-9
    for row in rows:
        mine = [rollout for rollout in rollouts if rollout["step"] == row["step"]]
        assert len(mine) == 8
        pairs = [
            (pi, mu) for one in mine for pi, mu in zip(one["trainer_logprobs"], one["behavior_logprobs"], strict=True)
        ]
        ratios = [pi - mu for pi, mu in pairs]
        assert row["mismatch/tokens"] == len(ratios)
        assert row["mismatch/k1/mean"] == pytest.approx(-statistics.fmean(ratios), rel=1e-9)
        assert row["mismatch/k2/mean"] == pytest.approx(statistics.fmean(d * d / 2 for d in ratios), rel=1e-9)
        assert row["mismatch/k3/mean"] == pytest.approx(statistics.fmean(math.expm1(d) - d for d in ratios), rel=1e-6)
        gaps = [abs(math.exp(pi) - math.exp(mu)) for pi, mu in pairs]
        assert row["mismatch/prob_gap/mean_abs"] == pytest.approx(statistics.fmean(gaps), rel=1e-9)
        rewards = [float(len(set(one["completion"]))) for one in mine]
        assert row["rollout/reward/mean"] == pytest.approx(statistics.fmean(rewards))
        assert row["rollout/reward/std"] == pytest.approx(statistics.pstdev(rewards))
        lengths = [len(one["token_ids"]) for one in mine]
        assert row["rollout/length/mean"] == pytest.approx(statistics.fmean(lengths))
        cut = [one["finish_reason"] == "length" for one in mine]
        assert row["rollout/truncated_fraction"] == statistics.fmean(cut)
        assert all(length == 12 for length, ended in zip(lengths, cut, strict=True) if ended)


def test_both_sides_report_the_format_they_compute_in(run: RunDir) -> None:
    dtype = run.path.name
    contract = read_json(run.contract)
    rows = {row["region"]: row for row in contract["rows"]}
    assert contract["ok"]
    assert (rows["compute"]["trainer"], rows["compute"]["engine"]) == (dtype, dtype)
    assert rows["weights"]["status"] == "equal"
    assert rows["master"]["trainer"] == "fp32"
    assert rows["loss_scaler"]["trainer"] == ("GradScaler" if dtype == "fp16" else "none")
    assert read_json(run.config)["precision"] == {"compute_dtype": dtype, "rollout_dtype": dtype}


def test_the_report_shows_the_run(run: RunDir) -> None:
    text = write_report([run], run.path / "report.html").read_text()
    assert "Loss scale" in text
    assert "No contract recorded" not in text
    assert load_run(run.path).summary["steps"] == 2


def test_compare_names_the_setting_that_differs(tmp_path: Path) -> None:
    folders = [trained(tmp_path, dtype, name=dtype, max_steps=2)[1] for dtype in ("fp16", "bf16")]
    found = compare_runs([folder.path for folder in folders])
    assert found.differences["precision.compute_dtype"] == ("fp16", "bf16")
    assert found.differences["trl.bf16"] == (False, True)
    k3 = [run.k3 for run in found.runs]
    assert k3[0] is not None and k3[1] is not None
    assert k3[0] < k3[1]


def test_the_anchor_of_trl_is_what_is_measured(tmp_path: Path) -> None:
    """Compare with the tensors that the loss gets."""
    trainer = grpo_trainer(tmp_path / "trl", "bf16")
    trainer.add_callback(BetterhalfCallback(trainer, tmp_path / "run", record_generate=True, rollouts_per_step=8))
    inner, seen = trainer._compute_loss, {}

    def spy(model: Any, inputs: dict[str, Any]) -> Any:
        for ids, mask, logprobs in zip(
            inputs["completion_ids"], inputs["completion_mask"].bool(), inputs["old_per_token_logps"], strict=True
        ):
            seen[(trainer.state.global_step // 2 + 1, tuple(ids[mask].tolist()))] = logprobs[mask].tolist()
        return inner(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    rollouts = read_jsonl(tmp_path / "run" / "rollouts.jsonl")
    assert len(rollouts) == 16
    for one in rollouts:
        assert one["trainer_logprobs"] == seen[(one["step"], tuple(one["token_ids"]))]


def test_where_trl_has_no_anchor_one_more_pass_gives_it(tmp_path: Path) -> None:
    """Each update follows its own batch: then the loss sees the same weights, and its own logprobs are the anchor."""
    trainer = grpo_trainer(tmp_path / "trl", gradient_accumulation_steps=2, max_steps=2)
    trainer.add_callback(BetterhalfCallback(trainer, tmp_path / "run", record_generate=True, rollouts_per_step=8))
    inner, seen = trainer._get_per_token_logps_and_entropies, []

    def spy(*args: Any, **keywords: Any) -> Any:
        found = inner(*args, **keywords)
        seen.extend(found[0].detach().tolist() if keywords.get("compute_entropy") else [])
        return found

    trainer._get_per_token_logps_and_entropies = spy
    trainer.train()
    rollouts = read_jsonl(tmp_path / "run" / "rollouts.jsonl")
    assert len(rollouts) == len(seen) == 16
    for one in rollouts:
        mine = one["trainer_logprobs"]
        assert any(mine == pytest.approx(other[: len(mine)], abs=1e-5) for other in seen)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["optim/updates_applied"] for row in rows] == [1.0, 1.0]


def test_the_callback_changes_no_number(tmp_path: Path) -> None:
    plain = grpo_trainer(tmp_path / "plain", "bf16")
    plain.train()
    watched, _ = trained(tmp_path, "bf16")
    for (name, mine), (_, theirs) in zip(watched.model.named_parameters(), plain.model.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    own = [name for name in ("_generate_and_score_completions", "_get_grad_norm") if name in vars(watched)]
    assert not own
    assert "generate" not in vars(watched.model)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_a_skipped_step_is_counted_with_its_loss_scale_and_first_parameter(tmp_path: Path, optimizer: str) -> None:
    """accelerate itself does not notice that a fused optimizer, TRL's default, has skipped a step."""
    trainer, run = trained(tmp_path, "fp16", scale=2.0**30, max_steps=2, optim=optimizer)
    assert trainer.accelerator.optimizer_step_was_skipped == (optimizer == "adamw_torch")
    row = read_jsonl(run.metrics)[0]
    assert row["optim/skipped"] == 2
    assert row["optim/updates_applied"] == row["policy/version"] == 0
    assert row["optim/loss_scale"] == 2.0**28
    assert row["optim/grad_norm"] is None
    assert row["optim/first_offender"] in dict(trainer.model.named_parameters())


def test_fp16_on_a_cpu_is_reported_as_what_it_is(tmp_path: Path) -> None:
    """accelerate enters no autocast there, and TRL says nothing."""
    trainer = grpo_trainer(tmp_path / "trl", "fp16", scale=None, max_steps=2)
    callback = BetterhalfCallback(trainer, tmp_path / "run", record_generate=True)
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.args.fp16
    assert callback.contract is not None
    compute = callback.contract.rows[0]
    assert (compute.region, compute.trainer, compute.engine) == ("compute", "fp32", "fp32")


def test_a_strict_callback_stops_before_the_first_update(tmp_path: Path) -> None:
    trainer = grpo_trainer(tmp_path / "trl", "bf16")
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    callback = BetterhalfCallback(trainer, tmp_path / "run", record_generate=True, strict=True)
    assert callback._recorder is not None
    callback._recorder.drawn = Drawn(compute=torch.float32, kv=torch.float32)
    trainer.add_callback(callback)
    with pytest.raises(ContractError, match="compute is bf16 in the trainer and fp32 in the engine"):
        trainer.train()
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
    assert read_json(tmp_path / "run" / "contract.json")["ok"] is False


def rollouts_with(logprobs: list[float | None]) -> Callable[[list[str], Any], dict[str, Any]]:
    """Return a `rollout_func` that always answers with the same three tokens, and gives these logprobs for them."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = trainer.processing_class(text=prompts)["input_ids"]
        count = len(prompts)
        return {"prompt_ids": ids, "completion_ids": [[3, 4, 5]] * count, "logprobs": [logprobs] * count}

    return rollout


def test_tokens_without_a_logprob_of_the_sampler_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = grpo_trainer(tmp_path / "trl", max_steps=2, rollout_func=rollouts_with([-1.0, None, -2.0]))
    trainer.add_callback(BetterhalfCallback(trainer, tmp_path / "run", rollouts_per_step=8))
    trainer.train()
    row = read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["mismatch/tokens"] == 16
    assert row["rollout/length/mean"] == 3
    assert "the sampler gave 8 tokens no finite logprob" in caplog.text
    rollouts = read_jsonl(tmp_path / "run" / "rollouts.jsonl")
    assert {tuple(one["behavior_logprobs"]) for one in rollouts} == {(-1.0, -2.0)}
    ratios = [pi - mu for one in rollouts for pi, mu in zip(one["trainer_logprobs"], (-1.0, -2.0), strict=True)]
    assert row["mismatch/log_ratio/mean"] == pytest.approx(statistics.fmean(ratios), rel=1e-9)


def test_a_resumed_training_continues_the_rows(tmp_path: Path) -> None:
    _, run = trained(tmp_path, "bf16", save_strategy="steps", save_steps=2)
    first = read_jsonl(run.metrics)
    again = grpo_trainer(tmp_path / "trl-run", "bf16", max_steps=6)
    again.add_callback(BetterhalfCallback(again, run.path, record_generate=True))
    again.train(resume_from_checkpoint=str(tmp_path / "trl-run" / "checkpoint-2"))
    rows = read_jsonl(run.metrics)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0] == first[0]
    assert [row["policy/version"] for row in rows] == [2, 4, 6]


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    _, run = trained(tmp_path, "bf16", max_steps=2)
    before = run.metrics.read_bytes()
    with pytest.raises(InputError, match="already holds a run"):
        trained(tmp_path, "bf16", max_steps=2)
    assert run.metrics.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "record", "message"),
    [
        ({}, False, "keeps no logprobs of this sampler.*record_generate=True"),
        ({"top_p": 0.9}, True, "with top_p=0.9 TRL samples from another distribution"),
        ({"generation_kwargs": {"typical_p": 0.5}}, True, "with typical_p=0.5"),
        ({"use_transformers_continuous_batching": True}, True, "continuous batching of transformers gives no logprobs"),
        ({"rollout_func": rollouts_with([-1.0])}, True, "record_generate=True has no effect: rollout_func samples"),
    ],
)
def test_a_trainer_without_the_right_logprobs_is_refused(
    tmp_path: Path, changes: dict[str, Any], record: bool, message: str
) -> None:
    trainer = grpo_trainer(tmp_path / "trl", **changes)
    with pytest.raises(InputError, match=message) as refused:
        BetterhalfCallback(trainer, tmp_path / "run", record_generate=record)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_rollout_func_without_logprobs_is_refused_before_an_update(tmp_path: Path) -> None:
    def silent(prompts: list[str], trainer: Any) -> dict[str, Any]:
        return rollouts_with([-1.0])(prompts, trainer) | {"logprobs": None}

    trainer = grpo_trainer(tmp_path / "trl", rollout_func=silent)
    trainer.add_callback(BetterhalfCallback(trainer, tmp_path / "run"))
    with pytest.raises(InputError, match="no logprobs of its sampler"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_another_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="measures a GRPOTrainer of TRL, not a SimpleNamespace"):
        BetterhalfCallback(SimpleNamespace(), tmp_path / "run")  # type: ignore[arg-type]


def test_another_release_of_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "version", lambda _name: "1.17.0")
    with pytest.raises(InputError, match=r"written for TRL 1\.16.*but TRL 1\.17\.0 is installed"):
        checks.check_installed()
    assert metadata.version("trl").startswith("1.16.")


def test_a_vllm_server_is_read_from_its_resolved_configuration() -> None:
    info = {
        "model_config": {"dtype": "torch.bfloat16", "logprobs_mode": "processed_logprobs"},
        "cache_config": {"cache_dtype": "auto"},
    }
    assert sides._server_side(info).dtypes == {"weights": "bf16", "compute": "bf16", "wire": "bf16", "kv": "bf16"}
    assert sides._server_side(info).digests == {}
    info["cache_config"]["cache_dtype"] = "fp8_e4m3"
    assert sides._server_side(info).dtypes["kv"] == "fp8_e4m3"
