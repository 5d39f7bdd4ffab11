"""The report: one self-contained HTML file, made from run folders alone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from betterhalf.errors import InputError
from betterhalf.report.data import Arm, ReportData, Study, load
from betterhalf.report.doctor_page import doctor_section
from betterhalf.report.drawing import drawings_of, theme, write_figures
from betterhalf.report.emulated import emulated_sentence
from betterhalf.report.evaluation_curve import evaluation_curves
from betterhalf.report.evaluation_page import evaluation_section
from betterhalf.report.events import events_table
from betterhalf.report.experts import experts_section
from betterhalf.report.fields import mapping
from betterhalf.report.figures import step_figures
from betterhalf.report.library import libraries, own_script, packed, script_hash
from betterhalf.report.markup import figures, note, notice, section
from betterhalf.report.mismatch import mismatch_figures
from betterhalf.report.probe_page import probe_section
from betterhalf.report.staleness import staleness_section
from betterhalf.report.style import STYLE
from betterhalf.report.sweep_page import sweep_section
from betterhalf.report.tables import config_differences, contracts, environment_line, legend, verdicts
from betterhalf.report.timing import timing_figure
from betterhalf.report.tokens import samples, token_figures
from betterhalf.report.verdict import possible_formats
from betterhalf.run_dir import RunDir, write_text_atomic

_SETTINGS = ("Settings", "Settings that differ")

# The page shows text that a model wrote, and may be opened anywhere: it runs its own script alone, and loads nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_UNDRAWN = (
    "<p class=notice id=undrawn>The figures need JavaScript, in a browser of 2023 or later. The numbers of each are in "
    "the table below it.</p>"
)


def write_report(runs: Sequence[RunDir | Path | str], out: Path, figures_in: Path | None = None) -> Path:
    """Write the page of one or several runs to `out` and return its path; arms and runs are overlaid in every figure.

    Each figure is also written to `figures_in`, if given, as SVG and PNG.

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
    if figures_in is not None:
        write_figures(drawings_of(text), figures_in)
    return out


def render(data: ReportData) -> str:
    """Return the whole page as text."""
    title = ", ".join(data.titles)
    folders: list[Arm | Study] = [*data.arms, *data.probes, *data.doctors, *data.evaluations]
    several = len(data.titles) > 1
    body = "".join(
        [
            f"<header><p class=lead>betterhalf report</p><h1>{escape(title)}</h1>"
            f"<p class=lead>{_subject(folders)}</p>{_emulated(data)}</header><main>",
            *(doctor_section(study, several) for study in data.doctors),
            *(probe_section(study, several) for study in data.probes),
            *(evaluation_section(study, several) for study in data.evaluations),
            *(sweep_section(sweep, several) for sweep in data.sweeps),
            _runs(data) if data.arms else "",
            section("Precision contract", contracts(folders) or ("<p>No contract recorded.</p>" if data.arms else "")),
            section(_SETTINGS[len(folders) > 1], config_differences(folders)) if folders else "",
            section("Completions", _samples(data.arms)) if data.arms else "",
            section("Environment", f"<p class=note>{environment_line(data.environment)}</p>"),
            "</main>",
        ]
    )
    policy = _POLICY
    if "<figure" in body:
        own, (library, source) = own_script(), libraries()
        parts = {"theme": packed(theme()), "library": library}
        held = "".join(f"<script type=text/gzip id={name}>{text}</script>" for name, text in parts.items())
        body = f"{_UNDRAWN}{body}{held}<script>{own}</script>"
        policy += f"; script-src {script_hash(own)} {source}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)} - betterhalf report</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )


def _runs(data: ReportData) -> str:
    """Return verdict, figures and events of the runs, all overlaid."""
    return (
        section("Verdict", verdicts(data) or _no_verdict(data.arms))
        + section("Figures", _figures(data.arms))
        + staleness_section(data.arms)
        + experts_section(data.arms)
        + section("Events", events_table(data.arms))
    )


def _subject(folders: Sequence[Arm | Study]) -> str:
    """Return model, task and algorithm, if all folders share them."""
    parts = []
    for group, key in (("model", "name"), ("task", "type"), ("algorithm", "preset")):
        found = [mapping(folder.config, group).get(key) for folder in folders if folder.config]
        values = {str(value) for value in found if value is not None}
        if len(values) == 1:
            parts.append(f"{group} {escape(values.pop())}")
    return " \u00b7 ".join(parts)


def _emulated(data: ReportData) -> str:
    """Return a note on the emulated formats that configurations or arms name; empty without any."""
    folders: list[Arm | Study] = [*data.arms, *data.probes, *data.doctors, *data.evaluations]
    arms = [name for summary in data.summaries.values() for name in possible_formats(summary)]
    settings = [mapping(folder.config, "precision") for folder in folders]
    pairs = [pair for each in settings if isinstance(listed := each.get("pairs"), list) for pair in listed]
    values = [value for each in settings for value in each.values() if isinstance(value, str)]
    sentence = emulated_sentence([*arms, *values, *(name for pair in pairs for name in str(pair).split("/"))])
    return note(sentence) if sentence else ""


def _no_verdict(arms: Sequence[Arm]) -> str:
    steps = max((step for arm in arms for step in arm.steps), default=0)
    return notice(f"No summary: the run has not finished, or stopped early. Last recorded step: {steps or 'none'}.")


def _figures(arms: Sequence[Arm]) -> str:
    if not any(arm.steps for arm in arms):
        return legend(arms) + notice("No step is recorded yet, so there is nothing to draw.")
    drawn, missing = step_figures(arms)
    drawn = [*drawn[:1], *evaluation_curves(arms), *drawn[1:]]
    timing = timing_figure(arms)
    drawn += [*mismatch_figures(arms), *([timing] if timing else []), *token_figures(arms)]
    absent = note(f"Not recorded: {', '.join(missing)}.") if missing else ""
    return legend(arms) + figures(drawn) + absent


def _samples(arms: Sequence[Arm]) -> str:
    shown = samples(arms)
    if not shown:
        return "<p>No rollouts recorded.</p>"
    shades = ""
    if 'class="t' in shown:
        shades = (
            " A stronger background marks a token with a larger |pi \u2212 mu|: one shade per decade, from 1e-5 on."
        )
    return f"<p class=note>Best and worst completion of the last step with recorded rollouts.{shades}</p>{shown}"
