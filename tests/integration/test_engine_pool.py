"""A run with several engines, each in a thread: what it learns, and that an engine that ends changes no number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.engine_handles import ThreadHandle, dies, fails

from betterhalf.config.schema import RunConfig
from betterhalf.errors import EngineError
from betterhalf.precision.roles import Precision
from betterhalf.rollout.build import ENGINES
from betterhalf.rollout.native.kind import NATIVE
from betterhalf.rollout.pool import EnginePool
from betterhalf.run_dir import RunDir, read_json, read_jsonl
from betterhalf.runs.train import train

STEPS = {"steps": 3, "prompts_per_step": 4, "group_size": 2, "optimizer_steps": 1}

Faults = dict[str, list[Callable[[], None] | None]]
Rows = list[dict[str, Any]]
Run = Callable[..., tuple[Rows, list[ThreadHandle]]]


@pytest.fixture
def run(small_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Return run(name, engines, faults of the last engine) -> rows of its metrics, and the handles."""

    def trained(name: str, engines: int, faults: Faults | None = None) -> tuple[Rows, list[ThreadHandle]]:
        handles: list[ThreadHandle] = []

        def build(config: RunConfig, hf_config: Any, stops: tuple[int, ...], precision: Precision) -> EnginePool:
            for number in range(engines):
                handles.append(ThreadHandle(number, build=lambda: NATIVE.build(config, hf_config, stops, precision)))
            handles[-1].faults = faults or {}
            return EnginePool(handles, max_restarts=2, rollout_dtype=precision.roles.rollout_dtype)

        monkeypatch.setitem(ENGINES, "native", replace(NATIVE, build=build))
        train(small_config(training=STEPS), str(tmp_path / name), resume=False)
        assert all(handle.closed for handle in handles)
        return without_times(read_jsonl(RunDir(tmp_path / name).metrics)), handles

    return trained


def without_times(rows: Rows) -> Rows:
    return [{key: row[key] for key in row if not key.startswith(("time/", "system/"))} for row in rows]


def restarts(rows: Rows) -> list[float]:
    return [row.pop("rollout/engine_restarts") for row in rows]


def test_an_engine_that_ends_while_it_samples_loads_or_wakes_changes_no_metric(run: Run, tmp_path: Path) -> None:
    plain, handles = run("plain", 2)
    assert [len(handle.asked) for handle in handles] == [3, 3]
    contract = read_json(RunDir(tmp_path / "plain").contract)
    assert contract["ok"] and contract["first_difference"] is None
    assert restarts(plain) == [0, 0, 0]

    # Of the last engine: the second sampling, the sync after it, and the wake before the third.
    faults: Faults = {
        "generate": [None, dies()],
        "load_weights": [None, None, None, dies()],
        "wake": [None] * 5 + [dies()],
    }
    disturbed, handles = run("disturbed", 2, faults)
    assert not any(faults.values()), "every fault happened"
    assert [handle.starts for handle in handles] == [1, 4]
    assert sum(restarts(disturbed)) == 3
    assert disturbed == plain


def test_nan_in_one_engine_ends_the_run_before_anything_is_trained_on_it(run: Run, tmp_path: Path) -> None:
    faults: Faults = {"generate": [None, fails(EngineError("the logprob of token 0 is not finite in fp16"))]}
    with pytest.raises(EngineError, match=r"engine 1 \(host h, process 101\): the logprob of token 0 is not finite"):
        run("spoiled", 2, faults)
    assert [row["step"] for row in read_jsonl(RunDir(tmp_path / "spoiled").metrics)] == [1]
