"""A crashed engine is restarted, up to a limit."""

from __future__ import annotations

import pytest

from betterhalf.config.schema import RunConfig
from betterhalf.errors import EngineDiedError, EngineError
from betterhalf.rollout.restarts import Restarts
from betterhalf.runs.recovery import restarts_of, retry_on_engine_death


class Engine:
    """Engine that dies in the next `deaths` calls of `work`, and in the next `bad_starts` of `revive`."""

    def __init__(self, deaths: int, bad_starts: int = 0) -> None:
        self.deaths, self.bad_starts = deaths, bad_starts
        self.calls: list[str] = []

    def work(self) -> str:
        self.calls.append("work")
        if self.deaths:
            self.deaths -= 1
            raise EngineDiedError("killed")
        return "done"

    def revive(self) -> None:
        self.calls.append("revive")
        if self.bad_starts:
            self.bad_starts -= 1
            raise EngineDiedError("killed at start")


def run(engine: Engine, limit: int) -> tuple[str, list[str], int]:
    notes: list[str] = []
    restarts = Restarts(limit, notes.append)
    return retry_on_engine_death(engine.work, engine.revive, restarts), notes, restarts.count


def test_a_healthy_engine_is_left_alone() -> None:
    engine = Engine(0)
    assert run(engine, 3) == ("done", [], 0)
    assert engine.calls == ["work"]


def test_a_death_costs_a_restart_and_a_repetition() -> None:
    engine = Engine(1)
    result, notes, count = run(engine, 3)
    assert (result, count) == ("done", 1)
    assert engine.calls == ["work", "revive", "work"]
    assert notes == ["note: killed\nRestarting the engine (1 of 3); no step is lost."]


def test_a_death_while_it_is_revived_counts_as_well() -> None:
    engine = Engine(1, bad_starts=1)
    assert run(engine, 2)[2] == 2
    assert engine.calls == ["work", "revive", "revive", "work"]


def test_without_any_restart_the_error_is_raised_as_it_is() -> None:
    with pytest.raises(EngineDiedError, match="^killed$"):
        run(Engine(1), 0)


def test_it_gives_up_beyond_the_limit() -> None:
    with pytest.raises(EngineDiedError, match=r"died 3 times in one step \(engine.max_restarts=2\); killed"):
        run(Engine(3), 2)


def test_other_errors_are_not_survived() -> None:
    def fail() -> None:
        raise EngineError("nonsense")

    with pytest.raises(EngineError, match="nonsense"):
        retry_on_engine_death(fail, fail, Restarts(3))


def test_only_an_engine_with_a_process_is_restarted() -> None:
    assert restarts_of(RunConfig()).limit == 0
    assert restarts_of(RunConfig.model_validate({"engine": {"type": "vllm", "max_restarts": 2}})).limit == 2


def test_notes_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    Restarts(1).note(EngineDiedError("killed"))
    assert "Restarting the engine (1 of 1)" in capsys.readouterr().err
