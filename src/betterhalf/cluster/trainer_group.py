"""Trainer of several ranks: it splits packs over them, calls all of them, and combines their results."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from betterhalf.algorithms.loss_stats import LossStats
from betterhalf.algorithms.presets import Algorithm
from betterhalf.batches import Denominators, MicroBatch
from betterhalf.cluster.placement import Slot
from betterhalf.cluster.process import Process
from betterhalf.cluster.rank_process import RankFacts, RankProcess
from betterhalf.cluster.session import Session
from betterhalf.cluster.trained import LoadTrained
from betterhalf.cluster.weight_versions import SentWeights, StoredPart, StoredWeights
from betterhalf.cluster.whole_state import whole_state
from betterhalf.config.schema import RunConfig
from betterhalf.diagnostics.sizes import item_size
from betterhalf.distributed.group import Membership
from betterhalf.errors import BetterhalfError, ClusterError, ContractError, InputError, TrainerDiedError
from betterhalf.precision.contract import SideReport
from betterhalf.precision.merge import MergeCount
from betterhalf.training.shards import ShardFile, write_file, writing
from betterhalf.training.split import split_packs
from betterhalf.training.state_files import read_state
from betterhalf.training.trainer import OptimReport, TokenScores, TrainerState, WrittenState

_GRACE_SECONDS = 5.0
"""Seconds in which other ranks may still answer after one failed; gloo and NCCL notice at once that a peer ended."""


class TrainerGroup:
    """All ranks of a run; implements `Trainer`.

    Each call goes to all ranks at the same time. When a rank fails or ends, the group ends all others and raises
    TrainerDiedError with the rank, its host and the last lines of its log. Errors that betterhalf raises on purpose in
    a rank, such as LossScaleError, are raised unchanged.
    """

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        slots: Sequence[Slot],
        *,
        keep_reference: bool,
        trained: LoadTrained | None = None,
        folder: Path | None = None,
        restores: bool = False,
    ) -> None:
        """Start the ranks, and load and shard the model in them.

        Args:
            config: configuration of the run.
            session: cluster in which the ranks run.
            slots: place of each rank.
            keep_reference: True to keep a reference policy.
            trained: loads weights that replace the model's own.
            folder: run folder, in which every rank writes its part of each checkpoint; None if none is written.
            restores: True if `read_state` follows before any weight is used, so that the model's own need not be read.

        Raises:
            InputError: a rank is on a host without the folder, which is found before the model is loaded; or ranks
                differ in threads, processor features or versions, so that equal packs would round differently.
            TrainerDiedError: a rank ended, or was not ready within `cluster.start_seconds`.
        """
        self._config, self._session, self._slots = config, session, tuple(slots)
        self._arguments = {"config": config, "keep_reference": keep_reference, "trained": trained}
        self._folder = folder
        self._ranks: tuple[Process, ...] = ()
        self._failed: TrainerDiedError | None = None
        self._unchanging: tuple[StoredPart, ...] = ()
        """Weights that are the same in every version, such as the base of LoRA adapters, once they are stored."""
        self._writing = Path()
        self.facts: RankFacts
        """Facts on which all ranks agree: model, notes, number of parameters."""
        self._start(restores=restores)

    # -- processes

    def _start(self, *, restores: bool = False) -> None:
        """Start all ranks, and make them load the model and join."""
        seconds = self._config.cluster.start_seconds
        self._failed, self._unchanging = None, ()
        self._ranks = tuple(
            self._session.start(RankProcess, slot, f"rank {index}", TrainerDiedError, **self._arguments)
            for index, slot in enumerate(self._slots)
        )
        try:
            self._require_folder(seconds)
            # All ranks load before any joins, because joining has the shorter time limit of a collective.
            places = range(len(self._ranks))
            self.facts = self._agreed(self._each("load", [(index,) for index in places], seconds=seconds))
            host, port = self._gathered("address", [self._ranks[0].call("address", seconds=seconds)])[0]
            joins = [
                Membership(
                    rank=index,
                    world_size=len(self._ranks),
                    host=host,
                    port=port,
                    seconds=self._config.cluster.collective_seconds,
                )
                for index in places
            ]
            self._each("build", [(each, self.facts.model_config, restores) for each in joins], seconds=seconds)
        except BaseException:
            self.close()
            raise

    def _require_folder(self, seconds: float) -> None:
        """Require that every rank sees the run folder, unless `cluster.shared_folder` is false."""
        if self._folder is None or not self._config.cluster.shared_folder:
            return
        with tempfile.NamedTemporaryFile(prefix=".shared-", dir=self._folder) as file:
            seen: list[bool] = self._all("sees", Path(file.name).resolve(), seconds=seconds)
        if not all(seen):
            raise InputError(
                f"{self._ranks[seen.index(False)].name} does not see the run folder {self._folder}, in which it has to "
                "write its part of each checkpoint; put run_dir on a file system that all hosts share, or set "
                "cluster.shared_folder=false to send checkpoints through this process"
            )

    def _agreed(self, facts: Sequence[RankFacts]) -> RankFacts:
        """Return the facts of rank 0 after comparing the others with them."""
        first = facts[0]
        for index, other in enumerate(facts):
            keys = [*first.machine, *(key for key in other.machine if key not in first.machine)]
            different = next((key for key in keys if first.machine.get(key) != other.machine.get(key)), None)
            if different is not None:
                raise InputError(
                    f"{self._ranks[0].name} has {different} {first.machine.get(different, 'none')}, and "
                    f"{self._ranks[index].name} has {other.machine.get(different, 'none')}: equal packs would round "
                    "differently on them. Give all ranks equal hosts with the same versions and files."
                )
            if other.parameters not in (first.parameters, None):
                raise InputError(
                    f"{self._ranks[0].name} loads a model of {first.parameters} parameters, and "
                    f"{self._ranks[index].name} one of {other.parameters}; put the same model on every host"
                )
        return first

    def _all(self, method: str, *arguments: Any, seconds: float | None = None) -> list[Any]:
        """Call a method of every rank with the same arguments, and return the results in rank order."""
        return self._each(method, [arguments] * len(self._ranks), seconds=seconds)

    def _each(self, method: str, arguments: Iterable[tuple[Any, ...]], seconds: float | None = None) -> list[Any]:
        """Call a method of every rank with arguments of its own, and return the results in rank order."""
        if self._failed is not None:
            raise self._failed
        limit = self._config.cluster.call_seconds if seconds is None else seconds
        calls = [rank.call(method, *own, seconds=limit) for rank, own in zip(self._ranks, arguments, strict=True)]
        return self._gathered(method, calls)

    def _gathered(self, method: str, calls: Sequence[Future[Any]]) -> list[Any]:
        """Wait for all results, or, after the first failure, up to `_GRACE_SECONDS` for the others, and raise it."""
        try:
            wait(calls, return_when=FIRST_EXCEPTION)
            if any(call.done() and call.exception() for call in calls):
                wait(calls, timeout=_GRACE_SECONDS)
                raise self._failure(method, calls)
        except KeyboardInterrupt:
            # The ranks may still run this call, so no other one may follow.
            self._failed = TrainerDiedError(f"the ranks were interrupted in {method!r}; continue with --resume")
            raise
        return [call.result() for call in calls]

    def _failure(self, method: str, calls: Sequence[Future[Any]]) -> BaseException:
        """Return the error to raise, and end all ranks unless all raised the same type of BetterhalfError.

        The loss of the cluster has priority, then a rank that ended, then a BetterhalfError, then any other error.
        """
        errors = {index: error for index, call in enumerate(calls) if call.done() and (error := call.exception())}
        ours = [error for error in errors.values() if isinstance(error, BetterhalfError)]
        if len(ours) == len(calls) and len({type(error) for error in ours}) == 1 and not self._any_ended():
            return ours[0]
        lost = next((error for error in ours if isinstance(error, ClusterError)), None)
        ended = next((error for index, error in errors.items() if self._ranks[index].ended), None)
        error = lost or ended or next(iter(ours), None) or self._foreign(method, calls, errors)
        self._end_all()
        self._failed = error if isinstance(error, TrainerDiedError) else TrainerDiedError(str(error))
        return error

    def _any_ended(self) -> bool:
        return any(rank.ended for rank in self._ranks)

    def _foreign(self, method: str, calls: Sequence[Future[Any]], errors: dict[int, BaseException]) -> TrainerDiedError:
        """Wrap an error of torch or Python, and name the ranks that did not answer."""
        index, error = next(iter(errors.items()))
        waiting = [self._ranks[other].name for other, call in enumerate(calls) if not call.done()]
        words = f"; {' and '.join(waiting)} did not answer" if waiting else ""
        died = TrainerDiedError(f"{self._ranks[index].name} failed in {method!r}: {_in_short(error)}{words}")
        died.__cause__ = error
        return died

    def _end_all(self) -> None:
        for rank in self._ranks:
            rank.end()

    # -- scoring and learning

    def measure(self, packs: Sequence[MicroBatch], temperature: float | None = None) -> list[TokenScores]:
        """See `Trainer.measure`; the scores are in the order of `packs`."""
        return self._scores("measure", packs, temperature)

    def measure_reference(self, packs: Sequence[MicroBatch]) -> list[TokenScores]:
        """See `Trainer.measure_reference`."""
        return self._scores("measure_reference", packs)

    def measure_kept(self, packs: Sequence[MicroBatch]) -> list[TokenScores]:
        """See `Trainer.measure_kept`."""
        return self._scores("measure_kept", packs)

    def _scores(self, method: str, packs: Sequence[MicroBatch], *more: Any) -> list[TokenScores]:
        if not packs:
            return []
        split = split_packs(packs, len(self._ranks))
        found = self._each(method, [([packs[i] for i in share], split.passes, *more) for share in split.ranks])
        scores = {
            i: one for share, own in zip(split.ranks, found, strict=True) for i, one in zip(share, own, strict=True)
        }
        return [scores[index] for index in range(len(packs))]

    def refresh_reference(self) -> None:
        """See `Trainer.refresh_reference`."""
        self._all("refresh_reference")

    def keep_version(self) -> None:
        """See `Trainer.keep_version`."""
        self._all("keep_version")

    def forward_backward(
        self, packs: Sequence[MicroBatch], algorithm: Algorithm, denominators: Denominators
    ) -> LossStats:
        """See `Trainer.forward_backward`; the ranks' statistics are added in rank order."""
        if not packs:
            return LossStats.empty()
        split = split_packs(packs, len(self._ranks))
        # Each rank loads the user's loss function from the file on its own host.
        sent = replace(algorithm, loss=None)
        shares = [[packs[i] for i in share] for share in split.ranks]
        found = self._each("forward_backward", [(share, split.passes, sent, denominators) for share in shares])
        return sum(found, LossStats.empty())

    def optim_step(self, learning_rate: float) -> OptimReport:
        """See `Trainer.optim_step`.

        Raises:
            TrainerDiedError: the ranks' reports differ, so that their weights may as well.
        """
        reports: list[OptimReport] = self._all("optim_step", learning_rate)
        shown = [repr(report) for report in reports]  # NaN, the norm of a skipped step, equals itself as text
        for rank, other in zip(self._ranks, shown, strict=True):
            if other != shown[0]:
                self._failed = TrainerDiedError(
                    f"{rank.name} reports another optimizer step than {self._ranks[0].name}, so their weights may "
                    f"differ: {other} and {shown[0]}; continue from the last checkpoint with --resume"
                )
                self._end_all()
                raise self._failed
        return reports[0]

    # -- weights for the engines, and the report

    def weight_stream(self) -> StoredWeights | SentWeights:
        """See `Trainer.weight_stream`.

        The ranks store another copy of the weights, which the returned references keep alive. A transfer that bypasses
        the object store sends the weights later.
        """
        if self._config.transfer == "object_store":
            version, parts = self._publish()
            return StoredWeights(parts, version, self.facts.model_config)
        versions: list[int] = self._all("policy_version")
        size = item_size(self._config.precision.roles().wire_dtype) * self.parameters
        return SentWeights(versions[0], self.facts.model_config, size, lambda: self._stored(versions[0]))

    def _publish(self) -> tuple[int, tuple[StoredPart, ...]]:
        """Return version and parts of all weights; those that never change are stored once, until ranks restart."""
        published: list[tuple[int, tuple[StoredPart, ...]]] = self._all("publish_weights", not self._unchanging)
        version, parts = published[0]
        self._unchanging = self._unchanging or tuple(part for part in parts if part.unchanging)
        return version, (*self._unchanging, *(part for part in parts if not part.unchanging))

    def _stored(self, policy_version: int) -> tuple[StoredPart, ...]:
        version, parts = self._publish()
        if version != policy_version:
            raise TrainerDiedError(
                f"the weights of policy version {policy_version} are lost: the trainer holds version {version}; "
                "continue from the last checkpoint with --resume"
            )
        return parts

    @property
    def first(self) -> Process:
        """Process of rank 0, which sends weights; `restart` replaces it."""
        return self._ranks[0]

    @property
    def parameters(self) -> int:
        """Number of the model's parameters, counting a tied head once."""
        assert self.facts.parameters is not None, "rank 0 reads the model"
        return self.facts.parameters

    def on_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of `RankProcess` on all ranks, and return the results in rank order."""
        return self._all(method, *arguments)

    def merge_count(self) -> MergeCount | None:
        """See `Trainer.merge_count`; each rank returns the sum over all ranks."""
        counts: list[MergeCount | None] = self._all("merge_count")
        return counts[0]

    def report(self) -> SideReport:
        """Return the report on which all ranks agree.

        Raises:
            ContractError: ranks differ in formats or facts.
        """
        reports: list[SideReport] = self._all("report")
        for rank, other in zip(self._ranks, reports, strict=True):
            different = _first_difference(reports[0], other)
            if different is not None:
                region, mine, theirs = different
                raise ContractError(
                    f"{region} is {mine} in {self._ranks[0].name} and {theirs} in {rank.name}: the ranks of one "
                    "trainer must compute alike. Give all ranks equal hosts with the same versions."
                )
        return reports[0]

    # -- state

    def state(self) -> TrainerState:
        """Return the whole state, gathered in this process; only for models that fit into it."""
        return whole_state(self._all("state"))

    def load(self, state: TrainerState) -> None:
        """See `Trainer.load`; each rank takes its own rows."""
        self._all("load_state", self._session.store(state))

    def write_state(self, folder: Path) -> WrittenState:
        """See `Trainer.write_state`."""
        self._writing = folder
        written: list[WrittenState] = self._all("write_state", self._shared(folder))
        return written[0]

    def _shared(self, folder: Path) -> Path | None:
        return folder.resolve() if self._config.cluster.shared_folder else None

    def wait_written(self) -> tuple[ShardFile, ...]:
        """See `Trainer.wait_written`."""
        calls = [self._aside(rank, "wait_written") for rank in self._ranks]
        wait(calls)
        files: list[tuple[ShardFile, ...]] = [call.result() for call in calls]
        if not self._config.cluster.shared_folder:
            with writing(self._writing):
                for rank, own in zip(self._ranks, files, strict=True):
                    for file in own:
                        content = self._aside(rank, "take_file", file.name).result()
                        write_file(self._writing / file.name, iter([memoryview(content)]))
        return tuple(file for own in files for file in own)

    def _aside(self, rank: Process, method: str, *arguments: Any) -> Future[Any]:
        return rank.call(method, *arguments, seconds=self._config.cluster.call_seconds, aside=True)

    def read_state(self, folder: Path, written: WrittenState, source: str) -> None:
        """See `Trainer.read_state`."""
        if self._shared(folder):
            self._all("read_state", folder.resolve(), written, source)
        else:
            self.load(read_state(folder, written, {}, source))

    def restart(self) -> None:
        """See `Trainer.restart`; the caller limits the number of restarts."""
        self._end_all()
        self._start()

    def close(self) -> None:
        """End all ranks; calling it twice is harmless."""
        self._failed = self._failed or TrainerDiedError("the ranks of the trainer were ended")
        self._end_all()


def _in_short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"


def _first_difference(first: SideReport, other: SideReport) -> tuple[str, str, str] | None:
    """Return (region, value in `first`, value in `other`) of the first difference; None if they are equal."""
    for mine, theirs in ((first.dtypes, other.dtypes), (first.facts, other.facts), (first.digests, other.digests)):
        for region in [*mine, *(key for key in theirs if key not in mine)]:
            if mine.get(region) != theirs.get(region):
                return region, str(mine.get(region, "nothing")), str(theirs.get(region, "nothing"))
    return None
