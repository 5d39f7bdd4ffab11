"""The tables and lines of text around the figures, as HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from betterhalf.report.data import Arm, ReportData, Study, flatten
from betterhalf.report.fields import mapping, mappings, texts
from betterhalf.report.markup import header_row, note, scroll
from betterhalf.report.markup import legend as series_legend
from betterhalf.report.verdict import COLUMNS, changes_rows, threshold_line, verdict_rows, verdict_sentences
from betterhalf.words import counted

_KEY_SETTINGS = (
    "model.name",
    "precision.preset",
    "engine.type",
    "engine.rounding",
    "task.type",
    "algorithm.preset",
    "algorithm.loss",
    "optimizer.learning_rate",
    "training.steps",
    "training.prompts_per_step",
    "training.group_size",
    "training.optimizer_steps",
    "sampling.max_tokens",
    "cluster.backend",
    "cluster.trainers",
    "cluster.engines",
    "cluster.placement",
    "seed",
)

_STATUSES = (
    "Regions with the status equal or differs must be the same in trainer and engine; "
    "the others are reported for comparison only."
)

_SYMBOLS = {
    "passed": "\u2713",
    "failed": "\u2717",
    "learned": "\u2713",
    "dips": "\u25b3",
    "flat": "\u25b3",
    "damaged": "\u25b3",
    "collapsed": "\u2717",
    "incomplete": "\u2026",
}
_STATES = {
    "learned": "passed",
    "dips": "incomplete",
    "flat": "incomplete",
    "damaged": "incomplete",
    "collapsed": "failed",
}
"""Style classes of verdicts that share the colour of another."""


def verdicts(data: ReportData) -> str:
    """Return the verdict table and sentences of each sanity run; for other runs, the numbers of the summary."""
    several = len(data.titles) > 1
    return "".join(_verdict(title, summary, several) for title, summary in data.summaries.items())


def contracts(arms: Sequence[Arm | Study]) -> str:
    """Return the reports of trainer and engine, one table for each arm or study that recorded them."""
    tables = [(arm.name, _contract_rows(arm.contract)) for arm in arms]
    head = header_row(["region", "trainer", "engine", "status"])
    shown = "".join(
        scroll(f"<table class=contract><caption>{escape(name)}</caption>{head}{''.join(rows)}</table>", "contract")
        for name, rows in tables
        if rows
    )
    return note(_STATUSES) + f"<div class=side>{shown}</div>" if shown else ""


def config_differences(arms: Sequence[Arm | Study]) -> str:
    """Return the settings in which the arms differ; for a single arm, the most important settings."""
    configs = [flatten(arm.config) for arm in arms if arm.config]
    names = [arm.name for arm in arms if arm.config]
    if not configs:
        return "<p>No configuration recorded.</p>"
    if len(configs) == 1:
        local = configs[0].get("cluster.backend") == "local"
        shown = [key for key in _KEY_SETTINGS if not (local and key.startswith("cluster."))]
        rows = [(key, [_plain(configs[0][key])]) for key in shown if configs[0].get(key) is not None]
        return _table(["setting", names[0]], rows)
    keys = sorted({key for config in configs for key in config})
    rows = [(key, [_plain(config.get(key)) for config in configs]) for key in keys]
    rows = [row for row in rows if len(set(row[1])) > 1]
    if not rows:
        return "<p>The configurations are the same.</p>"
    return _table(["setting", *names], rows)


def environment_line(environment: Mapping[str, Any]) -> str:
    """Return machine, cluster, versions and code state in one line."""
    packages, git = mapping(environment, "packages"), mapping(environment, "git")
    commit = str(git.get("commit") or "")[:10]
    parts = [
        str(environment.get("cpu") or ""),
        f"{environment['cores']} cores" if environment.get("cores") else "",
        f"{environment['memory_gib']} GiB" if environment.get("memory_gib") else "",
        *texts(environment, "gpus"),
        _cluster_words(environment.get("cluster")),
        f"python {environment['python']}" if environment.get("python") else "",
        *(f"{name} {packages[name]}" for name in ("betterhalf", "torch", "transformers", "vllm") if name in packages),
        f"commit {commit}{' with uncommitted changes' if git.get('dirty') else ''}" if commit else "",
        str(environment.get("time") or ""),
    ]
    return escape(" \u00b7 ".join(part for part in parts if part)) or "No environment recorded."


def _cluster_words(cluster: Any) -> str:
    """Return the processes of a run on a cluster and their hosts; empty for one process."""
    if not isinstance(cluster, Mapping) or cluster.get("backend") in (None, "local"):
        return ""
    hosts = mapping(cluster, "hosts")
    placed = "; ".join(f"{host}: {', '.join(texts(hosts, host))}" for host in hosts)
    ranks, engines = (_count(cluster.get(key)) for key in ("ranks", "engines"))
    processes = f"{counted(ranks, 'rank')} and {counted(engines, 'engine')}"
    own = "a Ray of its own" if cluster.get("address") is None else f"the Ray cluster at {cluster['address']}"
    return f"{processes} ({cluster.get('placement')}) on {own}, ray {cluster.get('ray')} ({placed})"


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def legend(arms: Sequence[Arm]) -> str:
    """Return name, colour, dash and marker of each arm."""
    entries = []
    for arm in arms:
        tag = f"<b>{escape(arm.tag)}</b> " if arm.tag not in ("", arm.name) else ""
        entries.append((arm.index, f"{tag}{escape(arm.name)} <small>{_steps(arm)}</small>"))
    return series_legend(entries)


def _steps(arm: Arm) -> str:
    done = len(arm.steps)
    planned = mapping(arm.config, "training").get("steps")
    if isinstance(planned, int) and done < planned:
        return f"stopped after {done} of {planned} steps" if done else f"no step of {planned} recorded"
    return counted(done, "step") if done else "no steps recorded"


def _verdict(title: str, summary: Mapping[str, Any], several: bool) -> str:
    heading = f"<h3>{escape(title)}</h3>" if several else ""
    if not mapping(summary, "arms"):
        return heading + _summary(summary)
    rows = "".join(_verdict_row(row) for row in verdict_rows(summary))
    head = header_row(COLUMNS)
    meaning = note(threshold_line(summary))
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdict_sentences(summary))
    changed = [(name, [text]) for name, text in changes_rows(summary)]
    changes = _table(["arm", "changes"], changed) if changed else ""
    return heading + scroll(f"<table class=verdict>{head}{rows}</table>", "verdict") + meaning + sentences + changes


def _verdict_row(row: tuple[str, ...]) -> str:
    cells = "".join(map(_verdict_cell, row[1:]))
    return f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>'


def _verdict_cell(cell: str) -> str:
    if cell not in _SYMBOLS:
        return f"<td>{escape(cell)}</td>"
    return f'<td class="{_STATES.get(cell, cell)}">{_SYMBOLS[cell]} {cell}</td>'


def _summary(summary: Mapping[str, Any]) -> str:
    rows = [(key, [_plain(value)]) for key, value in flatten(summary).items() if isinstance(value, (int, float, str))]
    return _table(["result", "value"], rows) if rows else ""


def _contract_rows(contract: Mapping[str, Any]) -> list[str]:
    return [
        f"<tr><th scope=row>{_text(row, 'region')}</th><td>{_text(row, 'trainer')}</td><td>{_text(row, 'engine')}</td>"
        f'<td class="status-{_text(row, "status")}">{_text(row, "status")}</td></tr>'
        for row in mappings(contract, "rows")
    ]


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return "-" if value is None else escape(str(value))


def _table(head: Iterable[str], rows: Iterable[tuple[str, list[str]]]) -> str:
    body = "".join(
        f"<tr><th scope=row><code>{escape(key)}</code></th>"
        f"{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for key, values in rows
    )
    return scroll(f"<table>{header_row(list(head))}{body}</table>", "settings")


def _plain(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else json.dumps(value)
