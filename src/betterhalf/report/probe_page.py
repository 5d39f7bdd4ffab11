"""The results of `probe` as a section of the page: the matrix, the offline figure, budget, gradient, seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from betterhalf.report.data import Study, flatten
from betterhalf.report.fields import mapping, mappings, number
from betterhalf.report.heat import heat_table
from betterhalf.report.localize_figures import localize_part
from betterhalf.report.markup import figures, note, notice, part, section, shown, table
from betterhalf.report.pairs import Pair, raw_logprobs_sentence, read_pairs
from betterhalf.report.probe_figures import probe_figures

_COLUMN_NOTE = (
    "k3 in nats per token; gap: pi \u2212 mu, in probability; sequence KL in nats per completion; slope of a "
    "completion's log-ratio in nats per 1,000 tokens."
)
_EXTRA_BITS = 3
"""Number of mantissa bits that FP16 has in addition to those of BF16."""


def probe_section(study: Study, several: bool) -> str:
    """Return the section of one probe folder; `several` puts its name into the heading."""
    title = f"Mismatch: {study.name}" if several else "Mismatch"
    if study.damage:
        return section(title, notice(study.damage))
    pairs = read_pairs(study.result, "pairs")
    confidence = number(study.result.get("confidence"))
    prefix = f"probe{study.index}-"
    content = [
        note(_subject(study.result)),
        "".join(notice(said) for pair in pairs if (said := raw_logprobs_sentence(pair.row))),
        matrix_part(pairs, confidence, number(study.result.get("bf16_over_fp16"))),
        figures(probe_figures(prefix, pairs)),
        part("All pairs", pair_table(pairs) + _quantities(pairs)) if pairs else "",
        part("Budget", budget_table(pairs)),
        part("Effect on the gradient", _gradient(mapping(study.result, "gradient"))),
        part("First divergence", localize_part(prefix, mapping(study.result, "localize"))),
        part("Seconds", _seconds(mapping(study.result, "seconds"))),
    ]
    return section(title, "".join(content))


def matrix_part(pairs: Sequence[Pair], confidence: float, ratio: float) -> str:
    """Return the heat table, the failed pairs, and the ratio of BF16 to FP16 in a sentence."""
    if not pairs:
        return notice("No pair is recorded: the measurement did not finish, or stopped before its first pair.")
    failed = "".join(notice(f"{pair.name}: {pair.error}") for pair in pairs if pair.error)
    return heat_table(pairs, confidence) + failed + f"<p>{escape(_ratio_sentence(ratio))}</p>"


def pair_table(pairs: Sequence[Pair]) -> str:
    """Return the numbers that the command prints, a row for each measured pair."""
    head = ["trainer / rollout", "k3", "mean |gap|", "max |gap|", "sequence KL", "slope per 1k", "tokens", "seconds"]
    rows = [
        [
            f"{pair.train} / {pair.rollout}",
            *(shown(pair.value(key), ".2e") for key in ("k3", "mean_abs", "max_abs", "sequence_kl")),
            shown(pair.value("slope_per_1k"), "+.3g"),
            shown(pair.value("tokens"), ",.0f"),
            shown(pair.value("seconds"), ".1f"),
        ]
        for pair in pairs
        if not pair.error
    ]
    return note(_COLUMN_NOTE) + table(head, rows) if rows else ""


def budget_table(pairs: Sequence[Pair]) -> str:
    """Return variance and correlation of the token log-ratio, and the usable completion length; empty without them."""
    columns: tuple[tuple[str, str, str], ...] = (
        ("sigma\u00b2", "sigma2", ".3g"),
        ("correlation", "correlation", ".3g"),
        ("predicted ESS", "predicted_ess", ".4f"),
        ("observed ESS", "observed_ess", ".4f"),
    )
    rows = [
        [
            f"{pair.train} / {pair.rollout}",
            *(shown(pair.budget(key), spec) for _, key, spec in columns),
            _tokens(pair.budget("max_length")),
        ]
        for pair in pairs
        if mapping(pair.row, "budget")
    ]
    if not rows:
        return ""
    explained = note(
        "Effective sample size (ESS) as a share of the completions: predicted from the variance of the token log-ratio "
        "and its correlation, and observed. The usable length is the one at which the prediction falls to 0.5."
    )
    return explained + table(["trainer / rollout", *(title for title, _, _ in columns), "usable length, tokens"], rows)


def _tokens(length: float) -> str:
    return shown(length, ",.0f" if length < 1e6 else ".1e")


def _subject(result: Mapping[str, Any]) -> str:
    facts = (
        ("target", "{}"),
        ("engine", "{} engine"),
        ("completions", "{} completions"),
        ("max_tokens", "up to {} tokens each"),
    )
    parts = [text.format(result[key]) for key, text in facts if isinstance(result.get(key), (int, float, str))]
    return " \u00b7 ".join(parts)


def _ratio_sentence(ratio: float) -> str:
    if not math.isfinite(ratio):
        return "The ratio of BF16 to FP16 could not be computed: it takes both matched pairs."
    number_shown = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"
    return (
        f"k3 of the BF16 pair is {number_shown} times that of the FP16 pair. FP16 has {_EXTRA_BITS} more mantissa "
        f"bits, and k3 grows as the squared rounding error: expect about {4**_EXTRA_BITS}."
    )


def _quantities(pairs: Sequence[Pair]) -> str:
    """Return every quantity of every pair with its interval, collapsed."""
    measured = [pair for pair in pairs if mapping(pair.row, "metrics")]
    names = list(dict.fromkeys(name for pair in measured for name in mapping(pair.row, "metrics")))
    if not names:
        return ""
    notes: list[str] = []
    rows = [
        [name, *(_interval(mapping(mapping(pair.row, "metrics"), name), notes) for pair in measured)] for name in names
    ]
    head = ["quantity", *(f"{pair.train} / {pair.rollout}" for pair in measured)]
    return (
        f"<details><summary>All quantities with their intervals</summary>{table(head, rows)}{_reasons(notes)}</details>"
    )


def _reasons(notes: Sequence[str]) -> str:
    return "".join(note(f"({number}) no interval: {reason}") for number, reason in enumerate(notes, start=1))


def _interval(metric: Mapping[str, Any], notes: list[str]) -> str:
    """Format a value with its interval, or with the number of the note that says why there is none."""
    value, low, high = (number(metric.get(key)) for key in ("value", "low", "high"))
    bounds = f" [{shown(low)}, {shown(high)}]" if math.isfinite(low) and math.isfinite(high) else ""
    reason = metric.get("reason")
    if isinstance(reason, str):
        if reason not in notes:
            notes.append(reason)
        bounds = f" ({notes.index(reason) + 1})"
    return shown(value, ".4g") + bounds


def _seconds(seconds: Mapping[str, Any]) -> str:
    rows = [[key.replace(".", ", "), shown(number(value), ".1f")] for key, value in flatten(seconds).items()]
    return table(["phase", "seconds"], rows) if rows else ""


def _gradient(gradient: Mapping[str, Any]) -> str:
    """Return two tables: the effect of the trainer's rounding, and that of the importance weights."""
    if not gradient:
        return ""
    facts = (
        f"{shown(number(gradient.get('completions')), '.0f')} completions, advantages: {gradient.get('advantages')}."
    )
    return (
        note(f"The policy gradient of one batch, compared with that of the FP32 trainer on the same tokens. {facts}")
        + _columns(mappings(gradient, "rows"), _ROUNDING)
        + _columns(mappings(gradient, "weights"), _WEIGHTS)
    )


Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def _as(key: str, spec: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: shown(number(row.get(key)), spec)


_ROUNDING: tuple[Column, ...] = (
    ("trainer", lambda row: str(row.get("train", "?"))),
    ("loss scale", _as("loss_scale", "g")),
    ("relative error", _as("relative_error", ".2%")),
    ("cosine", _as("cosine", ".6f")),
    ("entries lost to zero", _as("zeroed_fraction", ".2%")),
    ("overflow", lambda row: "yes" if row.get("overflow") else "no"),
)
_WEIGHTS: tuple[Column, ...] = (
    ("importance weights, rollouts in", lambda row: str(row.get("rollout", "?"))),
    ("relative change", _as("relative_change", ".2%")),
    ("cosine", _as("cosine", ".6f")),
    ("effective sample size", _as("ess_fraction", ".3f")),
)


def _columns(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    cells = [[read(row) for _, read in columns] for row in rows]
    return table([title for title, _ in columns], cells) if cells else ""
