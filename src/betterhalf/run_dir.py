"""The run folder: its layout, and writes that survive a kill or a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from betterhalf.errors import InputError, RunError

_RUN_FILES = (
    *("config.json", "environment.json", "contract.json", "metrics.jsonl", "rollouts.jsonl", "summary.json"),
    *("perfectible.jsonl", "checkpoints", "arms", "mismatch.jsonl", "watchdog.jsonl", "probe.json", "doctor.json"),
    *("results.jsonl", "curves.jsonl"),
)


@dataclass(frozen=True, slots=True)
class RunDir:
    """The folder of one run. Creating the object reads and writes nothing."""

    path: Path
    """The folder."""

    @classmethod
    def create(cls, path: str | Path, *, resume: bool) -> Self:
        """Return the folder at `path`, created if missing, for a new run or to continue the one it holds.

        Raises:
            InputError: it holds a run without `resume`, or no run with `resume`, or it cannot be created.
        """
        run = cls(Path(path))
        if resume and not run.holds_run:
            raise InputError(f"{run.path} holds no run to resume. Leave out --resume, or name the right run_dir.")
        if not resume and run.holds_run:
            raise InputError(
                f"{run.path} already holds a run. Continue it with --resume (train, sanity, evaluate, sweep), or "
                "choose another run_dir=PATH."
            )
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{run.path} cannot be created ({error.strerror}). Choose another folder with run_dir=PATH."
            ) from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Return the folder of an existing run, for reading.

        Raises:
            InputError: the folder does not exist or holds no run.
        """
        run = cls(Path(path))
        if not run.path.is_dir():
            raise InputError(f"{run.path} is not a folder. Name the folder of a run, such as runs/sanity-demo-...")
        # A model's folder has a config.json as well.
        if not any((run.path / name).exists() for name in _RUN_FILES[1:]):
            files = ", ".join(_RUN_FILES[1:6])
            raise InputError(f"{run.path} is not a run folder: it has none of {files}. Name another folder.")
        return run

    @property
    def holds_run(self) -> bool:
        """True if the folder has any file of a run."""
        return any(os.path.exists(self.path / name) for name in _RUN_FILES)

    @property
    def configured(self) -> bool:
        """True if its config.json is that of a run; the folder of a model has a file of that name as well."""
        return self.config.is_file() and (self.environment.is_file() or self.checkpoints.is_dir())

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """Versions, hardware, git state."""
        return self.path / "environment.json"

    @property
    def contract(self) -> Path:
        """Reports of trainer and engine on their precision."""
        return self.path / "contract.json"

    @property
    def metrics(self) -> Path:
        """One flat JSON object for each step."""
        return self.path / "metrics.jsonl"

    @property
    def mismatch(self) -> Path:
        """The mismatch of each step by probability, by position and by completion."""
        return self.path / "mismatch.jsonl"

    @property
    def watchdog(self) -> Path:
        """One row for each watchdog level that fired."""
        return self.path / "watchdog.jsonl"

    @property
    def rollouts(self) -> Path:
        """A sample of rollouts with per-token columns."""
        return self.path / "rollouts.jsonl"

    @property
    def summary(self) -> Path:
        """Result of the run; written last."""
        return self.path / "summary.json"

    @property
    def perfectible(self) -> Path:
        """Prompts that the base policy solves in some of its attempts."""
        return self.path / "perfectible.jsonl"

    @property
    def bad_rows(self) -> Path:
        """Rows of the data that were left out because they cannot be used, with reasons; absent if there are none."""
        return self.path / "bad_rows.jsonl"

    @property
    def evaluation(self) -> Path:
        """Results of each prompt evaluated so far."""
        return self.path / "evaluation.jsonl"

    @property
    def evaluated(self) -> Path:
        """Identity of the weights and of the data of an evaluation."""
        return self.path / "evaluation.json"

    @property
    def evaluated_steps(self) -> Path:
        """Results of the evaluations during training, a row for each evaluated step."""
        return self.path / "evaluated_steps.jsonl"

    @property
    def probe(self) -> Path:
        """The mismatch of every pair that `probe` measured."""
        return self.path / "probe.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def tracking(self) -> Path:
        """Folder with a record, for each tracker, of what it was sent."""
        return self.path / "tracking"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """The HTML page."""
        return self.path / "report.html"

    @property
    def arms(self) -> Path:
        """Folder of the arms of a sanity run; each arm has a complete run folder."""
        return self.path / "arms"

    @property
    def results(self) -> Path:
        """Results of a sweep: a row that describes it, one for each run, and one for each combination."""
        return self.path / "results.jsonl"

    @property
    def curves(self) -> Path:
        """Values of chosen metrics at every step, a row for each run of a sweep."""
        return self.path / "curves.jsonl"

    @property
    def cells(self) -> Path:
        """Folder of the runs of a sweep; each has a complete run folder."""
        return self.path / "runs"

    def cell(self, label: str) -> RunDir:
        """Return the run folder of one run of a sweep."""
        return RunDir(self.cells / label)

    def arm(self, name: str) -> RunDir:
        """Return the run folder of one arm."""
        return RunDir(self.arms / name)

    def arm_names(self) -> list[str]:
        """Return the arms in the folder, in the order of the summary, then by name; empty for a plain run."""
        if not self.arms.is_dir():
            return []
        found = sorted(child.name for child in self.arms.iterdir() if child.is_dir())
        summary = read_json(self.summary) if self.summary.exists() else {}
        listed = summary.get("arms")
        order = list(listed) if isinstance(listed, dict) else []
        return sorted(found, key=lambda name: order.index(name) if name in order else len(order))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one step to `metrics.jsonl`."""
        append_jsonl(self.metrics, row)

    def append_rollout(self, row: Mapping[str, Any]) -> None:
        """Add one rollout to `rollouts.jsonl`."""
        append_jsonl(self.rollouts, row)


def write_json_atomic(path: Path, obj: object) -> None:
    """Replace `path` atomically by `obj` as JSON. NaN and infinity become null.

    Raises:
        RunError: the disk is full or not writable; the old file is unchanged.
    """
    write_text_atomic(path, _dumps(obj, indent=2) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` atomically by `text` in UTF-8; raises as `write_json_atomic` does."""
    try:
        with _temporary_beside(path) as (fd, temporary):
            with os.fdopen(fd, "wb") as file:
                # A lone surrogate (half of a character in a completion) has no UTF-8 encoding; it must not stop a run.
                file.write(text.encode(errors="replace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise _write_error(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`.

    Raises:
        InputError: the file is missing or does not hold a JSON object.
    """
    try:
        obj = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}). Restore it, or name another run.") from error
    if not isinstance(obj, dict):
        raise InputError(
            f"{path} holds a {type(obj).__name__} where an object is expected. Restore it, or name another run."
        )
    return obj


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append `row` as one line; NaN and infinity become null. An incomplete last line is removed first.

    Raises:
        RunError: the disk is full or not writable; earlier rows are unchanged.
    """
    line = (_dumps(row) + "\n").encode(errors="replace")
    try:
        with open(path, "ab+", buffering=0) as file:
            size = _mend_tail(path, file.seek(0, os.SEEK_END))
            _write_or_undo(file.fileno(), line, size)
    except OSError as error:
        raise _write_error(path, error) from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the rows of `path`; empty if it does not exist. An incomplete last line, left by a kill, is skipped.

    Raises:
        InputError: any other line is not a JSON object; the message names its number, counted from 1.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse_object(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            raise InputError(f"{path}, line {number}, is not a JSON object. Repair or delete that line.")
    return rows


def truncate_jsonl(path: Path, keep: int | Callable[[dict[str, Any]], bool]) -> None:
    """Keep the rows for which `keep` is true, or those with `step` up to the number `keep`; rewrites atomically.

    Raises:
        InputError: a line is not a JSON object.
        RunError: the disk is full; the old file is unchanged.
    """
    if not path.exists():
        return
    rows = read_jsonl(path)
    kept = [row for row in rows if (keep(row) if callable(keep) else row.get("step", 0) <= keep)]
    write_text_atomic(path, "".join(_dumps(row) + "\n" for row in kept))


def plain_json(obj: object) -> object:
    """Convert `obj` to what JSON can hold: non-finite numbers become None, tuples lists, paths text."""
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        return {str(key): plain_json(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain_json(value) for value in obj]
    return str(obj) if isinstance(obj, Path) else obj


def _dumps(obj: object, indent: int | None = None) -> str:
    return json.dumps(plain_json(obj), indent=indent, ensure_ascii=False, allow_nan=False)


def _parse_object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[tuple[int, str]]:
    """Yield a temporary file in the same folder; it is removed unless it has been moved."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(name, 0o666 & ~umask)
    try:
        yield fd, name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _mend_tail(path: Path, size: int) -> int:
    """Cut off an incomplete last line, or complete one that lacks its newline; return the size of the file."""
    if size == 0:
        return 0
    with open(path, "rb+") as file:
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return size
        file.seek(0)
        content = file.read()
        start = content.rfind(b"\n") + 1
        if _parse_object(content[start:]) is None:
            file.truncate(start)
            return start
        file.write(b"\n")
        return size + 1


def _write_or_undo(fd: int, line: bytes, size: int) -> None:
    """Write `line` at the end of a file of `size` bytes; a failed write leaves the file unchanged."""
    try:
        # After a short write, the next one raises the reason.
        while line:
            line = line[os.write(fd, line) :]
    except OSError:
        os.ftruncate(fd, size)
        raise


def disk_full(error: BaseException) -> bool:
    """Return True if a write failed because the disk or the quota is full.

    safetensors raises its own class, with the number of the error in the message.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(f"(os error {number})" in str(error) for number in full)


def _write_error(path: Path, error: OSError) -> RunError:
    """Return the error to raise for a failed write."""
    if disk_full(error):
        return RunError(
            f"the disk is full: {path} could not be written; earlier files are intact. "
            "Free some space and run the command again, with --resume to continue a run."
        )
    reason = error.strerror or type(error).__name__
    return RunError(
        f"{path} could not be written ({reason}). Check the folder and its permissions, or choose another folder."
    )
