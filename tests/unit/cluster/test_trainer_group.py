"""Ranks as one trainer: packs are split and put back in order, and every failure of a rank has one outcome.

The ranks are threads here; tests/integration has them in processes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from betterhalf.algorithms.loss_stats import LossStats
from betterhalf.algorithms.presets import PRESETS
from betterhalf.batches import Denominators, MicroBatch, PackedSegment
from betterhalf.cluster import trainer_group
from betterhalf.cluster.placement import placement_of
from betterhalf.cluster.rank_process import RankFacts
from betterhalf.cluster.trainer_group import TrainerGroup
from betterhalf.config.schema import RunConfig
from betterhalf.distributed.group import Membership
from betterhalf.errors import ContractError, InputError, LossScaleError, NumericsError, TrainerDiedError
from betterhalf.precision.contract import SideReport
from betterhalf.training.shards import ShardFile
from betterhalf.training.trainer import OptimReport, TokenScores, WrittenState

REPORT = OptimReport(
    skipped=False,
    first_offender=None,
    grad_norm=float("nan"),
    subnormal_fraction=0.0,
    zero_fraction=0.0,
    overflow_fraction=0.0,
    loss_scale=1.0,
    policy_version=1,
)


class FakeRank:
    """A rank that scores each pack by its length, and fails as a test wants it to."""

    def __init__(self, index: int, answers: dict[str, Any]) -> None:
        self.index, self.answers = index, answers
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def load(self, rank: int) -> RankFacts:
        assert rank == self.index
        return RankFacts(machine={"threads": "1"}, model_config="settled", notes=(), parameters=7)

    def address(self) -> tuple[str, int]:
        return "here", 1234

    def build(self, membership: Membership, model_config: Any, restores: bool) -> None:
        assert model_config == "settled"
        assert (membership.rank, membership.host, membership.port) == (self.index, "here", 1234)

    def measure(self, packs: list[MicroBatch], passes: int, temperature: float | None) -> list[TokenScores]:
        assert len(packs) <= passes
        logprobs = [torch.full((1,), float(pack.num_tokens)) for pack in packs]
        return [TokenScores(logprobs_C=one, entropies_C=one) for one in logprobs]

    def forward_backward(self, packs: list[MicroBatch], passes: int, algorithm: Any, _: Denominators) -> LossStats:
        assert algorithm.loss is None and len(packs) <= passes
        tokens = torch.tensor(float(sum(pack.num_tokens for pack in packs)), dtype=torch.float64)
        return replace(LossStats.empty(), tokens=tokens, ratio_max=tokens)

    def optim_step(self, learning_rate: float) -> OptimReport:
        return REPORT

    def report(self) -> SideReport:
        return SideReport(side="trainer", dtypes={"compute": "fp32"}, facts={"torch": "2"}, digests={"w": "1"})

    def sees(self, path: Path) -> bool:
        return path.exists()

    def write_state(self, folder: Path | None) -> WrittenState:
        self.folder = folder
        return WrittenState(loss_scaler={}, policy_version=1, reference_digest="")

    def wait_written(self) -> tuple[ShardFile, ...]:
        return (ShardFile(name=f"model.{self.index}", num_bytes=1, sha256="x"),)

    def take_file(self, name: str) -> bytes:
        return f"{name} of {self.index}".encode()


class FakeProcess:
    """A rank in a thread; implements `Process`."""

    def __init__(self, rank: FakeRank) -> None:
        self.rank, self.name, self.ended = rank, f"rank {rank.index}", False
        self._thread = ThreadPoolExecutor(1)

    def call(self, method: str, *arguments: Any, seconds: float | None = None, aside: bool = False) -> Future[Any]:
        self.rank.calls.append((method, arguments))
        answer = self.rank.answers.get(method)
        if self.ended or answer == "dies":
            self.ended = True
            return failed(TrainerDiedError(f"{self.name} ended"))
        if answer == "hangs":
            return Future()
        if isinstance(answer, Exception):
            return failed(answer)
        if answer is not None:
            return self._thread.submit(lambda: answer)
        return self._thread.submit(getattr(self.rank, method), *arguments)

    def end(self) -> None:
        self.ended = True
        self._thread.shutdown()


def failed(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


class FakeSession:
    """A session whose processes are threads; `answers` has those of each rank in place of its own."""

    def __init__(self, answers: dict[int, dict[str, Any]]) -> None:
        self.answers = answers
        self.started: list[FakeProcess] = []

    def start(self, build: Any, slot: Any, name: str, died: Any, **arguments: Any) -> FakeProcess:
        index = int(name.split()[1])
        self.started.append(FakeProcess(FakeRank(index, self.answers.get(index, {}))))
        return self.started[-1]


Make = Callable[..., tuple[TrainerGroup, FakeSession]]


@pytest.fixture
def sessions() -> list[FakeSession]:
    """Sessions of the groups that a test made, those that did not start included."""
    return []


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, sessions: list[FakeSession]) -> Make:
    """Make a group of two ranks; keyword arguments are settings of the cluster."""
    monkeypatch.setattr(trainer_group, "_GRACE_SECONDS", 0.05)

    def group(
        answers: dict[int, dict[str, Any]] | None = None,
        folder: Path | None = None,
        restores: bool = False,
        **cluster: Any,
    ) -> tuple[TrainerGroup, FakeSession]:
        settings = {"backend": "ray", "trainers": 2, **cluster}
        config = RunConfig.model_validate({"cluster": settings})
        session: Any = FakeSession(answers or {})
        sessions.append(session)
        slots = placement_of(config.cluster).ranks
        return TrainerGroup(config, session, slots, keep_reference=False, folder=folder, restores=restores), session

    return group


def pack(tokens: int) -> MicroBatch:
    ids, floats = torch.zeros(tokens, dtype=torch.int64), torch.zeros(1)
    return MicroBatch(
        token_ids_T=ids,
        position_ids_T=ids,
        segments=(PackedSegment(length=tokens),),
        loss_rows_C=ids[:1],
        target_ids_C=ids[:1],
        sequence_index_C=ids[:1],
        behavior_logprobs_C=floats,
        advantages_S=floats,
        rollout_index_S=(0,),
    )


DENOMINATORS = Denominators(sequences=1.0, tokens=1.0, max_tokens=1)


def methods(process: FakeProcess) -> list[str]:
    return [method for method, _ in process.rank.calls]


def test_scores_come_back_in_the_order_of_the_packs(make: Make) -> None:
    group, session = make()
    lengths = [3, 9, 2, 5, 4]
    found = group.measure([pack(length) for length in lengths])
    assert [float(one.logprobs_C) for one in found] == lengths
    asked = [call[1] for process in session.started for call in process.rank.calls if call[0] == "measure"]
    # Longest first, to the rank with the fewest tokens: 9 | 5 4, a tie, then 3 and 2; both run three passes.
    assert [[one.num_tokens for one in packs] for packs, *_ in asked] == [[9, 3], [5, 4, 2]]
    assert [passes for _, passes, _ in asked] == [3, 3]


def test_statistics_are_added_in_rank_order_each_by_its_reduction(make: Make) -> None:
    group, _ = make()
    stats = group.forward_backward([pack(4), pack(3), pack(2)], PRESETS["grpo"], DENOMINATORS)
    assert (float(stats.tokens), float(stats.ratio_max)) == (9.0, 5.0)


def test_without_packs_no_rank_is_asked(make: Make) -> None:
    group, session = make()
    assert group.measure([]) == []
    assert float(group.forward_backward([], PRESETS["grpo"], DENOMINATORS).tokens) == 0
    assert all(set(methods(process)) <= {"load", "address", "build"} for process in session.started)


def test_reports_of_skipped_steps_are_equal_although_their_norm_is_nan(make: Make) -> None:
    group, _ = make()
    assert group.optim_step(1e-3).policy_version == 1


def test_ranks_that_report_different_steps_are_ended(make: Make) -> None:
    group, session = make({1: {"optim_step": replace(REPORT, loss_scale=2.0)}})
    with pytest.raises(TrainerDiedError, match="rank 1 reports another optimizer step than rank 0"):
        group.optim_step(1e-3)
    assert all(process.ended for process in session.started)
    with pytest.raises(TrainerDiedError, match="another optimizer step"):
        group.report()


def test_the_rank_that_ended_is_named_though_another_noticed_it_first(make: Make) -> None:
    closed = RuntimeError("Connection closed by peer")
    group, session = make({0: {"optim_step": closed}, 1: {"optim_step": "dies"}})
    with pytest.raises(TrainerDiedError, match="^rank 1 ended$"):
        group.optim_step(1e-3)
    assert all(process.ended for process in session.started)


def test_a_foreign_error_names_the_rank_and_those_that_did_not_answer(make: Make) -> None:
    group, session = make({0: {"optim_step": "hangs"}, 1: {"optim_step": RuntimeError("out of\nmemory")}})
    with pytest.raises(
        TrainerDiedError, match="^rank 1 failed in 'optim_step': RuntimeError: out of memory; rank 0 did not answer$"
    ):
        group.optim_step(1e-3)
    assert all(process.ended for process in session.started)


def test_an_error_that_all_ranks_raise_alike_is_raised_as_it_is_and_ends_no_rank(make: Make) -> None:
    both = {index: {"optim_step": LossScaleError("at its floor")} for index in range(2)}
    group, session = make(both)
    with pytest.raises(LossScaleError, match="at its floor"):
        group.optim_step(1e-3)
    assert not any(process.ended for process in session.started)


def test_an_error_of_one_rank_alone_is_raised_as_it_is_and_ends_the_others(make: Make) -> None:
    group, session = make({0: {"report": "hangs"}, 1: {"report": NumericsError("NaN")}})
    with pytest.raises(NumericsError, match="NaN"):
        group.report()
    assert all(process.ended for process in session.started)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"machine": {"threads": "2"}}, "rank 0 has threads 1, and rank 1 has 2: equal packs would round"),
        ({"machine": {"threads": "1", "loss": "abc"}}, "rank 0 has loss none, and rank 1 has abc"),
        ({"parameters": 8}, "rank 0 loads a model of 7 parameters, and rank 1 one of 8"),
    ],
)
def test_ranks_that_would_compute_otherwise_are_refused(make: Make, change: dict[str, Any], words: str) -> None:
    facts = RankFacts(machine={"threads": "1"}, model_config="settled", notes=(), parameters=7)
    with pytest.raises(InputError, match=words):
        make({1: {"load": replace(facts, **change)}})


def test_ranks_that_wait_for_the_weights_of_rank_0_need_not_know_the_model(make: Make) -> None:
    waiting = RankFacts(machine={"threads": "1"}, model_config=None, notes=(), parameters=None)
    group, _ = make({1: {"load": waiting}})
    assert (group.facts.parameters, group.facts.model_config) == (7, "settled")


def test_a_difference_between_reports_is_refused_with_both_ranks(make: Make) -> None:
    other = SideReport(side="trainer", dtypes={"compute": "fp32"}, facts={"torch": "3"}, digests={"w": "1"})
    group, _ = make({1: {"report": other}})
    with pytest.raises(ContractError, match="torch is 2 in rank 0 and 3 in rank 1"):
        group.report()


def test_a_restart_starts_new_ranks_that_answer(make: Make) -> None:
    answers: dict[int, dict[str, Any]] = {1: {"report": "dies"}}
    group, session = make(answers)
    with pytest.raises(TrainerDiedError, match="rank 1 ended"):
        group.report()
    with pytest.raises(TrainerDiedError, match="rank 1 ended"):
        group.optim_step(1e-3)
    answers[1].clear()
    group.restart()
    assert len(session.started) == 4
    assert not group.optim_step(1e-3).skipped


def test_ranks_are_told_that_a_checkpoint_follows_but_not_those_of_a_restart(make: Make) -> None:
    group, session = make(restores=True)
    group.restart()
    told = [dict(process.rank.calls)["build"][2] for process in session.started]
    assert told == [True, True, False, False]


def test_the_run_folder_must_be_seen_by_every_rank_before_any_loads_the_model(
    make: Make, sessions: list[FakeSession], tmp_path: Path
) -> None:
    _, session = make(folder=tmp_path)
    assert methods(session.started[0])[:2] == ["sees", "load"]
    with pytest.raises(InputError, match=r"rank 1 does not see the run folder .*cluster\.shared_folder=false"):
        make({1: {"sees": False}}, folder=tmp_path)
    assert [methods(process) for process in sessions[-1].started] == [["sees"], ["sees"]]
    assert all(process.ended for process in sessions[-1].started)
    make({1: {"sees": False}}, folder=tmp_path, shared_folder=False)
    assert list(tmp_path.iterdir()) == []


def test_files_of_ranks_are_fetched_where_the_folder_is_not_shared(make: Make, tmp_path: Path) -> None:
    group, session = make(shared_folder=False)
    group.write_state(tmp_path)
    assert [process.rank.folder for process in session.started] == [None, None]
    assert [file.name for file in group.wait_written()] == ["model.0", "model.1"]
    assert (tmp_path / "model.1").read_bytes() == b"model.1 of 1"
    shared, session = make()
    shared.write_state(tmp_path)
    assert [process.rank.folder for process in session.started] == [tmp_path, tmp_path]


def test_an_interrupted_call_leaves_a_group_that_answers_nothing_more(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, _ = make({0: {"report": "hangs"}})

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer_group, "wait", interrupted)
        group.report()
    with pytest.raises(TrainerDiedError, match=r"interrupted in 'report'; continue with --resume"):
        group.optim_step(1e-3)


def test_closing_twice_is_harmless(make: Make) -> None:
    group, session = make()
    group.close()
    group.close()
    assert all(process.ended for process in session.started)
