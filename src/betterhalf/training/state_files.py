"""Tensors of a trainer's state in files, which each rank writes for itself in the background, and any number reads."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from betterhalf.distributed.shard_range import ShardRange
from betterhalf.errors import CheckpointError
from betterhalf.training.shards import ShardFile, read_rows, write_shards, writing
from betterhalf.training.trainer import TrainerState, WrittenState

KINDS = ("model", "optimizer")
"""Files that every checkpoint has."""
_REFERENCE = "reference"
"""File that only some checkpoints have."""

_NICE = 19
"""Lowest priority: 1.5% of a core that a thread of normal priority wants as well."""


class StateFiles:
    """Writer of one rank's files; one checkpoint at a time."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        """Write as `rank` of `world_size`."""
        self._rank = rank
        self._world_size = world_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_give_way)
        self._files: Future[tuple[ShardFile, ...]] | None = None

    def write(self, folder: Path, state: TrainerState, ranges: Mapping[str, ShardRange]) -> WrittenState:
        """Copy the tensors to host memory, and start to write them.

        Args:
            folder: exists.
            state: tensors of this rank.
            ranges: rows of each parameter that they are; empty if they are whole.

        Raises:
            RunError: the files of the checkpoint before could not be written.
        """
        if self._files is not None:
            self.wait()
        kinds = dict(zip(KINDS, (state.model, state.optimizer), strict=True))
        if state.reference:
            kinds[_REFERENCE] = state.reference
        copies = {kind: _host_copies(tensors) for kind, tensors in kinds.items()}
        self._files = self._thread.submit(self._write, folder, copies, dict(ranges))
        return WrittenState(
            loss_scaler=dict(state.loss_scaler),
            policy_version=state.policy_version,
            reference_digest=state.reference_digest,
            base_digest=state.base_digest,
        )

    def wait(self) -> tuple[ShardFile, ...]:
        """Wait until the files of the last `write` are on the disk.

        Raises:
            RunError: one cannot be written; the message names the checkpoint.
        """
        assert self._files is not None, "nothing has been written"
        files, self._files = self._files, None
        return files.result()

    def _write(
        self, folder: Path, copies: dict[str, dict[str, Tensor]], ranges: Mapping[str, ShardRange]
    ) -> tuple[ShardFile, ...]:
        files = []
        with writing(folder):
            for kind in list(copies):
                place = {"rank": self._rank, "world_size": self._world_size}
                # Each copy is freed as soon as it is written.
                files.append(write_shards(folder, kind, copies.pop(kind), ranges, **place))
        return tuple(files)


def _give_way() -> None:
    """Lower the priority of this thread: where no core is free, computing gets nearly all of the time."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def read_state(folder: Path, written: WrittenState, ranges: Mapping[str, ShardRange], source: str) -> TrainerState:
    """Read one rank's rows of a checkpoint that any number of ranks has written.

    Args:
        folder: of the checkpoint, whose files have been verified.
        written: the state without its tensors.
        ranges: rows of each parameter; empty to read whole tensors.
        source: name of the checkpoint, for messages.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    model, optimizer, reference = (read_rows(folder, kind, ranges) for kind in (*KINDS, _REFERENCE))
    return TrainerState(
        model=model,
        optimizer=optimizer,
        loss_scaler=written.loss_scaler,
        policy_version=written.policy_version,
        reference=reference,
        reference_digest=written.reference_digest,
        base_digest=written.base_digest,
        source=source,
    )


def require_base(state: TrainerState, digest: str) -> None:
    """Refuse adapters that were trained on another base, and weights where adapters are trained.

    Args:
        state: of a trainer.
        digest: checksum of the base that this trainer loads; empty without adapters.

    Raises:
        CheckpointError: the state's base is another one.
    """
    if state.base_digest != digest:
        base, own = (f"the base {one}" if one else "all weights" for one in (state.base_digest, digest))
        raise CheckpointError(
            f"{state.source} was trained on {base}, and this run trains {own}: the model's files, its precision or "
            "[lora] differ. Restore the model that the adapter was trained on, or start again in another run_dir"
        )
