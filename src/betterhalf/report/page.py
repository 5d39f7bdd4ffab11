"""The report: one HTML file that needs nothing else, made from run folders alone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from betterhalf.errors import InputError
from betterhalf.report.data import Arm, ReportData, load
from betterhalf.report.figures import Figure, step_figures
from betterhalf.report.style import STYLE
from betterhalf.report.tables import config_differences, contracts, environment_line, legend, verdicts
from betterhalf.report.timing import timing_figure
from betterhalf.report.tokens import samples, token_figures
from betterhalf.run_dir import RunDir, write_text_atomic

# A page that is opened from anywhere may show what a model wrote; nothing in it may run or load anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(runs: Sequence[RunDir | Path | str], out: Path) -> Path:
    """Write the page of one or several runs to `out` and return its path; arms and runs are overlaid in every figure.

    A run that stopped early, or recorded only some metrics, gives a page that says so.

    Raises:
        InputError: a folder is not a run folder, a file in it is damaged, or the folder of `out` cannot be made.
        RunError: `out` cannot be written; a page that was there before is untouched.
    """
    out = Path(out)
    text = render(load(runs))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{out.parent} cannot be made ({error.strerror}). Choose another folder with run_dir=PATH."
        ) from error
    write_text_atomic(out, text)
    return out


def render(data: ReportData) -> str:
    """The whole page as text."""
    title = ", ".join(data.titles)
    body = "".join(
        [
            f"<header><p class=lead>betterhalf report</p><h1>{escape(title)}</h1>"
            f"<p class=lead>{_subject(data.arms)}</p></header>",
            _section("Verdict", verdicts(data) or _no_verdict(data.arms)),
            _figures(data.arms),
            _section("Precision contract", contracts(data.arms) or "<p>No contract recorded.</p>"),
            _section(
                "Settings that differ" if len(data.arms) > 1 else "Settings",
                config_differences(data.arms),
            ),
            _section("Completions", _samples(data.arms)),
            _section("Environment", f"<p class=note>{environment_line(data.environment)}</p>"),
        ]
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)} - betterhalf report</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _subject(arms: Sequence[Arm]) -> str:
    """Model, task and algorithm, when all arms share them."""
    parts = []
    for section, key in (("model", "name"), ("task", "type"), ("algorithm", "preset")):
        values = {str((arm.config.get(section) or {}).get(key)) for arm in arms if arm.config}
        if len(values) == 1:
            parts.append(f"{section} {escape(values.pop())}")
    return " \u00b7 ".join(parts)


def _no_verdict(arms: Sequence[Arm]) -> str:
    steps = max((step for arm in arms for step in arm.steps), default=0)
    return f"<p class=notice>No summary: not finished, or stopped early. Last recorded step: {steps or 'none'}.</p>"


def _figures(arms: Sequence[Arm]) -> str:
    if not any(arm.steps for arm in arms):
        notice = "<p class=notice>No step is recorded yet, so there is nothing to draw.</p>"
        return _section("Figures", legend(arms) + notice)
    drawn, missing = step_figures(arms)
    timing = timing_figure(arms)
    drawn += [timing] if timing else []
    drawn += token_figures(arms)
    absent = f"<p class=note>Not recorded: {escape(', '.join(missing))}.</p>" if missing else ""
    return _section("Figures", f"{legend(arms)}<div class=grid-of>{''.join(map(_figure, drawn))}</div>{absent}")


def _figure(figure: Figure) -> str:
    return (
        f'<figure id="{figure.key}"><h3>{escape(figure.title)}</h3><p class=unit>{escape(figure.unit)}</p>'
        f"{figure.image}<figcaption>{escape(figure.caption)}</figcaption>"
        f"<details><summary>Numbers</summary>{figure.numbers}</details></figure>"
    )


def _samples(arms: Sequence[Arm]) -> str:
    shown = samples(arms)
    if not shown:
        return "<p>No rollouts recorded.</p>"
    shades = ""
    if 'class="t' in shown:
        shades = " The stronger a token's ground, the larger |pi \u2212 mu|: one shade a decade, from 1e-5 on."
    return f"<p class=note>Best and worst of the last step that kept rollouts.{shades}</p>{shown}"
