"""Token probabilities of trainer and engine, from recorded rollouts: two scatter plots and sample completions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from betterhalf.report.chart import Chart, Series, draw
from betterhalf.report.data import Arm
from betterhalf.report.drawing import Drawing
from betterhalf.report.markup import Figure, style_class, table
from betterhalf.words import counted

_POINTS_PER_CLOUD = 500
_SAMPLES_PER_ARM = 2
_SHADES = 4
_MOST_TOKENS, _MOST_LETTERS = 400, 4000
"""Bounds of a sample on the page, which would be larger than all figures; the middle of longer ones is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPair:
    """Probability of one sampled token on both sides."""

    mu: float
    """Probability by the engine that sampled it."""
    pi: float
    """Probability by the trainer, at the same weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloud:
    """The tokens of one run, or of one pair of precisions."""

    name: str
    style: int
    pairs: Sequence[TokenPair]

    @property
    def largest_gap(self) -> float:
        """Largest abs(pi - mu); 0 without tokens."""
        return max((abs(pair.pi - pair.mu) for pair in self.pairs), default=0.0)


def token_figures(arms: Sequence[Arm]) -> list[Figure]:
    """Return the scatter plots of pi and of pi - mu against mu; none if no arm recorded per-token columns."""
    clouds = [Cloud(name=arm.name, style=arm.index, pairs=_kept(arm)) for arm in arms]
    shapes = "each arm has its own marker shape"
    kept = f"Tokens of the recorded rollouts, evenly thinned to {_POINTS_PER_CLOUD} per arm; {shapes}."
    drawn = [scatter_figure("tokens", "Token probabilities", clouds, kept), gap_figure("token-gap", clouds)]
    return [figure for figure in drawn if figure is not None]


def scatter_figure(key: str, title: str, clouds: Sequence[Cloud], note: str = "", legend: str = "") -> Figure | None:
    """Draw pi against mu, with the diagonal; None without tokens."""
    image = draw(
        Chart(
            key=key,
            title=f"{title}, pi against mu",
            series=_series(clouds, gap=False),
            across="mu",
            across_range=(0.0, 1.0),
            include=(0.0, 1.0),
            guide=((0.0, 0.0), (1.0, 1.0)),
        )
    )
    unit = "pi (vertical) against mu (horizontal)"
    caption = f"Healthy: every token on the diagonal. {note}".strip()
    return _figure(key, title, unit, image, caption, clouds, legend)


def gap_figure(key: str, clouds: Sequence[Cloud], legend: str = "") -> Figure | None:
    """Draw pi - mu against mu; None without tokens."""
    image = draw(
        Chart(
            key=key,
            title="Token gap, pi minus mu, against mu",
            series=_series(clouds, gap=True),
            across="mu",
            across_range=(0.0, 1.0),
            include=(0.0,),
            guide=((0.0, 0.0), (1.0, 0.0)),
        )
    )
    unit = "pi \u2212 mu (vertical) against mu (horizontal)"
    caption = (
        "The distance to the diagonal, enlarged. Healthy: a thin cloud around zero, widest where mu is close to "
        "neither 0 nor 1."
    )
    return _figure(key, "Token gap", unit, image, caption, clouds, legend)


def token_pairs(arm: Arm) -> Iterator[TokenPair]:
    """Yield every recorded token of an arm that has logprobs of both sides."""
    for row in arm.rollouts:
        for trainer, behavior in zip(*_logprob_columns(row), strict=False):
            if trainer is not None and behavior is not None:
                yield TokenPair(mu=math.exp(min(0.0, behavior)), pi=math.exp(min(0.0, trainer)))


def sample_evenly(pairs: Sequence[TokenPair], limit: int) -> list[TokenPair]:
    """Return at most `limit` of the pairs, at even distances."""
    stride = max(1, math.ceil(len(pairs) / limit))
    return list(pairs[::stride])


def samples(arms: Sequence[Arm]) -> str:
    """Return completions of each arm's last recorded step as HTML: the best and the worst by reward."""
    return "".join(_arm_samples(arm) for arm in arms if arm.rollouts)


def _logprob_columns(row: dict[str, Any]) -> tuple[list[float | None], list[float | None]]:
    return row.get("trainer_logprobs") or [], row.get("behavior_logprobs") or []


def _kept(arm: Arm) -> list[TokenPair]:
    return sample_evenly(list(token_pairs(arm)), _POINTS_PER_CLOUD)


def _series(clouds: Sequence[Cloud], *, gap: bool) -> tuple[Series, ...]:
    """Return the series with the widest cloud at the bottom, so that it does not hide the narrower ones."""
    ordered = sorted(clouds, key=lambda cloud: cloud.largest_gap, reverse=True)
    return tuple(
        Series(
            name=cloud.name,
            style=cloud.style,
            points=[(pair.mu, pair.pi - pair.mu if gap else pair.pi) for pair in cloud.pairs],
            joined=False,
        )
        for cloud in ordered
    )


def _figure(
    key: str, title: str, unit: str, image: Drawing | None, caption: str, clouds: Sequence[Cloud], legend: str
) -> Figure | None:
    if image is None:
        return None
    return Figure(
        key=key, title=title, unit=unit, image=image, caption=caption, numbers=_gap_table(clouds), legend=legend
    )


def _gap_table(clouds: Sequence[Cloud]) -> str:
    rows = [
        [cloud.name, str(len(cloud.pairs)), f"{_mean_gap(cloud):.3g}", f"{cloud.largest_gap:.3g}"]
        for cloud in clouds
        if cloud.pairs
    ]
    return table(["", "tokens shown", "mean |gap|", "largest |gap|"], rows)


def _mean_gap(cloud: Cloud) -> float:
    return math.fsum(abs(pair.pi - pair.mu) for pair in cloud.pairs) / len(cloud.pairs)


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
        f'reward {shown}</h4><pre><span class="prompt">{_text(str(row.get("prompt", "")))}</span>'
        f"{_completion(row)}</pre></article>"
    )


def _completion(row: dict[str, Any]) -> str:
    """Return the completion, with each token shaded by its gap if the texts of the tokens add up to it.

    Observations of an environment are marked as prompts are: they are context, not sampled.
    """
    text = str(row.get("completion", ""))
    tokens = row.get("tokens") or []
    trainer, behavior = _logprob_columns(row)
    observed = {int(each["before"]): str(each["text"]) for each in row.get("observations") or []}
    joined = "".join(f"{observed.get(i, '')}{token}" for i, token in enumerate(tokens) if isinstance(token, str))
    if not text or not joined.startswith(text) or not len(tokens) == len(trainer) == len(behavior):
        return _text(text)
    columns = enumerate(zip(tokens, trainer, behavior, strict=True))
    shown = [
        f"{_context(observed[i], 'observation') if i in observed else ''}{_token(str(token), log_pi, log_mu)}"
        for i, (token, log_pi, log_mu) in columns
    ]
    head, left_out, tail = _parts(len(shown), _MOST_TOKENS)
    return "".join(shown[:head]) + _left_out(left_out, "token") + "".join(shown[tail:])


def _parts(count: int, most: int) -> tuple[int, int, int]:
    """Return the length of the head to show, the number of things left out, and where the tail begins."""
    half = min(count, most) // 2
    return count - half if count <= most else half, max(0, count - most), count - half


def _left_out(count: int, thing: str) -> str:
    return f'<span class="prompt"> [{counted(count, thing)} left out] </span>' if count else ""


def _text(text: str) -> str:
    """Return text as HTML, without the middle of a long one."""
    head, left_out, tail = _parts(len(text), _MOST_LETTERS)
    return escape(text[:head]) + _left_out(left_out, "letter") + escape(text[tail:])


def _context(text: str, title: str) -> str:
    return f'<span class="prompt" title="{title}">{_text(text)}</span>'


def _token(token: str, log_pi: float | None, log_mu: float | None) -> str:
    if log_pi is None or log_mu is None:
        return escape(token)
    mu, pi = math.exp(min(0.0, log_mu)), math.exp(min(0.0, log_pi))
    return f'<span class="t{_shade(abs(pi - mu))}" title="mu {mu:.6f}, pi {pi:.6f}">{escape(token)}</span>'


def _shade(gap: float) -> int:
    """Return the shade, 0 to 4: one for each decade of the gap from 1e-5 on."""
    return 0 if gap < 1e-5 else min(_SHADES, 1 + math.floor(math.log10(gap) + 5))
