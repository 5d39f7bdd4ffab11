"""The way from a run to the process of one tracker: a bounded queue and two threads that the run never waits for."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from betterhalf.run_dir import plain_json
from betterhalf.tracking.sent import Sent
from betterhalf.tracking.tracker import TrackedRun

QUEUE_ROWS = 1000
"""Number of messages that wait for a slow tracker; more are dropped, and counted."""

_MODULE = "betterhalf.tracking.tracker_process"

_Message = Mapping[str, Any]


class Feed:
    """Sender to one tracker. `send` never waits, and nothing that the tracker does reaches the run."""

    def __init__(self, name: str, place: str, run: TrackedRun, folder: Path, backlog: Sequence[_Message]) -> None:
        """Start the process of the tracker.

        Args:
            name: name of the tracker.
            place: its class, as `tracker_process` takes it.
            run: description of the run.
            folder: folder for its record and its output.
            backlog: messages of earlier processes of this run; those that arrived are not sent again.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.output = folder / "output.log"
        """File with everything that the tracker's library prints."""
        self.notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Messages to show to the user."""
        record = folder / "sent.jsonl"
        arrived = Sent(record).steps
        self._backlog = [message for message in backlog if message.get("step") not in arrived]
        self._rows = sum("step" in message for message in self._backlog)
        self._arrived = self._dropped = self._late = 0
        self._failure: str | None = None
        self._end: _Message | None = None
        self._ending = threading.Event()
        self._queue: queue.Queue[_Message] = queue.Queue(QUEUE_ROWS)
        self._process = _start(place, record, self.output)
        self._threads = [
            threading.Thread(target=self._write, args=(run,), name=f"to {name}", daemon=True),
            threading.Thread(target=self._read, name=f"from {name}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """Process id of the tracker's process."""
        return self._process.pid

    def send(self, message: _Message) -> None:
        """Hand over a message, or drop and count it if too many wait."""
        self._rows += "step" in message
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self._dropped += "step" in message

    def close_input(self, end: _Message) -> None:
        """Send `end` after all messages that wait, without blocking."""
        self._end = end
        self._ending.set()
        # The empty message wakes the thread if it waits for one; with a full queue it does not.
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait({})

    def close(self, deadline: float) -> None:
        """Wait until `deadline` (of `time.monotonic`) for the tracker to finish, then end it, and note what is missing.

        An interrupt ends it at once.
        """
        late = False
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            for thread in self._threads:
                thread.join(timeout=1.0)
        if late or self._arrived < self._rows or self._failure:
            self.notes.put(self._missing(late))

    def _missing(self, late: bool) -> str:
        reasons = [
            *(["it did not finish in time (logging.tracker_timeout)"] if late else []),
            *([f"{self._dropped} were dropped because it was slow"] if self._dropped else []),
            *([f"{self._late} came after a later step, which it does not take"] if self._late else []),
            *([self._failure] if self._failure else []),
        ]
        code = self._process.returncode
        if not reasons and code:
            reasons = [f"its process ended with {_how(code)}"]
        why = f": {'; '.join(reasons)}" if reasons else ""
        return (
            f"warning: {self.name} has {self._arrived} of {self._rows} rows{why}. metrics.jsonl has all of them; "
            f"{self.output} has the output of {self.name}"
        )

    def _write(self, run: TrackedRun) -> None:
        """Thread: write the messages to the process, until the end or until it no longer reads."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            for message in self._messages(run):
                self._process.stdin.write(json.dumps(plain_json(message), allow_nan=False) + "\n")
                self._process.stdin.flush()
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()

    def _messages(self, run: TrackedRun) -> Iterator[_Message]:
        yield {"run": asdict(run)}
        while self._backlog:
            yield self._backlog.pop(0)
        while not (self._ending.is_set() and self._queue.empty()):
            if message := self._queue.get():
                yield message
        assert self._end is not None
        yield {"end": self._end}

    def _read(self) -> None:
        """Thread: read the answers of the process until it ends, however it does."""
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                with contextlib.suppress(ValueError):
                    self._take(json.loads(line))
        code = self._process.wait()
        if not self._ending.is_set():
            self._failure = self._failure or f"its process ended with {_how(code)}"
            self.notes.put(f"warning: {self.name} ended with {_how(code)}; the run goes on without it")

    def _take(self, answer: Mapping[str, Any]) -> None:
        if "opened" in answer:
            self.notes.put(f"{self.name}: {answer['opened']}")
        elif "sent" in answer:
            self._arrived += 1
        elif "late" in answer:
            self._late += 1
        elif "failed" in answer:
            if self._failure is None:
                self.notes.put(f"warning: {self.name} refused a message ({answer['failed']}); the run goes on")
            self._failure = str(answer["failed"])


def _start(place: str, record: Path, output: Path) -> subprocess.Popen[str]:
    with open(output, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", _MODULE, place, str(record)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # Its own process group: Ctrl-C reaches the run alone, which then ends the tracker.
            start_new_session=True,
        )


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
