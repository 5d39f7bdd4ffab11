"""The process that carries out jobs of `runs/side_by_side.py`, one after another, until its input ends.

`python -m betterhalf.runs.job_process PARENT_PID`. Each line of standard input is a job as JSON: `kind`, `name`,
`config`, `folder`. The process reports its progress as events; the last one of a job is `finished`, or its error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from betterhalf import errors
from betterhalf.errors import BetterhalfError
from betterhalf.metrics.events import emit
from betterhalf.process import Terminated, end_with_parent, prepare_process, sigterm_interrupts


def public_name(error: BetterhalfError) -> str:
    """Return the name of the error's class, or of the nearest base class that `errors` defines."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)


def _functions() -> dict[str, Callable[..., Any]]:
    """Return the function of each kind of job; imported late, because threads must be chosen before torch loads."""
    from betterhalf.runs.sanity import run_arm
    from betterhalf.runs.sweep_cell import run_cell

    return {"arm": run_arm, "cell": run_cell}


def outcome(job: dict[str, Any]) -> dict[str, Any]:
    """Carry out a job, and return its last event."""
    from betterhalf.config.schema import RunConfig
    from betterhalf.run_dir import RunDir

    try:
        run = RunDir(Path(job["folder"]))
        _functions()[job["kind"]](RunConfig.model_validate(job["config"]), job["name"], run)
    except BetterhalfError as error:
        return {"error": public_name(error), "message": str(error)}
    except OSError as error:
        words = {"message": error.strerror or str(error), "errno": error.errno, "filename": error.filename}
        return {"error": "OSError", **words}
    except Exception as error:
        # An unexpected error: a bug report needs the traceback, which is shown as a note.
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}. Please report this, with the lines above."
        return {"error": "RunError", "message": f"the {job['kind']} {job['name']} failed: {message}"}
    return {"finished": True}


def _own_input() -> TextIO:
    """Take standard input away from libraries and child processes, and return it."""
    jobs = os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8")
    with open(os.devnull, encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    return jobs


def main() -> int:
    """Carry out the jobs of standard input, and return the exit status."""
    end_with_parent(int(sys.argv[1]))
    prepare_process()
    try:
        # The process that started this one ends it by SIGTERM; what a job has started ends with it.
        with sigterm_interrupts(), _own_input() as jobs:
            for line in jobs:
                emit(sys.stderr, outcome(json.loads(line)))
    except Terminated:
        return 143
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
