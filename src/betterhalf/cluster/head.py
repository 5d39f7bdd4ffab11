"""Checks of the head of a Ray cluster: that one answers at an address, and that it still runs."""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from betterhalf.errors import InputError

_TCP_SECONDS = 5.0
_SETTINGS = b"\x04"
"""Type of the SETTINGS frame, which each side of an HTTP/2 connection sends first (RFC 9113, section 3.4)."""
_KIND_AT = 3
"""Offset of the type in a frame, after 3 bytes of length."""
_OPENING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00" + _SETTINGS + b"\x00" * 5
"""Connection preface of an HTTP/2 client, with an empty SETTINGS frame."""
_ANSWER_BYTES = 64
_UNIMPLEMENTED = 12
"""gRPC status of a request that the server does not implement."""


def require_answer(address: str) -> None:
    """Require a cluster that answers at `cluster.address`.

    Raises:
        InputError: none does.
    """
    place = _host_and_port(address)
    if place is None:
        raise InputError(
            "cluster.address=auto, but no Ray cluster runs on this host; start one with `ray start --head`, give its "
            "HOST:PORT, or leave out cluster.address to start a local one"
        )
    where = f"{place[0]}:{place[1]} (cluster.address={address})"
    try:
        with socket.create_connection(place, timeout=_TCP_SECONDS) as connection:
            other = None if os.environ.get("RAY_USE_TLS") == "1" else _other_protocol(connection)
    except OSError as error:
        raise InputError(
            f"no Ray cluster answers at {where}: {error.strerror or error}. Check the address, and the cluster with "
            "`ray status`, or leave out cluster.address to start a local one."
        ) from error
    other = other or _other_server(f"{place[0]}:{place[1]}")
    if other is not None:
        raise InputError(
            f"the server at {where} is not the head of a Ray cluster: {other}. Give the port of `ray start --head`, "
            "6379 by default, or leave out cluster.address to start a local Ray."
        )


def _other_protocol(connection: socket.socket) -> str | None:
    """Return the reason why a server is not the head of a Ray cluster; None if it speaks HTTP/2, which gRPC uses.

    Ray's own client would wait a long time for an answer from any other server.
    """
    try:
        connection.sendall(_OPENING)
        answer = connection.recv(_ANSWER_BYTES)
    except OSError as error:
        late = isinstance(error, TimeoutError)
        return f"it does not answer within {_TCP_SECONDS:g} seconds" if late else "it ends the connection"
    if not answer:
        return "it ends the connection"
    return None if answer[_KIND_AT : _KIND_AT + 1] == _SETTINGS else "it speaks another protocol"


def _other_server(address: str) -> str | None:
    """Return the reason why a gRPC server, such as one of Ray's on another port, is not the head; None if it may be.

    `ray.init` would retry 20 times, once a second, and print a line each time.
    """
    from ray.exceptions import RpcError

    raylet: Any = importlib.import_module("ray._raylet")
    try:
        with quiet_descriptors():
            raylet.GcsClient(address=address)
    except RpcError as error:
        # Any other error, such as a missing token, comes from a head, and `ray.init` explains it.
        return "it does not know Ray's requests" if error.rpc_code == _UNIMPLEMENTED else None
    return None


@contextmanager
def quiet_descriptors() -> Iterator[None]:
    """Discard everything written to standard output and standard error, also by C libraries."""
    with ExitStack() as stack:
        nothing = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, nothing)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # it may be closed
                stream.flush()
        for descriptor in (1, 2):
            kept = os.dup(descriptor)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, descriptor)
            os.dup2(nothing, descriptor)
        yield


def _host_and_port(address: str) -> tuple[str, int] | None:
    """Return host and port of the head; None for `auto` if no cluster is known."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _known_address() or ""
    host, _, port = address.rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdecimal() else None


def _known_address() -> str | None:
    """Return the address of the cluster that `ray start` started on this host; None without one."""
    from ray._private import services

    found = sorted(services.find_gcs_addresses())
    known: str | None = found[0] if found else services.find_bootstrap_address(None)
    return known


def local_probe() -> Callable[[], str | None]:
    """Return a function that returns the reason why a local Ray is lost, or None while its head runs."""
    from ray._private.worker import _global_node

    heads = {
        kind: found[0].process
        for kind, found in _global_node.all_processes.items()
        if kind in ("gcs_server", "raylet") and found
    }

    def probe() -> str | None:
        ended = next((kind for kind, process in heads.items() if process.poll() is not None), None)
        return None if ended is None else f"its process {ended} ended"

    return probe


def address_probe(address: str) -> Callable[[], str | None]:
    """Return a function that returns the reason why a joined cluster may be lost, or None while its head answers."""
    host, _, port = address.rpartition(":")

    def probe() -> str | None:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_TCP_SECONDS).close()
        except OSError:
            return f"its head at {address} does not answer"
        return None

    return probe
