"""A whole run, its checkpoints and its evaluation use only the Protocols of trainer and engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from betterhalf.batches import MicroBatch
from betterhalf.config.schema import RunConfig
from betterhalf.errors import CheckpointError
from betterhalf.rollout.engine import RolloutEngine
from betterhalf.run_dir import RunDir, read_jsonl
from betterhalf.runs import assembly, train
from betterhalf.runs.assembly import Parts
from betterhalf.runs.evaluate import evaluate
from betterhalf.runs.train import run_training
from betterhalf.training.trainer import Trainer


class Behind:
    """Proxy with the members of one Protocol, which refuses everything else of the real object."""

    def __init__(self, real: Any, protocol: type) -> None:
        self._real, self._members = real, {name for name in vars(protocol) if not name.startswith("_")}
        self.used: list[str] = []
        """Names of members in the order of their use."""

    def __getattr__(self, name: str) -> Any:
        if name == "take_restarts":  # of `SelfRestarting`, which an engine need not be
            raise AttributeError(name)
        assert name in self._members, f"{name!r} is reached behind the Protocol"
        self.used.append(name)
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        assert name.startswith("_") or name == "used", f"{name!r} is set behind the Protocol"
        object.__setattr__(self, name, value)


class HostOnlyTrainer(Behind):
    """Trainer that checks that packs are in host memory."""

    def __init__(self, real: Any) -> None:
        super().__init__(real, Trainer)

    def measure(self, packs: Any, temperature: float | None = None) -> Any:
        self.used.append("measure")
        require_host(packs)
        scores = self._real.measure(packs, temperature)
        assert len(scores) == len(packs)
        return scores

    def measure_reference(self, packs: Any) -> Any:
        self.used.append("measure_reference")
        require_host(packs)
        return self._real.measure_reference(packs)

    def forward_backward(self, packs: Any, algorithm: Any, denominators: Any) -> Any:
        self.used.append("forward_backward")
        require_host(packs)
        return self._real.forward_backward(packs, algorithm, denominators)


def require_host(packs: Any) -> None:
    for pack in packs:
        assert isinstance(pack, MicroBatch)
        values = [getattr(pack, field.name) for field in fields(pack)]
        assert all(value.device.type == "cpu" for value in values if isinstance(value, Tensor))


Configured = Callable[..., RunConfig]


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> list[Parts]:
    """Assemble every run behind strict Protocols, and return the parts in the order of assembly."""
    made: list[Parts] = []

    def assemble(*args: Any, **keywords: Any) -> Parts:
        parts = assembly.assemble(*args, **keywords)
        trainer, engine = HostOnlyTrainer(parts.trainer), Behind(parts.engine, RolloutEngine)
        made.append(replace(parts, sides=replace(parts.sides, trainer=trainer, engine=engine)))
        return made[-1]

    monkeypatch.setattr(train, "assemble", assemble)
    monkeypatch.setattr("betterhalf.runs.evaluate.assemble", assemble)
    return made


def rows(run: RunDir) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "system/"))}
        for row in read_jsonl(run.metrics)
    ]


SETTINGS: list[dict[str, Any]] = [
    {"precision": {"preset": "fp16"}},
    {"algorithm": {"preset": "icepop", "denominator": "kept"}, "precision": {"preset": "bf16"}},
    {"algorithm": {"preset": "dapo"}, "mismatch": {"sample_fraction": 0.5}},
    {"algorithm": {"kl": {"coefficient": 0.1, "refresh_every": 2}, "entropy_coefficient": 0.01}},
    {
        "algorithm": {"preset": "rloo", "kl": {"coefficient": 0.1, "place": "reward"}},
        "mismatch": {"sample_fraction": 0.5},
        "precision": {"preset": "bf16"},
    },
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["grpo", "kept", "dynamic", "kl loss", "kl reward"])
def test_a_whole_run_with_checkpoint_resume_and_evaluation_stays_in_front_of_the_protocols(
    settings: dict[str, Any], strict: list[Parts], small_config: Configured, tmp_path: Path
) -> None:
    def config_for(steps: int) -> RunConfig:
        training = {"steps": steps, "prompts_per_step": 4, "group_size": 4, "optimizer_steps": 2, "checkpoint_every": 1}
        # A constant rate: the schedule depends on the number of steps.
        return small_config(**settings, training=training)

    whole = RunDir.create(tmp_path / "whole", resume=False)
    run_training(config_for(3), whole, resume=False, label="x")
    assert {"measure", "forward_backward", "optim_step", "weight_stream", "report"} <= used(strict[0])
    assert {"write_state", "wait_written"} <= used(strict[0])
    before = rows(whole)
    shutil.rmtree(whole.checkpoints / "step-000003")
    run_training(config_for(3), RunDir.create(whole.path, resume=True), resume=True, label="x")
    assert "read_state" in used(strict[1])
    assert rows(whole) == before

    summary = evaluate(str(whole.path), config_for(3), str(tmp_path / "evaluation"))
    assert summary["prompts"] > 0
    assert used(strict[2]) <= {"measure", "weight_stream", "report", "close"}


def used(parts: Parts) -> set[str]:
    trainer: Any = parts.trainer
    return set(trainer.used)


def test_the_strict_doubles_are_strict(small_config: Configured) -> None:
    parts = assembly.assemble(small_config())
    try:
        trainer = HostOnlyTrainer(parts.trainer)
        for name in ("weights", "scaler", "module", "optimizer", "policy_version"):
            with pytest.raises(AssertionError, match="behind the Protocol"):
                getattr(trainer, name)
        with pytest.raises(AssertionError, match="is set behind"):
            trainer.algorithm = None
        with pytest.raises(AssertionError, match="behind the Protocol"):
            _ = Behind(parts.engine, RolloutEngine).decoder
    finally:
        parts.close()


def test_the_state_of_another_model_is_refused_with_its_origin(small_config: Configured) -> None:
    parts = assembly.assemble(small_config())
    try:
        state = parts.trainer.state()
        name, first = next(iter(state.model.items()))
        for model, words in (
            ({name: first}, "checkpoint x lacks parameter"),
            ({**state.model, "extra": torch.zeros(1)}, "checkpoint x holds an unknown parameter 'extra'"),
            ({**state.model, name: torch.zeros(3)}, "checkpoint x holds another shape of parameter"),
        ):
            with pytest.raises(CheckpointError, match=words):
                parts.trainer.load(replace(state, model=model, source="checkpoint x"))
    finally:
        parts.close()
