"""The verdict: rows and sentences, on the terminal within 80 columns."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

from tests.unit.report.conftest import collapse_summary

from betterhalf.report.verdict import print_verdict, verdict_rows, verdict_sentences


def test_rows_hold_the_summary_in_order(summary: dict[str, Any]) -> None:
    assert verdict_rows(summary) == [
        ("fp16", "0.973", "passed", "0.971", "learned", "5.02e-08", "1.19e-03", "1", "85"),
        ("bf16", "0.969", "passed", "0.966", "learned", "4.00e-06", "1.33e-02", "0", "87"),
    ]


def test_an_arm_that_did_not_finish_shows_dashes() -> None:
    rows = verdict_rows({"arms": {"fp16": {"passed": None, "mismatch_k3": math.nan}, "bf16": None}})
    assert rows == [(name, "-", "incomplete", "-", "incomplete", *["-"] * 4) for name in ("fp16", "bf16")]


def test_the_ratio_is_explained_and_learning_is_described_by_the_verdicts(summary: dict[str, Any]) -> None:
    ratio, learning = verdict_sentences(summary)
    assert ratio.startswith("k3 ratio BF16 / FP16: 80.")
    assert "about 64" in ratio
    assert learning == "Both precisions passed the test: here they differ in mismatch, not in learning."


def test_the_sentence_on_learning_follows_the_verdicts(summary: dict[str, Any]) -> None:
    cases = {
        (True, False): "FP16 passed the test and BF16 did not.",
        (False, True): "BF16 passed the test and FP16 did not.",
        (False, False): "Neither FP16 nor BF16 passed the test.",
        (True, None): "An arm is incomplete, so learning cannot be compared.",
    }
    for (fp16, bf16), expected in cases.items():
        changed = copy.deepcopy(summary)
        changed["arms"]["fp16"]["passed"], changed["arms"]["bf16"]["passed"] = fp16, bf16
        assert verdict_sentences(changed)[1] == expected


def test_a_missing_ratio_is_said_and_a_single_arm_has_no_comparison(summary: dict[str, Any]) -> None:
    assert verdict_sentences(summary | {"k3_ratio": None})[0] == "The k3 ratio could not be computed."
    assert verdict_sentences({"arms": {"fp16": {"passed": True}}, "k3_ratio": None}) == []


def test_the_terminal_table_is_complete_within_80_columns(summary: dict[str, Any]) -> None:
    stream = io.StringIO()
    print_verdict(summary, stream)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(stream.getvalue().split())
    assert "final final arm accuracy test reward verdict mean k3 skipped seconds" in text
    assert "fp16 0.973 passed 0.971 learned 5.02e-08 1 85" in text
    assert "not in learning." in text


def test_seven_arms_with_long_names_fit_80_columns_and_say_what_they_change() -> None:
    stream = io.StringIO()
    print_verdict(collapse_summary(), stream)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "\u2026" not in stream.getvalue()  # nothing is cut off
    assert "dual_clip: precision.preset=e8m2 (emulated), algorithm.surrogate.dual_clip=3.0" in " ".join(lines)


def test_the_meaning_of_passed_is_below_the_table(summary: dict[str, Any]) -> None:
    stream = io.StringIO()
    print_verdict(summary | {"pass_accuracy": 0.9}, stream)
    assert "test: passed from a final accuracy of 0.9 on (sanity.pass_accuracy)." in stream.getvalue()
