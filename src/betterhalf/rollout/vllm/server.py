"""The child process: answers the run's requests with a vLLM engine.

`python -m betterhalf.rollout.vllm.server FD PARENT_PID`. It serves until the socket closes or the parent ends.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from betterhalf.process import end_with_parent
from betterhalf.rollout.vllm.refusals import NotInstalled, Refusal, reason

Handler = Callable[..., Any]


def serve(connection: Connection, handlers: Mapping[str, Handler]) -> None:
    """Answer requests until the other end closes the connection."""
    while True:
        try:
            verb, values = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(_answer(handlers[verb], values))


def _answer(handler: Handler, values: dict[str, Any]) -> tuple[str, Any]:
    try:
        return "ok", handler(**values)
    except Refusal as refusal:
        return "refused", str(refusal)
    except NotInstalled as missing:
        return "not_installed", str(missing)
    except Exception as error:
        traceback.print_exc()
        return "failed", f"vLLM failed: {reason(error)}"


def main(handlers: Mapping[str, Handler] | None = None) -> None:
    """Serve on the file descriptor given on the command line."""
    end_with_parent(int(sys.argv[2]))
    if handlers is None:
        from betterhalf.rollout.vllm.backend import VllmBackend

        handlers = VllmBackend().handlers()
    serve(Connection(int(sys.argv[1])), handlers)
    # Skip vLLM's helpers and atexit hooks: they have nothing left to save, and some wait for each other.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
