"""The results of `doctor` as a section of the page: verdicts, a config to copy, census, islands, mismatch."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from betterhalf.report.census import headroom_figure, read_census, window_figure, worst_table
from betterhalf.report.data import Study
from betterhalf.report.fields import mapping, number, texts
from betterhalf.report.markup import Figure, figures, note, notice, part, section, shown
from betterhalf.report.pairs import dtypes, read_pairs
from betterhalf.report.probe_figures import probe_figures
from betterhalf.report.probe_page import matrix_part, pair_table

_SYMBOLS = {"ok": "\u2713", "watch": "!", "unsafe": "\u2717"}
_CLASSES = {"ok": "passed", "watch": "incomplete", "unsafe": "failed"}
_MODULES_SHOWN = 8
_COLLAPSE_BITS = 64.0
"""Headroom from which a census is of little interest, and is collapsed."""


def doctor_section(study: Study, several: bool) -> str:
    """Return the section of one doctor folder; `several` puts its name into the heading."""
    title = f"Precision check: {study.name}" if several else "Precision check"
    if study.damage:
        return section(title, notice(study.damage))
    result, prefix = study.result, f"doctor{study.index}-"
    content = [
        note(_subject(result)),
        _cards(mapping(result, "verdicts")),
        _agreement(mapping(result, "engine_agrees")),
        part("Recommended configuration", _config(result)),
        part("Range census", _census(prefix, mapping(result, "census"))),
        part("FP32 islands", _islands(mapping(result, "islands"))),
        part("Mismatch", _mismatch(prefix, result)),
    ]
    return section(title, "".join(content))


def _subject(result: Mapping[str, Any]) -> str:
    parts = [str(result.get("target") or ""), f"{shown(number(result.get('seconds')), '.0f')} s"]
    return " \u00b7 ".join(text for text in parts if text)


def _cards(verdicts: Mapping[str, Any]) -> str:
    if not verdicts:
        return notice("No verdict is recorded: the check did not finish.")
    return (
        f"<div class=cards>{''.join(_card(dtype, mapping(verdicts, dtype)) for dtype in dtypes(list(verdicts)))}</div>"
    )


def _card(dtype: str, verdict: Mapping[str, Any]) -> str:
    word = str(verdict.get("verdict") or "not recorded")
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in texts(verdict, "reasons"))
    modules = texts(verdict, "modules")
    more = f" and {len(modules) - _MODULES_SHOWN} more" if len(modules) > _MODULES_SHOWN else ""
    named = ", ".join(f"<code>{escape(module)}</code>" for module in modules[:_MODULES_SHOWN])
    return (
        f'<div class="card {_CLASSES.get(word, "")}-card"><h3>{escape(dtype)} '
        f'<span class="{_CLASSES.get(word, "")}">{_SYMBOLS.get(word, "")} {escape(word)}</span></h3>'
        f"{f'<ul>{reasons}</ul>' if reasons else ''}{f'<p>Modules: {named}{more}</p>' if named else ''}</div>"
    )


def _agreement(agrees: Mapping[str, Any]) -> str:
    if not agrees:
        return ""
    reason = str(agrees.get("reason") or "")
    if agrees.get("agrees"):
        return f"<p><span class=passed>\u2713 Engine and trainer agree.</span> {escape(reason)}</p>"
    return notice(f"\u2717 Engine and trainer differ by more than rounding explains: {reason}")


def _config(result: Mapping[str, Any]) -> str:
    config, recommended = str(result.get("config") or ""), str(result.get("recommended") or "")
    lead = f"<p>Recommended precision: <b>{escape(recommended)}</b></p>" if recommended else ""
    if why := result.get("not_trained"):
        lead = notice(f"No precision is recommended: betterhalf cannot train this model. {why}")
    return lead + (f'<pre class=copy tabindex="0"><code>{escape(config.strip())}</code></pre>' if config else "")


def _census(prefix: str, census: Mapping[str, Any]) -> str:
    return "".join(_census_of(prefix, dtype, mapping(census, dtype)) for dtype in dtypes(list(census)))


def _census_of(prefix: str, dtype: str, census: Mapping[str, Any]) -> str:
    rows = read_census(census)
    if not rows:
        return notice(f"No census of {dtype} is recorded.")
    made = (
        headroom_figure(f"{prefix}{dtype}-headroom", dtype, rows),
        window_figure(f"{prefix}{dtype}-window", dtype, census),
    )
    drawn: list[Figure] = [figure for figure in made if figure]
    shown_part = figures(drawn) + f"<h4>Least headroom in {escape(dtype)}</h4>" + worst_table(rows)
    least = min(row.headroom for row in rows)
    if least < _COLLAPSE_BITS:
        return shown_part
    summary = f"<summary>Census of {escape(dtype)}: least headroom {shown(least, '.0f')} bits</summary>"
    return f"<details>{summary}{shown_part}</details>"


def _islands(islands: Mapping[str, Any]) -> str:
    if not islands:
        return ""
    modules = ", ".join(f"<code>{escape(module)}</code>" for module in texts(islands, "modules"))
    outcome = (
        "<span class=passed>\u2713 solves the problem</span>"
        if islands.get("cures")
        else "<span class=failed>\u2717 does not solve the problem</span>"
    )
    return f"<p>FP32 for {modules or 'no module'}: {outcome}. {escape(str(islands.get('reason') or ''))}</p>"


def _mismatch(prefix: str, result: Mapping[str, Any]) -> str:
    pairs = read_pairs(result, "mismatch")
    if why := result.get("mismatch_not_measured"):
        return notice(f"The mismatch of trainer and engine was not measured: {why}")
    if not pairs:
        return ""
    k3 = {pair.train: pair.k3 for pair in pairs if pair.train == pair.rollout and not pair.error}
    ratio = k3["bf16"] / k3["fp16"] if k3.get("fp16") and "bf16" in k3 else float("nan")
    return matrix_part(pairs, float("nan"), ratio) + pair_table(pairs) + figures(probe_figures(prefix, pairs))
