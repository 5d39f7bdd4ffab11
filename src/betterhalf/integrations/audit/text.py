"""Terminal view and JSON of an audit."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from betterhalf.integrations.audit.records import ROLES, Audit, Finding

_WIDTH = 120


def show_audit(audit: Audit) -> None:
    """Print an audit on standard output."""
    print("\n".join(_lines(audit)))


def to_json(audit: Audit) -> dict[str, Any]:
    """Return everything as JSON values."""
    return {
        "verb": "audit",
        "path": audit.path,
        "framework": audit.framework,
        "version": audit.version,
        "passed": audit.passed,
        "roles": {finding.role: _row(finding) for finding in audit.findings},
        "differences": list(audit.differences),
        "undecided": list(audit.undecided),
        "unknown": list(audit.unknown),
        "notes": list(audit.notes),
        "change": list(audit.change),
        "advice": audit.advice,
    }


def _row(finding: Finding) -> dict[str, Any]:
    return {"value": finding.value, "key": finding.key, "rule": finding.rule, "source": finding.source}


def _lines(audit: Audit) -> Iterator[str]:
    yield f"{audit.path}: {audit.title}, by rules read from {audit.version}"
    yield ""
    for finding in audit.findings:
        yield from _finding(finding)
    yield ""
    yield from _paragraphs(_verdict(audit))
    yield from _list("in the way:", audit.differences)
    yield from _list("good to know:", audit.notes)
    yield from _list(
        "looks like precision, and has no rule here; the table holds only if it changes none:", audit.unknown
    )
    yield from _list("for FP16 on both sides, set:", audit.change)
    if audit.advice:
        yield ""
        yield from _paragraphs(audit.advice)


def _finding(finding: Finding) -> Iterator[str]:
    """Yield the role with its value, and the rule and its source below."""
    yield f"{ROLES[finding.role]:<20}{finding.value}"
    yield from wrap(f"{finding.rule} ({finding.source})", _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _verdict(audit: Audit) -> str:
    found = {finding.role: finding.value for finding in audit.findings}
    if audit.differences:
        return "Trainer and engine do not agree, or training cannot work as configured."
    if audit.undecided:
        names = ", ".join(ROLES[role] for role in audit.undecided)
        return f"The file does not decide everything: {names}."
    if audit.unknown:
        return "Trainer and engine agree, unless a setting without a rule changes that."
    return f"Trainer and engine both compute in {found['compute']}, loss scaler: {found['scaler']}."


def _list(title: str, rows: tuple[str, ...]) -> Iterator[str]:
    if rows:
        yield ""
        yield title
        for row in rows:
            yield from wrap(row, _WIDTH, initial_indent="  ", subsequent_indent="    ")


def _paragraphs(text: str) -> list[str]:
    return wrap(text, _WIDTH)
