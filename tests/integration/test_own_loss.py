"""A loss in a file outside the repository trains the same weights as the preset that it rewrites, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.schema import RunConfig
from betterhalf.errors import ConfigError, InputError
from betterhalf.run_dir import read_json, read_jsonl
from betterhalf.runs.assembly import assemble, checked_algorithm
from betterhalf.runs.loop import StepResult, train_steps
from betterhalf.runs.progress import Progress
from betterhalf.runs.train import train
from betterhalf.runs.weight_sync import sync_weights

Configured = Callable[..., RunConfig]
DOCS = Path(__file__).parents[2] / "docs"

CISPO = """
from betterhalf.algorithms.aggregation import aggregate
from betterhalf.algorithms.importance import importance_weights


def cispo(inputs, denominators, algorithm):
    current_C, index_C = inputs.current_logprobs_C, inputs.sequence_index_C
    weights = importance_weights(
        algorithm.surrogate, current_C, inputs.proximal_logprobs_C, index_C, inputs.num_sequences
    )
    loss_C = -(weights.weight_C.detach() * inputs.advantages_S[index_C]) * current_C
    return aggregate(algorithm.aggregation, loss_C, inputs, denominators)
"""


def example() -> str:
    """Return the example of docs/losses.md."""
    (found,) = re.findall(r"```python\n(.*?)```", (DOCS / "losses.md").read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


def trained(config: RunConfig) -> tuple[dict[str, Any], list[StepResult]]:
    """Return the digests of the weights after the run's steps, and the results of the steps."""
    parts, results = assemble(config), []
    try:
        sync_weights(parts)
        train_steps(parts, Progress(), results.append)
        return dict(parts.trainer.report().digests), results
    finally:
        parts.close()


CHANGES: dict[str, Any] = {"training": {"steps": 3}, "optimizer": {"learning_rate": 3e-3}}
"""A learning rate at which the clip acts."""


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_the_example_of_the_docs_is_grpo_bit_for_bit(small_config: Configured, tmp_path: Path, precision: str) -> None:
    (tmp_path / "my_loss.py").write_text(example(), encoding="utf-8")
    changes = {**CHANGES, "precision": {"preset": precision}}
    built_in, plain = trained(small_config(**changes))
    own, results = trained(small_config(**changes, algorithm={"loss": f"{tmp_path}/my_loss.py:clipped"}))
    assert own == built_in
    for ours, theirs in zip(results, plain, strict=True):
        for name in ("policy/loss", "optim/grad_norm", "policy/ratio/mean", "optim/token_share/max"):
            assert ours.metrics[name] == theirs.metrics[name]
        # A step without any gradient has no tokens either.
        assert ours.metrics.get("loss/clipped", 0.0) == theirs.metrics["policy/clip_fraction"]
    assert results[0].metrics["policy/clip_fraction"] is None
    assert any(result.metrics.get("loss/clipped") for result in results)


def test_the_example_has_fifteen_lines() -> None:
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= 15


def test_a_loss_with_a_constant_weight_is_cispo_bit_for_bit(small_config: Configured, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CISPO, encoding="utf-8")
    built_in, _ = trained(small_config(**CHANGES, algorithm={"preset": "cispo"}))
    own, _ = trained(small_config(**CHANGES, algorithm={"preset": "cispo", "loss": f"{tmp_path}/mine.py:cispo"}))
    assert own == built_in


def test_a_run_records_its_loss_and_resumes_with_the_same_code_only(small_config: Configured, tmp_path: Path) -> None:
    file, folder = tmp_path / "my_loss.py", str(tmp_path / "run")
    file.write_text(example(), encoding="utf-8")
    settings = {"algorithm": {"loss": f"{file}:clipped"}, "training": {"steps": 1}}
    train(small_config(**settings), folder, resume=False)
    recorded = read_json(tmp_path / "run" / "environment.json")["algorithm"]["loss"]
    assert recorded["path"] == f"{file}:clipped" and len(recorded["digest"]) == 16
    assert 0 <= read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]["loss/clipped"] < 1
    train(small_config(**settings), folder, resume=True)
    file.write_text(example().replace("1.28", "1.2"), encoding="utf-8")
    with pytest.raises(InputError, match="was started with other code in algorithm.loss=.*Restore the file"):
        train(small_config(**settings), folder, resume=True)


def test_a_wrong_loss_is_found_before_the_model_is_loaded(small_config: Configured, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def loss(inputs, denominators, algorithm):\n    return 1.0\n")
    config = small_config(algorithm={"loss": f"{tmp_path}/bad.py:loss"}, model={"name": str(tmp_path / "no-model")})
    with pytest.raises(ConfigError, match="returned float; return a tensor"):
        assemble(config)


def test_the_watchdogs_mask_is_refused_with_a_loss_of_ones_own(small_config: Configured, tmp_path: Path) -> None:
    (tmp_path / "my_loss.py").write_text(example(), encoding="utf-8")
    level = {"metric": "mismatch/k3/mean", "above": 1.0, "action": "mask"}
    config = small_config(algorithm={"loss": f"{tmp_path}/my_loss.py:clipped"}, watchdog={"levels": [level]})
    with pytest.raises(ConfigError, match="which has a loss of your own"):
        train(config, str(tmp_path / "run"), resume=False)


def test_evaluation_and_configuration_do_not_need_the_file_of_the_loss(small_config: Configured) -> None:
    config = small_config(algorithm={"loss": "elsewhere.py:loss"})
    assert checked_algorithm(config, evaluating=True).loss is None
    with pytest.raises(ConfigError, match="the file elsewhere.py does not exist"):
        checked_algorithm(config, evaluating=False)
