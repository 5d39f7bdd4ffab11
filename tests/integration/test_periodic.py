"""Evaluations during training: they change nothing of the training, and find the best checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from betterhalf import cli
from betterhalf.config.load import load_config
from betterhalf.config.schema import RunConfig
from betterhalf.errors import InputError
from betterhalf.run_dir import RunDir, read_json, read_jsonl
from betterhalf.runs import periodic
from betterhalf.runs.evaluate import evaluate
from betterhalf.runs.evaluation import PromptResult
from betterhalf.runs.train import train
from betterhalf.setup.trained_policy import best_evaluation, load_policy, require_checkpoint
from betterhalf.training import checkpoint

Configured = Callable[..., RunConfig]
Ends = Callable[..., str]

EVERY_TWO: dict[str, Any] = {
    "every": 2,
    "samples": 4,
    "max_prompts": 6,
    "data": {"fresh": {"type": "arithmetic", "seed": 9}, "own": {"type": "arithmetic", "num_prompts": 64}},
}
TRAINING = {"steps": 3, "keep_checkpoints": 1, "checkpoint_every": 1}


def training_rows(run: RunDir) -> list[dict[str, Any]]:
    """Return what a run recorded of its training: no evaluation, no time."""
    other = ("evaluation/", "time/", "system/")
    return [{k: v for k, v in row.items() if not k.startswith(other)} for row in read_jsonl(run.metrics)]


def masters(run: RunDir, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.step_folder(run.checkpoints, step) / "model.safetensors")


@pytest.fixture
def run_of(small_config: Configured, tmp_path: Path) -> Callable[..., RunDir]:
    """Train in the folder `name` with these settings of `[evaluate]`, and return the folder."""

    def run(name: str, **settings: Any) -> RunDir:
        config = small_config(training=TRAINING, evaluate=settings)
        train(config, str(tmp_path / name), resume=(tmp_path / name).exists())
        return RunDir(tmp_path / name)

    return run


def test_a_run_trains_bit_for_bit_alike_with_and_without_evaluations(run_of: Callable[..., RunDir]) -> None:
    plain = run_of("plain")
    # Longer completions need a larger cache, which the engine then keeps.
    found = run_of("evaluated", **EVERY_TWO, max_tokens=90, temperature=0.8, top_p=0.9)
    assert training_rows(plain) == training_rows(found)
    one, other = masters(plain, 3), masters(found, 3)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [row["step"] for row in read_jsonl(found.evaluated_steps)] == [0, 2, 3]
    assert not plain.evaluated_steps.exists() and "best_step" not in read_json(plain.summary)


def test_each_evaluation_is_that_of_the_verb_on_the_checkpoint(
    run_of: Callable[..., RunDir], small_config: Configured, tmp_path: Path
) -> None:
    run = run_of("run", **EVERY_TWO)
    rows = read_jsonl(run.evaluated_steps)
    config = load_config(run.config)
    for step, row in ((0, rows[0]), (3, rows[-1])):
        target = "demo" if step == 0 else str(run.path)
        found = evaluate(target, config, str(tmp_path / f"after-{step}"))["data"]
        assert set(found) == {"fresh", "own"}
        for name, one in found.items():
            area = f"evaluation/{name}"
            assert row[f"{area}/accuracy/mean"] == one["avg@4"]
            assert [row[f"{area}/accuracy/{side}"] for side in ("low", "high")] == one["intervals"]["avg@4"]
            for k in (1, 2, 4):
                assert row[f"{area}/pass_at_{k}/mean"] == one[f"pass@{k}"]
                assert row[f"{area}/majority_at_{k}/mean"] == one[f"maj@{k}"]
            assert row[f"{area}/length/mean"] == one["mean_length"]
        assert row["accuracy"] == pytest.approx(sum(one["avg@4"] for one in found.values()) / 2, rel=1e-15)
    logged = {row["step"]: row for row in read_jsonl(run.metrics)}
    for row in rows[1:]:
        assert row.items() - {("accuracy", row["accuracy"])} <= logged[row["step"]].items()
        assert logged[row["step"]]["time/evaluate_seconds"] > 0
    assert not [name for name in logged[1] if name.startswith("evaluation/") or name == "time/evaluate_seconds"]
    page = run.report.read_text()
    assert page.count("<h3>Evaluation, fresh</h3>") == page.count("<h3>Evaluation, own</h3>") == 1


def test_without_data_of_its_own_the_run_s_task_is_evaluated(run_of: Callable[..., RunDir]) -> None:
    run = run_of("run", every=5, samples=2, max_prompts=4)
    rows = read_jsonl(run.evaluated_steps)
    assert [row["step"] for row in rows] == [0, 3]
    assert 0 <= rows[0]["evaluation/arithmetic/accuracy/mean"] == rows[0]["accuracy"] <= 1


class Scripted:
    """Evaluation with a given accuracy of each step, in place of the engine's."""

    def __init__(self, accuracies: dict[int, tuple[float, float]], monkeypatch: pytest.MonkeyPatch) -> None:
        """`accuracies`: step -> accuracy on `fresh` and on `own`."""
        self.accuracies, self.step = accuracies, 0
        self._real = periodic.evaluate_set
        monkeypatch.setattr(periodic, "evaluate_set", self.evaluate_set)
        real_after = periodic.evaluate_after

        def noted(parts: Any, run: Any, step: int, version: int) -> Any:
            self.step = step
            return real_after(parts, run, step, version)

        monkeypatch.setattr("betterhalf.runs.record.evaluate_after", noted)

    def evaluate_set(self, parts: Any, data: Any, indices: range, *, policy_version: int) -> list[PromptResult]:
        accuracy = self.accuracies[self.step][data.name == "own"]
        results = self._real(parts, data, indices, policy_version=policy_version)
        return [replace(result, reward=accuracy) for result in results]


@pytest.mark.parametrize(
    ("accuracies", "best_of", "steps", "best"),
    [
        ((0.9, 0.2, 0.5, 0.4), None, [2, 3], 2),  # step 0 has no checkpoint
        ((0.1, 0.5, 0.5, 0.5), None, [1, 3], 1),  # the first of equals
        ((0.1, 0.2, 0.3, 0.4), None, [3], 3),
        ((0.1, 0.2, 0.3, 0.4), "own", [1, 3], 1),  # there the other way round
    ],
)
def test_the_checkpoint_of_the_best_evaluation_is_kept(
    accuracies: tuple[float, ...],
    best_of: str | None,
    steps: list[int],
    best: int,
    run_of: Callable[..., RunDir],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Scripted({step: (value, 1 - value if best_of else value) for step, value in enumerate(accuracies)}, monkeypatch)
    run = run_of("run", **(EVERY_TWO | {"every": 1, "max_prompts": 2, "samples": 1, "best_of": best_of}))
    assert checkpoint.steps(run.checkpoints) == steps
    summary = read_json(run.summary)
    expected = 1 - accuracies[best] if best_of else accuracies[best]
    assert (summary["best_step"], summary["best_accuracy"]) == (best, pytest.approx(expected))
    assert summary["best_checkpoint"] == f"checkpoints/step-{best:06d}"
    assert load_policy(str(run.path), "best").step == best and load_policy(str(run.path)).step == 3


def test_a_resumed_run_repeats_its_evaluations_and_knows_the_best(
    run_of: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted({0: (0.1, 0.1), 1: (0.8, 0.8), 2: (0.3, 0.3), 3: (0.5, 0.5)}, monkeypatch)
    settings = EVERY_TWO | {"every": 1, "max_prompts": 2, "samples": 1}
    whole = run_of("whole", **settings)
    rows, training = whole.evaluated_steps.read_text(), training_rows(whole)
    part = RunDir(whole.path.with_name("part"))
    shutil.copytree(whole.path, part.path)
    # Stopped in step 3, after its evaluation was written: only the checkpoint of step 1 is there.
    shutil.rmtree(checkpoint.step_folder(part.checkpoints, 3))
    found = run_of("part", **settings)
    assert found.evaluated_steps.read_text() == rows and training_rows(found) == training
    assert checkpoint.steps(found.checkpoints) == [1, 3] and best_evaluation(found).step == 1  # type: ignore[union-attr]
    assert all(torch.equal(masters(whole, 3)[name], tensor) for name, tensor in masters(found, 3).items())


def test_the_best_checkpoint_is_exported_and_evaluated_by_name(
    run_of: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch, ends: Ends, tmp_path: Path
) -> None:
    Scripted({0: (0.1, 0.1), 1: (0.8, 0.8), 2: (0.3, 0.3), 3: (0.5, 0.5)}, monkeypatch)
    run = run_of("run", **(EVERY_TWO | {"every": 1, "max_prompts": 2, "samples": 1}))
    weights = {}
    for which in ("best", "1", "latest"):
        assert cli.main(["export", str(run.path), str(tmp_path / which), "--checkpoint", which]) == 0
        weights[which] = load_file(tmp_path / which / "model.safetensors")
    assert all(torch.equal(weights["best"][name], weights["1"][name]) for name in weights["1"])
    assert any(not torch.equal(weights["best"][name], weights["latest"][name]) for name in weights["1"])
    digests = set()
    for which in ("best", "3", "latest"):
        ends(0, "evaluate", run.path, f"run_dir={tmp_path / f'of-{which}'}", "--checkpoint", which)
        digests.add(read_json(tmp_path / f"of-{which}" / "evaluation.json")["weights_digest"])
    assert len(digests) == 2
    message = ends(2, "export", run.path, tmp_path / "no", "--checkpoint", "2")
    assert "has no checkpoint '2'; choose latest, best, or one of the steps 1, 3" in message
    with pytest.raises(InputError, match="has no checkpoint 'bset'"):
        require_checkpoint(str(run.path), "bset")


def test_a_run_without_evaluations_has_no_best_checkpoint(run_of: Callable[..., RunDir], ends: Ends) -> None:
    run = run_of("run")
    message = ends(2, "export", run.path, run.path / "out", "--checkpoint", "best")
    assert "has no checkpoint of an evaluated step" in message and "evaluate.every" in message


def test_evaluation_data_that_changed_is_noticed_on_resume(
    run_of: Callable[..., RunDir], small_config: Configured, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"problem": "1+1=", "answer": "2"}\n{"problem": "1+2=", "answer": "3"}\n')
    own = {"type": "math", "path": str(data), "template": "none"}
    settings = {"every": 3, "samples": 1, "data": {"own": own}}
    run = run_of("run", **settings)
    data.write_text('{"problem": "1+1=", "answer": "2"}\n{"problem": "7+2=", "answer": "9"}\n')
    with pytest.raises(InputError, match=r"1 of 2 rows differ.*evaluate\.data\.own\.allow_changed_data=true"):
        run_of("run", **settings)
    allowed = {"every": 3, "samples": 1, "data": {"own": own | {"allow_changed_data": True}}}
    run_of("run", **allowed)
    assert read_json(run.config)["evaluate"]["data"]["own"]["allow_changed_data"] is False
