"""`main`: run one verb, print its answer, and turn every failure into one message and an exit status.

Exit status: 0 success, 1 failed verdict, 2 bad input, 3 failure while running, 130 interrupted, 143 ended by SIGTERM.
Results go to standard output, progress and errors to standard error. With --json, the last line of standard output is
one JSON object.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from betterhalf.cli.parse import parse, pick_verb, to_request
from betterhalf.cli.verbs import VERBS
from betterhalf.errors import BetterhalfError
from betterhalf.process import Terminated, prepare_process, sigterm_interrupts

EXIT_OK, EXIT_FAILED, EXIT_INPUT, EXIT_RUN, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 3, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Raises nothing; `--help` and `--version` exit the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with sigterm_interrupts():
            return _run(arguments)
    except Terminated as terminated:
        return _complain(str(terminated), EXIT_TERMINATED, arguments)
    except KeyboardInterrupt as interrupt:
        return _complain(str(interrupt) or "interrupted", EXIT_INTERRUPTED, arguments)
    except BetterhalfError as error:
        return _complain(str(error), error.exit_code, arguments)
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. Without this, Python would report it again while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        return _complain(_disk_words(error), EXIT_RUN, arguments)
    except Exception as error:
        # An unexpected error: a bug report needs the traceback.
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}. Please report this, with the lines above."
        return _complain(message, EXIT_RUN, arguments)


def _run(arguments: list[str]) -> int:
    name, rest = pick_verb(arguments)
    verb = VERBS[name]
    options = parse(name, verb, rest)
    if verb.computes:
        prepare_process()
    answer = verb.run(to_request(name, verb, options))
    if options.json:
        print(_json_line(answer.result))
    else:
        answer.show()
    sys.stdout.flush()
    return EXIT_OK if answer.passed else EXIT_FAILED


def _json_line(result: dict[str, Any]) -> str:
    from betterhalf.run_dir import plain_json

    return json.dumps(plain_json(result), allow_nan=False)


def _disk_words(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full{where}; earlier files are intact. Free some space and run the command again, with "
            "--resume to continue a run."
        )
    return f"{error.strerror or error}{where}. Check the path and its permissions."


def _complain(message: str, status: int, arguments: Sequence[str]) -> int:
    """Print the message of an error, with --json also as the last line of standard output; return `status`."""
    if os.environ.get("BETTERHALF_TRACEBACK") == "1" and status not in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr, flush=True)
    if "--json" in arguments:
        print(json.dumps({"error": message, "exit_status": status}), flush=True)
    return status
