"""The process that trains one arm of a sanity run, started by `runs/arms.py`.

`python -m betterhalf.runs.arm_process SANITY_RUN ARM PERFECTIBLE PARENT_PID [key=value ...]`. It reports its progress
as events; if it fails, the last one is its error.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from betterhalf import errors
from betterhalf.errors import BetterhalfError
from betterhalf.metrics.events import emit
from betterhalf.process import end_with_parent, prepare_process


def public_name(error: BetterhalfError) -> str:
    """Return the name of the error's class, or of the nearest base class that `errors` defines."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)


def main() -> int:
    """Train the arm that the command line names, and return the exit status."""
    folder, name, perfectible, parent, *overrides = sys.argv[1:]
    end_with_parent(int(parent))
    prepare_process()
    from betterhalf.config.load import load_config
    from betterhalf.run_dir import RunDir
    from betterhalf.runs.sanity import run_arm

    run = RunDir(Path(folder))
    try:
        run_arm(load_config(run.config, overrides), name, Path(perfectible), run.arm(name))
    except BetterhalfError as error:
        emit(sys.stderr, {"error": public_name(error), "message": str(error)})
        return error.exit_code
    except KeyboardInterrupt:
        emit(sys.stderr, {"error": "RunError", "message": f"the arm {name} was interrupted; --resume continues it"})
        return 130
    except OSError as error:
        words = {"message": error.strerror or str(error), "errno": error.errno, "filename": error.filename}
        emit(sys.stderr, {"error": "OSError", **words})
        return 3
    except Exception as error:
        # An unexpected error: a bug report needs the traceback, which is shown as a note.
        traceback.print_exc()
        message = f"the arm {name} failed: {type(error).__name__}: {error}. Please report this, with the lines above."
        emit(sys.stderr, {"error": "RunError", "message": message})
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
