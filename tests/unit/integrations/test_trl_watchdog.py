"""The watchdog of a TRL run: it warns, stops before an update, and goes on after a resume as in an undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trl_trainers import grpo_trainer

from betterhalf.errors import ConfigError, WatchdogError
from betterhalf.integrations.trl import BetterhalfCallback
from betterhalf.integrations.trl.alarms import DEFAULT, Alarms, checked_levels
from betterhalf.report.data import load
from betterhalf.report.events import watchdog_bounds
from betterhalf.report.page import write_report
from betterhalf.run_dir import RunDir, read_json, read_jsonl

pytestmark = [pytest.mark.extra, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("trl", reason="needs TRL; pip install 'betterhalf[trl]'")

ALWAYS = {"metric": "mismatch/tokens", "above": 1.0}
"""A rule that every step breaks; k3 itself is 0 in some batches of this small model."""


def watched(tmp_path: Path, watchdog: list[dict[str, Any]] | None, dtype: str = "bf16", **changes: Any) -> Any:
    """Return a trainer with a callback that has these rules."""
    trainer = grpo_trainer(tmp_path / "trl", dtype, **changes)
    record = "rollout_func" not in changes
    trainer.add_callback(
        BetterhalfCallback(trainer, tmp_path / "run", record_generate=record, rollouts_per_step=0, watchdog=watchdog)
    )
    return trainer


def wrong_logprobs(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Return the same three tokens for every prompt, with logprobs that no model of this size gives."""
    ids = trainer.processing_class(text=prompts)["input_ids"]
    count = len(prompts)
    return {"prompt_ids": ids, "completion_ids": [[3, 4, 5]] * count, "logprobs": [[-0.1, -20.0, -0.1]] * count}


def test_the_default_rules_are_those_on_the_mismatch_and_warn_only() -> None:
    assert [(level.metric, level.below, level.above, level.action) for level in DEFAULT] == [
        ("budget/predicted_ess", 0.5, None, "warn"),
        ("mismatch/k3/mean", None, 1e-2, "warn"),
        ("mismatch/k3/mean", None, 0.1, "warn"),
        ("mismatch/accident_fraction", None, 1e-3, "warn"),
    ]


def test_by_default_a_large_mismatch_warns_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = watched(tmp_path, None, rollout_func=wrong_logprobs)
    trainer.train()
    run = RunDir(tmp_path / "run")
    rows = read_jsonl(run.metrics)
    assert [row["step"] for row in rows] == [1, 2]
    alarms = read_jsonl(run.watchdog)
    by_step = [{(a["metric"], a["bound"]) for a in alarms if a["step"] == step} for step in (1, 2)]
    assert by_step[0] == by_step[1] >= {("mismatch/k3/mean", 1e-2), ("mismatch/k3/mean", 0.1)}
    assert [a["value"] for a in alarms if a["bound"] == 0.1] == [row["mismatch/k3/mean"] for row in rows]
    warned = [message for message in caplog.messages if "watchdog (warn): mismatch/k3/mean" in message]
    assert len(warned) == 2  # one for each rule, in the first of the steps alone
    assert all(message.startswith("step 1: ") for message in warned)
    page = write_report([run], run.path / "report.html").read_text()
    assert "1 to 2" in page
    bounds = watchdog_bounds(load([run]).arms[0], ["mismatch/k3/mean"])  # the report draws them
    assert bounds == [(0.01, "watchdog: warn"), (0.1, "watchdog: warn")]


def test_a_healthy_run_has_no_alarm_and_names_its_rules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watched(tmp_path, None, max_steps=2).train()
    run = RunDir(tmp_path / "run")
    assert not run.watchdog.exists()
    assert "watchdog" not in caplog.text
    levels = read_json(run.config)["watchdog"]["levels"]
    assert levels[1] == {"metric": "mismatch/k3/mean", "below": None, "above": 0.01, "steps": 1, "action": "warn"}


def test_stop_ends_the_training_before_the_update_and_a_resume_continues(tmp_path: Path) -> None:
    stop = ALWAYS | {"steps": 2, "action": "stop"}
    trainer = watched(tmp_path, [stop], save_strategy="steps", save_steps=2)
    with pytest.raises(
        WatchdogError, match="stopped the training in step 2: mismatch/tokens is 96, above 1 for 2 steps"
    ):
        trainer.train()
    assert trainer.state.global_step == 2
    saved = grpo_trainer(tmp_path / "other", "bf16").model
    saved.load_state_dict(type(saved).from_pretrained(tmp_path / "trl" / "checkpoint-2").state_dict())
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), saved.parameters(), strict=True))
    assert "_generate_and_score_completions" not in vars(trainer)
    run = RunDir(tmp_path / "run")
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1]
    (alarm,) = read_jsonl(run.watchdog)
    assert (alarm["step"], alarm["action"], alarm["consecutive"]) == (2, "stop", 2)
    assert alarm["measured"]["mismatch/tokens"] == alarm["value"] == 96
    summary = read_json(run.summary)
    assert summary["steps"] == 1 and summary["stopped_step"] == 2
    again = watched(tmp_path, [])
    again.train(resume_from_checkpoint=str(tmp_path / "trl" / "checkpoint-2"))
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2]
    assert read_jsonl(run.watchdog) == [alarm]
    assert "stopped" not in read_json(run.summary)


def test_steps_before_a_resume_count(tmp_path: Path) -> None:
    rule = [ALWAYS | {"steps": 3}]
    watched(tmp_path, rule, save_strategy="steps", save_steps=4).train()
    run = RunDir(tmp_path / "run")
    assert not run.watchdog.exists()
    watched(tmp_path, rule, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "trl" / "checkpoint-4"))
    (alarm,) = read_jsonl(run.watchdog)
    assert (alarm["step"], alarm["consecutive"]) == (3, 3)


def test_a_rule_on_the_optimizer_is_checked_after_the_update(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rules = [{"metric": "optim/skipped", "above": 0.5}, {"metric": "experts/change_fraction/mean", "above": 0.1}]
    watched(tmp_path, rules, "fp16", scale=2.0**30, max_steps=2).train()
    (alarm,) = read_jsonl(tmp_path / "run" / "watchdog.jsonl")
    assert (alarm["metric"], alarm["value"]) == ("optim/skipped", 2.0)
    assert "step 1: watchdog (warn): optim/skipped is 2, above 0.5" in caplog.text
    assert "watchdog.levels[1] (experts/change_fraction/mean) cannot fire" in caplog.text


def test_a_replayed_stop_is_not_raised_again() -> None:
    """A rule that is added on a resume may be broken by the steps before it."""
    alarms = Alarms(checked_levels([ALWAYS | {"action": "stop"}]))
    alarms.replay([{"step": 1, "mismatch/tokens": 9.0}, {"step": 2, "mismatch/tokens": 0.0}])
    assert alarms.before(3, {"mismatch/tokens": 0.0}) == ()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (ALWAYS | {"action": "mask"}, r'levels\[0\].action = "mask" changes the loss.*Use warn or stop'),
        (ALWAYS | {"action": "halve_learning_rate"}, "are TRL's"),
        ({"metric": "mismatch/k4", "above": 1}, "is not a metric that can be watched"),
        ({"metric": "optim/skipped", "above": 0, "action": "stop"}, "known only after the update"),
        ({"metric": "mismatch/k3/mean"}, "has no bound"),
        (ALWAYS | {"step": 2}, "step"),
    ],
)
def test_a_rule_without_effect_is_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_levels([rule])
