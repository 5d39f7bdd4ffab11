"""Prometheus: a text endpoint with the metrics of the last step, for a server that scrapes it."""

from __future__ import annotations

import errno
import re
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.tracking.tracker import TrackedRun, Value
from betterhalf.types import RunStatus

PORTS = 16
"""Number of ports, from the first on, of which a run takes one that is free: arms run side by side."""


class PrometheusRun:
    """Endpoint of one run; it ends with the run."""

    takes_late_rows = False

    def __init__(self, run: TrackedRun, earlier: Mapping[str, str]) -> None:
        """Serve on the first free port.

        Raises:
            OSError: there is none among `PORTS`, or the address is not one of this machine's.
        """
        from prometheus_client import CollectorRegistry, start_http_server

        self._labels = {"run": run.name, "group": run.group or run.part_of or ""}
        self._steps = run.steps
        self._row: tuple[int, Mapping[str, Value]] = (0, {})
        self._alarms: Counter[tuple[str, str]] = Counter()
        registry = CollectorRegistry()
        registry.register(self)
        port = free_port(run.prometheus_host, run.prometheus_port)
        if port is None:
            raise OSError(f"no free port from {run.prometheus_port} on")
        self._server, self._thread = start_http_server(port, run.prometheus_host, registry)
        self.identity: dict[str, str] = {}
        self.place = f"http://{run.prometheus_host}:{port}/metrics"

    def collect(self) -> Iterator[Any]:
        """Return the families of metrics; the server asks for them at each scrape."""
        step, metrics = self._row
        yield self._gauge("betterhalf_step", "Last finished step.", step)
        yield self._gauge("betterhalf_steps", "Number of steps of the whole run.", self._steps)
        for name, value in metrics.items():
            if not isinstance(value, str):
                described = CATALOGUE.get(name)
                words = f"{described.meaning} Unit: {described.unit}." if described else name
                yield self._gauge(prometheus_name(name), words, value)
        yield self._alarm_family()

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Show the metrics of a step in place of the last one's."""
        self._row = (step, metrics)

    def alarm(self, alarm: Mapping[str, Any]) -> None:
        """Count the alarm."""
        self._alarms[alarm["metric"], alarm["action"]] += 1

    def finish(self, status: RunStatus, summary: Mapping[str, Any]) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, name: str, words: str, value: float) -> Any:
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(name, words, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _alarm_family(self) -> Any:
        from prometheus_client.core import CounterMetricFamily

        labels = [*self._labels, "metric", "action"]
        family = CounterMetricFamily("betterhalf_watchdog_alarms", "Alarms of the watchdog.", labels=labels)
        for (metric, action), count in tuple(self._alarms.items()):
            family.add_metric([*self._labels.values(), metric, action], count)
        return family


def prometheus_name(metric: str) -> str:
    """Return the name of a metric in Prometheus, such as `betterhalf_mismatch_k3_mean`."""
    return "betterhalf_" + re.sub(r"[^A-Za-z0-9]+", "_", metric)


def free_port(host: str, first: int) -> int | None:
    """Return the first free port among `PORTS`, from `first` on; None if none is.

    Raises:
        OSError: the address is not one of this machine's.
    """
    family = socket.getaddrinfo(host, None)[0][0]
    for port in range(first, first + PORTS):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except PermissionError:
                continue
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            return port
    return None
