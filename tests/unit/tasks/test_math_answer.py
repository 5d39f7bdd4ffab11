"""From completion to answer, and when two answers are the same."""

from __future__ import annotations

import pytest

from betterhalf.tasks.math_answer import extract_answer, last_boxed, look_alike
from betterhalf.tasks.math_equal import equivalent


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
def test_look_alike_forgives_spacing_only(gold: str, candidate: str, same: bool) -> None:
    assert look_alike(gold, candidate) is same


@pytest.mark.parametrize(
    ("gold", "candidate", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", "1/2", True),
        (r"\frac{1}{2}", r"\frac{1}{3}", False),
        (r"\frac78", r"\frac{7}{8}", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"2\sqrt{3}", r"3\sqrt{2}", False),
        ("(x-1)(x+1)", "x^2-1", True),
        ("(x-1)(x+1)", "x^2+1", False),
        ("[2,5)", "[2, 5)", True),
        ("[2,5)", "[2,5]", False),
        (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)", True),
        (r"60^\circ", "60", True),
        (r"60^\circ", "61", False),
        (r"15\text{ cm}", "15", True),
        ("150", r"\$150", True),
        ("-11, -1, 1, 11", "-11,-1,1,11", True),
        ("-11, -1, 1, 11", "-11,-1,1", False),
        (r"\frac{5}{3}\pi - 2\sqrt{3}", r"\frac{5\pi - 6\sqrt{3}}{3}", True),
        ("10001_2", "10011_2", False),
        ("3", r"\text{three dogs}", False),
    ],
)
def test_equivalent_decides_tricky_answers(gold: str, candidate: str, same: bool) -> None:
    assert equivalent(gold, candidate) is same
