"""Token probabilities of trainer and engine, from the rollouts a run kept: two scatter plots and readable samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from betterhalf.report.axis import Axis, fit
from betterhalf.report.chart import BOTTOM, LEFT, RIGHT, TOP, WIDTH, style_class, svg
from betterhalf.report.data import Arm
from betterhalf.report.figures import Figure

_POINTS_PER_ARM = 1000
_SAMPLES_PER_ARM = 2
_SHADES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPair:
    """One sampled token's probability on both sides."""

    mu: float
    """By the engine that sampled it."""
    pi: float
    """By the trainer, at the same weights."""


def token_figures(arms: Sequence[Arm]) -> list[Figure]:
    """The scatter of pi against mu, and of their gap; none when no arm kept per-token columns."""
    clouds = [(arm, sample_evenly(list(token_pairs(arm)), _POINTS_PER_ARM)) for arm in arms]
    clouds = [(arm, pairs) for arm, pairs in clouds if pairs]
    if not clouds:
        return []
    kept = f"Tokens of the rollouts kept, evenly thinned to {_POINTS_PER_ARM} an arm; each arm has its own shape."
    return [
        Figure(
            key="tokens",
            title="Token probabilities",
            unit="pi (up) against mu (across)",
            image=_scatter("tokens", "Token probabilities, pi against mu", clouds, gap=False),
            caption=f"Healthy: every token on the diagonal. {kept}",
            numbers=_gap_table(clouds),
        ),
        Figure(
            key="token-gap",
            title="Token gap",
            unit="pi \u2212 mu (up) against mu (across)",
            image=_scatter("token-gap", "Token gap, pi minus mu, against mu", clouds, gap=True),
            caption="The distance to that diagonal, enlarged. Healthy: a thin cloud around zero, widest where mu is "
            "neither 0 nor 1.",
            numbers=_gap_table(clouds),
        ),
    ]


def token_pairs(arm: Arm) -> Iterator[TokenPair]:
    """Every kept token of an arm that both sides scored."""
    for row in arm.rollouts:
        for trainer, behavior in zip(*_logprob_columns(row), strict=False):
            if trainer is not None and behavior is not None:
                yield TokenPair(mu=math.exp(min(0.0, behavior)), pi=math.exp(min(0.0, trainer)))


def sample_evenly(pairs: Sequence[TokenPair], limit: int) -> list[TokenPair]:
    """At most `limit` of them, at even distances."""
    stride = max(1, math.ceil(len(pairs) / limit))
    return list(pairs[::stride])


def samples(arms: Sequence[Arm]) -> str:
    """A few completions of each arm's last recorded step as HTML: the best and the worst by reward."""
    return "".join(_arm_samples(arm) for arm in arms if arm.rollouts)


def _logprob_columns(row: dict[str, Any]) -> tuple[list[float | None], list[float | None]]:
    return row.get("trainer_logprobs") or [], row.get("behavior_logprobs") or []


def _scatter(key: str, title: str, clouds: list[tuple[Arm, list[TokenPair]]], *, gap: bool) -> str:
    gaps = [pair.pi - pair.mu if gap else pair.pi for _, pairs in clouds for pair in pairs]
    across = Axis(scale="linear", low=0.0, high=1.0, start=LEFT, end=RIGHT)
    axis = fit(gaps, scale="linear", start=BOTTOM, end=TOP, include=(0.0,) if gap else (0.0, 1.0))
    assert axis is not None  # every pair is finite
    parts = [_frame(across, axis)]
    y0, y1 = (axis.pixel(0.0), axis.pixel(0.0)) if gap else (axis.pixel(0.0), axis.pixel(1.0))
    parts.append(f'<line class="edge" x1="{LEFT}" y1="{y0:.1f}" x2="{RIGHT}" y2="{y1:.1f}"/>')
    # The widest cloud lies at the bottom, so that it does not bury the narrow one.
    for arm, pairs in sorted(clouds, key=lambda cloud: -max(abs(pair.pi - pair.mu) for pair in cloud[1])):
        points = [(across.pixel(pair.mu), axis.pixel(pair.pi - pair.mu if gap else pair.pi)) for pair in pairs]
        parts.append(f'<g class="{style_class(arm.index)}">{_cloud(points, arm.index)}</g>')
    return svg(key, title, " ".join(_cloud_words(arm, pairs) for arm, pairs in clouds), "".join(parts))


def _frame(across: Axis, axis: Axis) -> str:
    parts = []
    for tick in axis.ticks():
        y = axis.pixel(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{axis.label(tick)}</text>')
    for tick in across.ticks():
        x = across.pixel(tick)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{BOTTOM + 17}" text-anchor="middle">{across.label(tick)}</text>'
        )
    parts.append(f'<text class="tick" x="{WIDTH - 4}" y="{BOTTOM + 17}" text-anchor="end">mu</text>')
    return "".join(parts)


def _cloud(points: list[tuple[float, float]], index: int) -> str:
    """All points as one path: dots, squares, plus signs or crosses."""
    shapes = ("h0", "m-1.2 -1.2h2.4v2.4h-2.4z", "m-2 0h4m-2 -2v4", "m-2 -2l4 4m-4 0l4 -4")
    shape = index % len(shapes)
    path = "".join(f"M{x:.1f} {y:.1f}{shapes[shape]}" for x, y in points)
    return f'<path class="cloud {"dots" if shape == 0 else "open"}" d="{path}"/>'


def _cloud_words(arm: Arm, pairs: list[TokenPair]) -> str:
    worst = max(abs(pair.pi - pair.mu) for pair in pairs)
    return f"{arm.name}: {len(pairs)} tokens, largest gap {worst:.3g}."


def _gap_table(clouds: list[tuple[Arm, list[TokenPair]]]) -> str:
    rows = []
    for arm, pairs in clouds:
        gaps = [abs(pair.pi - pair.mu) for pair in pairs]
        mean = math.fsum(gaps) / len(gaps)
        rows.append(
            f"<tr><th>{escape(arm.name)}</th><td>{len(gaps)}</td><td>{mean:.3g}</td><td>{max(gaps):.3g}</td></tr>"
        )
    head = "<tr><th></th><th>tokens shown</th><th>mean |gap|</th><th>largest |gap|</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _arm_samples(arm: Arm) -> str:
    last = max(int(row.get("step") or 0) for row in arm.rollouts)
    rows = [row for row in arm.rollouts if int(row.get("step") or 0) == last]
    ranked = sorted(rows, key=lambda row: -float(row.get("reward") or 0.0))
    chosen = ranked if len(ranked) <= _SAMPLES_PER_ARM else [ranked[0], ranked[-1]]
    return "".join(_sample(arm, row) for row in chosen)


def _sample(arm: Arm, row: dict[str, Any]) -> str:
    reward = row.get("reward")
    shown = f"{reward:g}" if isinstance(reward, (int, float)) else "not recorded"
    step = escape(str(row.get("step", "?")))
    return (
        f'<article class="sample {style_class(arm.index)}"><h4>{escape(arm.name)}, step {step}, '
        f'reward {shown}</h4><pre><span class="prompt">{escape(str(row.get("prompt", "")))}</span>'
        f"{_completion(row)}</pre></article>"
    )


def _completion(row: dict[str, Any]) -> str:
    """The completion, shaded by the gap of each token where tokens are text that add up to it."""
    text = str(row.get("completion", ""))
    tokens = row.get("tokens") or []
    trainer, behavior = _logprob_columns(row)
    joined = "".join(token for token in tokens if isinstance(token, str))
    if not text or not joined.startswith(text) or not len(tokens) == len(trainer) == len(behavior):
        return escape(text)
    pairs = zip(tokens, trainer, behavior, strict=True)
    return "".join(_token(str(token), log_pi, log_mu) for token, log_pi, log_mu in pairs)


def _token(token: str, log_pi: float | None, log_mu: float | None) -> str:
    if log_pi is None or log_mu is None:
        return escape(token)
    mu, pi = math.exp(min(0.0, log_mu)), math.exp(min(0.0, log_pi))
    return f'<span class="t{_shade(abs(pi - mu))}" title="mu {mu:.6f}, pi {pi:.6f}">{escape(token)}</span>'


def _shade(gap: float) -> int:
    """0 to 4: one shade for each decade of the gap from 1e-5 on."""
    return 0 if gap < 1e-5 else min(_SHADES, 1 + math.floor(math.log10(gap) + 5))
