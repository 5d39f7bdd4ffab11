"""The section on runs that sample one step ahead: what the updates since the sampling add to the mismatch."""

from __future__ import annotations

from collections.abc import Sequence

from betterhalf.report.data import Arm
from betterhalf.report.figures import FigureSpec, draw_figures
from betterhalf.report.markup import figures, note, section
from betterhalf.report.tables import legend

FIGURES = (
    FigureSpec(
        key="staleness",
        title="Staleness and mismatch, k3",
        unit="nats per token",
        metrics=("staleness/k3/mean", "mismatch/k3/mean"),
        scale="log10",
        smooth=True,
        second_dotted=True,
        caption="Thick lines: KL(p || q) from the trainer at the weights that sampled (p) to the trainer before the "
        "step's updates (q); thin dotted lines: the mismatch of trainer and engine at the weights that sampled. "
        "Healthy: both level. Staleness grows with the learning rate, the mismatch does not. Steps with no update in "
        "between have no staleness and no point here.",
    ),
    FigureSpec(
        key="staleness-ess",
        title="Effective sample size after staleness",
        unit="share of completions",
        metrics=("staleness/ess_fraction", "mismatch/ess_fraction"),
        include=(0.0, 1.0),
        show_band=True,
        second_dotted=True,
        caption="Thick lines: share of the sample that remains when completions are weighted by q / p, the updates "
        "since the sampling alone; thin dotted lines: by pi / mu at the weights that sampled. Healthy: close to 1.",
    ),
    FigureSpec(
        key="staleness-versions",
        title="Updates since the sampling",
        unit="applied optimizer steps",
        metrics=("staleness/versions",),
        include=(0.0,),
        caption="Healthy: the optimizer steps of one step, less those that were skipped; 0 in the first step and in "
        "those after a checkpoint, which are not sampled ahead.",
    ),
    FigureSpec(
        key="ahead",
        title="Sampling in the background",
        unit="seconds",
        metrics=("time/ahead_seconds", "time/generate_seconds"),
        include=(0.0,),
        second_dotted=True,
        caption="Thick lines: sampling and grading while the step before was learned, 0 where the step was not sampled "
        "ahead; thin dotted lines: the part that a step waited for. Healthy: the latter close to 0, or the engines are "
        "slower than the trainer.",
    ),
)


def staleness_section(arms: Sequence[Arm]) -> str:
    """Return the section of the runs that sample ahead; empty without one."""
    stale = [arm for arm in arms if arm.finite("staleness/versions")]
    if not stale:
        return ""
    drawn, _ = draw_figures(FIGURES, stale)
    return section("Staleness", note(_MEANING) + legend(stale) + figures(drawn))


_MEANING = (
    "These steps were sampled while the step before was learned (pipeline.max_staleness=1). Every other figure of the "
    "mismatch compares engine and trainer at the weights that sampled; staleness is what the updates since then add."
)
