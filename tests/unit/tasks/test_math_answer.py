"""Answers extracted from completions and gold fields, and answers that look alike."""

from __future__ import annotations

import pytest

from betterhalf.tasks.math_answer import (
    extract_answer,
    gold_answer,
    is_surely_finite,
    last_boxed,
    look_alike,
    plain_number,
    shape_fault,
    spell_plainly,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\{ x : x > 0}", r"\{ x : x > 0"),
        (r"\boxed{\begin{pmatrix} 1 \\{} 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\{} 2 \end{pmatrix}"),
        (r"\fbox {7}", "7"),
        (r"\boxed{12", None),
        (r"\boxed{}", None),
        ("the answer is 42", None),
    ],
)
def test_the_last_box_is_the_answer(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"thinking \boxed{1}</think> It is \boxed{2}.", "2"),
        (r"thinking \boxed{1}</think> It is 2.", None),  # a box in the thoughts does not count
        (r"thinking \boxed{2}", None),  # never stopped thinking
        (r"</think> \boxed{2} </think> \boxed{2}", None),  # twice
        (r"</think>\boxed{2}", "2"),
    ],
)
def test_r1_distill_wants_exactly_one_end_of_thinking(text: str, answer: str | None) -> None:
    assert extract_answer(text, "r1_distill") == answer


@pytest.mark.parametrize("template", ["chat", "qwen_math", "none"])
def test_other_templates_take_the_whole_text(template: str) -> None:
    assert extract_answer(r"a </think> b </think> \boxed{3}", template) == "3"


@pytest.mark.parametrize(
    ("gold", "candidate", "same"),
    [
        (r"\frac{1}{2}", r"\dfrac{1}{2}", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        (r"\text{Friday}", "Friday", True),
        ("10000", r"10\,000", True),
        (r"\$150", r"\$ 150", True),
        ("7.", "7", True),
        ("12", "1 2", False),
        ("x", "X", False),
        (r"\leftarrow", "arrow", False),
    ],
)
def test_look_alike_ignores_spacing_only(gold: str, candidate: str, same: bool) -> None:
    assert look_alike(gold, candidate) is same


@pytest.mark.parametrize(
    ("gold", "candidate"),
    [
        (r"3\,1/2", "31/2"),
        (r"(1\,2)", "(12)"),
        (r"1\;2", "12"),
    ],
)
def test_a_space_between_digits_is_no_spacing(gold: str, candidate: str) -> None:
    assert not look_alike(gold, candidate)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("#### 5", "5"),
        ("48/2 = <<48/2=24>>24 clips.\n#### 1,072", "1,072"),
        ("The answer is 5", "5"),
        ("So the final answer is: $5$.", "$5$."),
        ("Answer: 5", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"Thus $x = \boxed{5}$.", "5"),
        (" 5 ", "5"),
        ("answered", "answered"),
        ("A: 5", "A: 5"),
        ("The answer is **5**.", "5."),
        ("<answer> 5 </answer>", "5"),
        ("2**3**2", "2**3**2"),
        ("a_1 + b_1", "a_1 + b_1"),
        ("x < y > z", "x < y > z"),
    ],
)
def test_a_gold_field_gives_its_answer(gold: str, answer: str) -> None:
    assert gold_answer(gold) == answer


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ("24 clips ####", "holds no answer"),
        ("...", "holds no answer"),
        ("NaN", "a missing value"),
        (r"\frac{1}{2", "braces do not balance"),
        ("It is 5", "is a sentence"),
        ("Natalia sold 72 clips in April and May", "is a sentence"),
        (r"\text{The number of solutions to the equation above equals five}", "is a sentence"),
    ],
)
def test_golds_that_no_box_can_hold_are_named(gold: str, reason: str) -> None:
    assert reason in str(shape_fault(gold))


@pytest.mark.parametrize(
    "gold",
    [
        r"\{ x : x > 0 \}",
        r"\text{no real solutions}",
        "5 apples",
        r"n \text{ is even}",
        r"\pi",
        "Carl and Dave",
        "None",
    ],
)
def test_short_texts_and_sets_can_be_matched(gold: str) -> None:
    assert shape_fault(gold) is None


@pytest.mark.parametrize(
    ("number", "digits"),
    [
        ("1e22", "10000000000000000000000"),
        ("1e-05", "0.00001"),
        ("-2.50", "-2.50"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("nan", None),
        ("-Infinity", None),
        ("1e999999999", None),
        ("five", None),
    ],
)
def test_numbers_are_written_plainly(number: str, digits: str | None) -> None:
    assert plain_number(number) == digits


@pytest.mark.parametrize(
    ("answer", "simple"),
    [
        ("-12.5", True),
        (r"\frac{17}{2}", True),
        (r"2\sqrt{3} + x^2", True),
        (r"\begin{pmatrix} 1/3 \\ 0 \end{pmatrix}", True),
        (r"\frac{1}{0}", False),
        ("1/(2-2)", False),
        ("3:0", False),
        ("10^{10^{10}}", False),
        ("2004!", False),
        (r"0^{-1}", False),
        (r"\log 0", False),
    ],
)
def test_only_simple_forms_are_trusted_without_a_check(answer: str, simple: bool) -> None:
    assert is_surely_finite(answer) is simple


def test_numbers_with_more_digits_than_python_reads_stay_as_they_are() -> None:
    exponent = "2e-" + "5" * 5000
    assert spell_plainly(exponent) == exponent
    decimal = "0." + "1" * 2500 + r"\overline{" + "3" * 2500 + "}"
    assert spell_plainly(decimal) == decimal
    assert spell_plainly(r"0.1\overline{6}") == r"\frac{15}{90}"
    assert [spell_plainly(text) for text in ("2e-3", "2e+15", "2e+16", "2e-05", "2e+100")] == [
        *("2e-3", "2e+15", "2" + "0" * 16, "0.00002", "2" + "0" * 100),
    ]
