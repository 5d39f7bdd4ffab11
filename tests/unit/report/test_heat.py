"""The matrix: every cell shows its number or why there is none, and text is readable on every shade."""

from __future__ import annotations

import re
from typing import Any

import pytest

from betterhalf.report.heat import heat_table, shade
from betterhalf.report.pairs import matched, read_pairs
from betterhalf.report.style import STYLE


def pair(train: str, rollout: str, **values: Any) -> dict[str, Any]:
    return {"train": train, "rollout": rollout, **values}


def heat(*rows: dict[str, Any]) -> str:
    return heat_table(read_pairs({"pairs": list(rows)}, "pairs"), 0.95)


def test_shades_follow_the_decades() -> None:
    assert [shade(k3) for k3 in (0.0, 1e-10, 1e-9, 1e-8, 1e-6, 1e-4, 1e-3, 1.0)] == [0, 0, 1, 1, 2, 3, 4, 4]


def test_cells_hold_number_interval_error_or_absence() -> None:
    page = heat(
        pair("fp16", "fp16", k3=4.5e-6, k3_ci=[3e-6, 6e-6]),
        pair("fp16", "bf16", error="no <bf16> here"),
        pair("bf16", "bf16", k3=None),
    )
    assert '<td class="h2 same"><b>4.50e-06</b><small>3.0e-06 to 6.0e-06</small></td>' in page
    assert "no &lt;bf16&gt; here" in page
    assert "no number was recorded" in page
    assert page.count("not measured") == 1
    assert "95% confidence interval" in page


def test_a_cell_without_interval_says_why() -> None:
    metrics = {"k3/mean": {"value": 1e-5, "low": None, "high": None, "reason": "one prompt carries it"}}
    page = heat(pair("fp16", "fp16", k3=1e-5, k3_ci=[None, None], metrics=metrics))
    assert "<b>1.00e-05</b><small>one prompt carries it</small>" in page


def test_matched_pairs_alone_are_one_row() -> None:
    page = heat(pair("fp32", "fp32", k3=1e-12), pair("fp16", "fp16", k3=1e-7), pair("bf16", "bf16", k3=1e-5))
    assert page.count("<tr>") == 2
    assert "not measured" not in page
    assert [page.index(f">{name}<") for name in ("fp16", "bf16", "fp32")] == sorted(
        page.index(f">{name}<") for name in ("fp16", "bf16", "fp32")
    )


def test_without_matched_pairs_all_measured_ones_are_drawn() -> None:
    rows = {"pairs": [pair("fp16", "bf16", k3=1e-5), pair("bf16", "fp32", error="x")]}
    assert [one.name for one in matched(read_pairs(rows, "pairs"))] == ["fp16 / bf16"]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio, as defined by WCAG 2."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def variables(mode: str) -> dict[str, str]:
    light, dark = (dict(re.findall(r"--(\w+):(#[0-9a-f]{6})[;}\n]", block)) for block in STYLE.split("@media", 2)[:2])
    return light if mode == "light" else {**light, **dark}


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_keeps_the_contrast_of_wcag_aa(mode: str) -> None:
    colours = variables(mode)
    grounds = {
        "ink": ("bg", "card", "h0", "h1", "h2", "h3", "h4"),
        "soft": ("bg", "card"),
        "wait": ("bg", "card"),
        **dict.fromkeys(("ok", "bad", "edge", "s0", "s1", "s2", "s3", "s4", "s5"), ("bg", "card")),
    }
    ratios = {(text, ground): contrast(colours[text], colours[ground]) for text, on in grounds.items() for ground in on}
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < 4.5} == {}
