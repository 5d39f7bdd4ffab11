"""Episodes of several turns in whole runs: what is recorded, and the limits that end an episode."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.load import load_config
from betterhalf.config.schema import RunConfig
from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.run_dir import RunDir, read_jsonl
from betterhalf.runs.evaluate import evaluate
from betterhalf.runs.train import run_training, train

Configured = Callable[..., RunConfig]
FILE = Path(__file__).parents[1] / "turn_environments.py"
TWO_TURNS = Path(__file__).parents[2] / "experiments" / "smoke" / "two_turns.toml"


@pytest.fixture
def configured(small_config: Configured) -> Configured:
    """Configure two steps of an environment; of the default task nothing is kept."""

    def build(name: str, *, task_changes: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
        data = small_config(**changes).model_dump()
        data["task"] = {
            "type": "environment",
            "environment": f"{FILE}:{name}",
            "template": "none",
            "workers": 1,
            **(task_changes or {}),
        }
        return RunConfig.model_validate(data)

    return build


def run(config: RunConfig, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train, and return the rows of metrics and of rollouts."""
    found = RunDir.create(folder, resume=False)
    run_training(config, found, resume=False, label="x")
    return read_jsonl(found.metrics), read_jsonl(found.rollouts)


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.startswith(("time/", "system/"))} for row in rows]


def test_a_run_records_its_turns_and_nothing_of_an_observation_is_scored(
    configured: Configured, tmp_path: Path
) -> None:
    config = configured("Echo", task_changes={"settings": {"turns": 3}}, engine={"rounding": "exact"})
    summary = train(config, str(tmp_path / "run"), resume=False)
    found = RunDir.open(tmp_path / "run")
    assert summary["steps"] == 2
    for row in read_jsonl(found.metrics):
        assert set(row) - {"step"} <= set(CATALOGUE)
        assert 1 < row["rollout/turns/mean"] <= 3
        assert row["rollout/environment_failures"] == row["rollout/turn_limit_fraction"] == 0
        assert row["rollout/observation_tokens/mean"] == pytest.approx(2 * (row["rollout/turns/mean"] - 1))
        # Only sampled tokens are measured, and in exact rounding both sides agree on every one of them.
        assert row["mismatch/tokens"] == 16 * row["rollout/length/mean"]
        assert row["mismatch/k3/mean"] == row["mismatch/prob_gap/max"] == row["mismatch/prob_gap/min"] == 0
    several = [row for row in read_jsonl(found.rollouts) if row["observations"]]
    assert several
    for row in several:
        assert len(row["tokens"]) == len(row["behavior_logprobs"]) == len(row["trainer_logprobs"])
        assert row["behavior_logprobs"] == row["trainer_logprobs"]
        places = {each["before"]: each["text"] for each in row["observations"]}
        shown = "".join(places.get(index, "") + token for index, token in enumerate(row["tokens"]))
        assert shown == row["completion"]
        # Each turn but the last one ended with the stop token, after which the environment named its length.
        starts = [0, *places]
        assert [row["tokens"][place - 1] for place in places] == ["."] * len(places)
        lengths = [end - start for start, end in zip(starts, places, strict=False)]
        assert list(places.values()) == [f"{length % 10}+" for length in lengths]
    page = found.report.read_text()
    assert '<span class="prompt" title="observation">' in page


def test_the_same_seed_gives_the_same_episodes_whatever_runs_at_once(configured: Configured, tmp_path: Path) -> None:
    found = []
    for name, slots in (("a", 256), ("b", 256), ("c", 3)):
        config = configured("Echo", engine={"rounding": "exact", "max_concurrent": slots}, training={"steps": 1})
        metrics, rollouts = run(config, tmp_path / name)
        found.append((without_times(metrics), rollouts))
    assert found[0] == found[1] == found[2]


def test_a_resumed_run_continues_as_if_it_had_not_stopped(configured: Configured, tmp_path: Path) -> None:
    whole, _ = run(configured("Echo"), tmp_path / "whole")
    folder = tmp_path / "cut"
    run(configured("Echo", training={"steps": 1}), folder)
    settings = (folder / "config.json").read_text().replace('"steps": 1,', '"steps": 2,')
    (folder / "config.json").write_text(settings)
    run_training(configured("Echo"), RunDir.create(folder, resume=True), resume=True, label="x")
    assert without_times(read_jsonl(folder / "metrics.jsonl")) == without_times(whole)


def test_an_endless_environment_is_cut_at_the_turn_limit(configured: Configured, tmp_path: Path) -> None:
    config = configured(
        "Endless", task_changes={"max_turns": 3}, training={"steps": 1}, logging={"rollouts_per_step": 16}
    )
    (row,), rollouts = run(config, tmp_path / "run")
    ends = [each["episode_end"] for each in rollouts]
    assert len(ends) == 16
    assert set(ends) <= {"turn_limit", "length"}
    assert row["rollout/turn_limit_fraction"] == ends.count("turn_limit") / 16 > 0
    cut = [each for each in rollouts if each["episode_end"] == "turn_limit"]
    assert {len(each["observations"]) for each in cut} == {2}
    assert {each["finish_reason"] for each in cut} == {"stop"}


def test_all_turns_together_keep_to_the_token_limit_and_the_context(configured: Configured, tmp_path: Path) -> None:
    config = configured(
        "Wordy",
        task_changes={"max_turns": 50},
        training={"steps": 1},
        sampling={"max_tokens": 60},
        logging={"rollouts_per_step": 16},
    )
    (row,), rollouts = run(config, tmp_path / "run")
    assert {each["episode_end"] for each in rollouts} == {"length"}
    assert row["rollout/truncated_fraction"] == 1
    for each in rollouts:
        observed = sum(len(observation["token_ids"]) for observation in each["observations"])
        assert len(each["tokens"]) <= 60
        assert len(each["prompt"]) + len(each["tokens"]) + observed <= 128
        assert all(observation["before"] < len(each["tokens"]) for observation in each["observations"])


def test_evaluation_plays_whole_episodes(configured: Configured, tmp_path: Path) -> None:
    config = configured("Echo", evaluate={"samples": 2, "max_prompts": 3})
    summary = evaluate("demo", config, str(tmp_path / "run"))
    assert summary["prompts"] == 3
    assert summary["avg@2"] > 1  # the reward counts the turns


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["task.environment=no_such_module:Thing"], "there is no module 'no_such_module'"),
        (["task.environment=betterhalf.tasks.surprise_digit:Surprise"], "Did you mean SurpriseDigit?"),
        (["task.settings={term=3}"], "creating it with task.settings={'term': 3} fails with TypeError"),
        (["task.path=none.jsonl"], "no data file"),
        (["task.max_turn=3"], "task.max_turns"),
        (["task.template=chat"], "has no chat template"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sampled(
    ends: Callable[..., str], tmp_path: Path, settings: list[str], message: str
) -> None:
    err = ends(2, "train", TWO_TURNS, f"run_dir={tmp_path / 'run'}", "logging.console=quiet", *settings)
    assert message in err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_the_worked_example_learns(tmp_path: Path) -> None:
    found = RunDir.create(tmp_path / "run", resume=False)
    config = load_config(TWO_TURNS, ["logging.console=quiet"])
    run_training(config, found, resume=False, label="x")
    rewards = [row["rollout/reward/mean"] for row in read_jsonl(found.metrics)]
    assert len(rewards) == 24
    assert 0.7 < statistics.fmean(rewards[:4]) < 0.89
    assert statistics.fmean(rewards[-6:]) > 0.93
    assert {row["rollout/turns/mean"] for row in read_jsonl(found.metrics)} == {2.0}


def test_truncated_sampling_is_scored_in_every_turn(configured: Configured, tmp_path: Path) -> None:
    sampling = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 40}
    config = configured(
        "Echo", task_changes={"settings": {"turns": 3}}, engine={"rounding": "exact"}, sampling=sampling
    )
    metrics, rollouts = run(config, tmp_path / "run")
    for row in metrics:
        assert row["rollout/turns/mean"] > 1 and row["rollout/support/mass/mean"] < 0.999
        assert row["mismatch/log_ratio/max_abs"] == 0
    assert all(len(row["support_sizes"]) == len(row["token_ids"]) for row in rollouts)
