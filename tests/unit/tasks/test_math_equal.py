"""Equality of two answers, as a person would judge it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from betterhalf.tasks.math_answer import gold_answer, last_boxed, look_alike
from betterhalf.tasks.math_equal import UnparsedAnswerError, equivalent, why_unmatchable

PAGE = Path(__file__).parents[3] / "docs" / "grading.md"
PAIRS = [
    ("16", "016", True),
    ("1234", "1,234", True),
    ("1234", "1{,}234", True),
    ("1234", r"1\,234", True),
    (r"90^\circ", "90", True),
    ("50", r"50\%", True),
    ("50%", "50", True),
    ("5", r"5 \text{ cm}", True),
    ("5", "x=5", True),
    ("x=5", "5", True),
    ("10", r"\$10", True),
    (r"\$10", "10", True),
    ("10.00", "10", True),
    (r"\frac{1}{2}", "1/2", True),
    ("C", r"\text{(C)}", True),
    (r"\text{(C)}", "C", True),
    (r"\text{Yes}", "yes", True),
    ("even", r"\text{even}", True),
    ("Evelyn", r"\text{Evelyn}", True),
    ("(1,2)", "(1, 2)", True),
    (r"\{1,2\}", r"\{2,1\}", True),
    ("[1,2)", r"1 \le x < 2", False),
    (r"x \in [1,2]", "[1,2]", True),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty, 2) \cup (3, \infty)", True),
    (r"\sqrt{1/n}", r"\frac{1}{\sqrt{n}}", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}", True),
    (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("1e+22", "10^{22}", True),
    ("5.0", "5", True),
    ("-3", "\u22123", True),
    ("3", "3 ", True),
    ("2", "2.", True),
    ("11_9", "11", False),
    (r"3\dfrac{1}{2}", r"\frac{7}{2}", True),
    ("$5$", "5", True),
    (r"\(5\)", "5", True),
    ("#### 5", "5", True),
    ("5 apples", "5", True),
    ("The answer is 5", "5", True),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False),
    ("D=(0,1)", "D=(0,1.5)", False),
    (r"1331\text{ and }1728", "1728", False),
    ("1331,1728", "1728", False),
    (r"\pm 2021", "2021", False),
    ("12:00", "1:00", False),
    (r"1,2,\ldots,n", r"1,3,5,\ldots,2n-1", False),
    ("4", r"4\sqrt(2)", False),
    ("3x-y+13=0", "3x+4y+14=0", False),
    (r"1-\frac{1}{e}", r"1+\frac{1}{e}", False),
    ("3", "n=3k", False),
    ("5", "3,5", False),
    ("5", "3 or 5", False),
    ("1/3", "0.333333", False),
    ("10", "10 or 12", False),
    ("7", "3+4", True),
    (r"19, 46, \text{ and } 82", "21, 36, and 82", False),
    ("A", "B", False),
    ("(A)", "(B)", False),
    ("true", "false", False),
    ("100", r"\frac{100}{1} = 100", True),
    ("0", r"\emptyset", False),
    (r"\frac{1}{2}", "0.5", True),
    (r"2\sqrt{3}", r"3\sqrt{2}", False),
    ("(x-1)(x+1)", "x^2-1", True),
    ("(x-1)(x+1)", "x^2+1", False),
    ("[2,5)", "[2,5]", False),
    ("(1,2)", "(2,1)", False),
    ("-11, -1, 1, 11", "-11,-1,1", False),
    ("1,1,2", "1,2", False),
    (r"\frac{5}{3}\pi - 2\sqrt{3}", r"\frac{5\pi - 6\sqrt{3}}{3}", True),
    (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2", True),
    ("0", r"(\sqrt2+\sqrt3)^2-5-2\sqrt6", True),
    ("3", r"\text{three dogs}", False),
    # exact numbers are compared exactly
    ("0.333333", "0.333334", False),
    ("3", "3.0000001", False),
    (r"x=\frac13", "x=0.333333", False),
    (r"\{1/3,2\}", r"\{0.333333,2\}", False),
    (r"(1,\frac{1}{2004!})", r"(1,\frac{1}{2006!})", False),
    (r"\begin{pmatrix}1/3\end{pmatrix}", r"\begin{pmatrix}0.333333\end{pmatrix}", False),
    ("0.1000000000000000000001", "0.1", False),
    ("10^{-20}", r"2\cdot 10^{-20}", False),
    ("e^{-50}", "e^{-60}", False),
    ("e^{-50}x", "e^{-60}x", False),
    ("x^2", "x^2+10^{-20}", False),
    ("3.14", r"\pi", False),
    (r"\sqrt{2}", "1.41421356", False),
    ("1.41421356", r"\sqrt2", True),  # six decimals or more may be a rounded number
    ("0.333333", r"\frac13", True),
    ("0.000992", "0.0009924", False),
    ("0.33333", r"\frac13", False),
    (r"\frac{\pi^2}{6}", r"\sum_{k=1}^{\infty} \frac{1}{k^2}", True),
    (r"\frac{3}{4}", r"\int_0^1 \sqrt[3]{x} dx", True),
    ("1,i,-i", "-i,1,i", True),
    (r"0.\overline{3}", r"\frac13", True),
    (r"0.1\overline{6}", r"\frac16", True),
    # roots of positive variables, but of no others
    (r"\sqrt{x^2}", "x", False),
    (r"\sqrt{x^2}", "|x|", True),
    (r"\sqrt{ab}", r"\sqrt{a}\sqrt{b}", False),
    (r"\ln(x^2)", r"2\ln x", False),
    # units, and letters that are not units
    ("2h", "2", False),
    ("a + b + c", "a + d + c", False),
    ("5 cm", r"5\text{ centimeters}", True),
    ("5 cm", "5 m", False),
    (r"6\text{ ft}", r"6\text{ ft}^2", False),
    (r"80\text{ cents}", r"80\text{ dollars}", False),
    (r"34\text{ sq. units}", "34", True),
    (r"5\text{ million}", "5", False),
    ("12.5", r"12.5\%", True),
    ("0.125", r"12.5\%", True),
    (r"5\%", r"6\%", False),
    # digits in another base
    ("11_9", r"11_{\text{nine}}", True),
    ("11_9", "(11)_9", True),
    ("11_9", "11_8", False),
    ("10001_2", "10011_2", False),
    # words and times of day
    ("even", "neve", False),
    (r"\text{neither}", r"\text{either}", False),
    (r"\text{A and B}", "A, B", True),
    (r"05\!:\!00", "5:00", True),
    (r"05\!:\!00", "6:00", False),
    (r"8\!:\!34 \text{ p.m.}", r"8:34 \text{ PM}", True),
    (r"8\!:\!34 \text{ p.m.}", r"8:34 \text{ a.m.}", False),
    # spelling
    (r"\dfrac{2469}{20,\!000}", r"\frac{2469}{20000}", True),
    (r"2007 + \frac\pi 2", r"2007+\frac{\pi}{2}", True),
    (r"7\text{ hours}.", "7", True),
    (r"3\,1/2", "31/2", False),
    ("10 000 000", "10000000", True),
    # an exponent, or Euler's number where either may be meant
    ("1e-5", "0.00001", True),
    ("1e-5", "10^{-5}", True),
    ("1e-5", "e-5", False),
    ("1.5e-3", "0.0015", True),
    ("1e22", "10^{22}", True),
    ("2e-3", "0.002", True),
    ("2e-3", "2e - 3", True),
    ("2e-3", "0.003", False),
    ("2e-2", "2(e-1)", True),
    ("0.002", "2e-3", True),
    ("2e+3", "2000", True),
    ("2e+3", "3+2e", True),
    ("-2e-3", "-0.002", True),
    ("(1e-5, 2)", "(0.00001, 2)", True),
    ("x = 1e-5", "0.00001", True),
    ("1e-5 cm", "0.00001", True),
    ("1E5_{16}", "100000", False),
    ("1E5", "100000", True),
    ("1.5e-05", "0.000015", True),
    # markup around an answer
    ("**5**", "5", True),
    ("__5__", "5", True),
    ("*5*", "5", True),
    ("`5`", "5", True),
    ("The answer is **5**.", "5", True),
    ("**Answer:** 5", "5", True),
    ("**Final answer: 5**", "5", True),
    ("<answer>5</answer>", "5", True),
    ("<think>4?</think> <answer>5</answer>", "5", True),
    ("<b>5</b>", "5", True),
    ("5", "**5**", True),
    ("6", "**5**", False),
    ("#### **5**", "5", True),
    ("a*b*c", "abc", True),
    ("= 5", "5", True),
    ("$= 5$", "5", True),
    ("5", "= 5", True),
    ("~5", "5", True),
    (r"\approx 5", "5", True),
    ("5", "\u2248 5", True),
    ("5 (five)", "5", True),
    ("1,234 (one thousand two hundred and thirty-four)", "1234", True),
    ("5 (mod 7)", "5", False),
    ("5,", "5", True),
    # signs
    ("\uff15", "5", True),
    ("\uff0d\uff11\uff0e\uff15", "-1.5", True),
    ("5", "\uff15", True),
    ("\uff08\uff11\uff0c\uff12\uff09", "(1,2)", True),
    ("\u0663", "3", True),
    ("\U0001d7d3", "5", True),
    ("x\u2074", "x^4", True),
    ("2\u207b\u00b3", r"\frac18", True),
    ("\u2154", r"\frac23", True),
    ("\u20ac5", "5", True),
    # units of a rate
    ("3/4 cup", r"\frac{3}{4}", True),
    ("5 km/h", "5", True),
    ("5 km/h", r"5 \text{ kilometers per hour}", True),
    ("5 km/h", "5 m/s", False),
    ("60 mph", r"60\text{ miles per hour}", True),
    ("60 mph", r"60\text{ km/h}", False),
    ("9.8 m/s^2", "9.8", True),
    ("5m/s", r"\frac{5m}{s}", True),
    ("5 a/b", r"\frac{5a}{b}", True),
    ("(1,2]", "{(1,2]}", True),
    (r"\frac{1}{2}", "\u00bd", True),
    (r"2\sqrt{3}", "\u221a12", True),
    (r"4\sqrt{2}", r"4\sqrt(2)", True),
    (r"4\sqrt{2}", "4sqrt(2)", True),
    # answers without a value
    (r"\infty", r"-\infty", False),
    (r"\frac{1}{0}", "5", False),
    ("x^2+y^2=-1", "x^2+y^2=-2", False),
    ("5", "7=5", False),
    (r"2i\cdot i", "-2", True),
    (r"\mathbb{R}", r"(-\infty,\infty)", True),
]
"""Gold answer, content of the completion's box, and whether a person would call them the same."""


def verdict(gold: str, boxed: str) -> bool | str:
    """Verdict of the grader on a gold field and a box."""
    answer, candidate = gold_answer(gold), last_boxed(rf"\boxed{{{boxed}}}")
    assert candidate is not None
    try:
        return look_alike(answer, candidate) or equivalent(answer, candidate)
    except UnparsedAnswerError:
        return "unparsed"


@pytest.mark.parametrize(("gold", "boxed", "equal"), PAIRS)
def test_answers_are_equal_where_a_person_says_so(gold: str, boxed: str, equal: bool) -> None:
    assert verdict(gold, boxed) is equal


def documented() -> list[tuple[str, ...]]:
    """Rows of the table of known errors: gold, box, a person's verdict, the grader's."""
    row = re.compile(r"^\| `(.+?)` \| `(.+?)` \| (equal|different) \| (equal|different|unparsed) \|", re.MULTILINE)
    return row.findall(PAGE.read_text(encoding="utf-8"))


def test_the_page_lists_errors() -> None:
    assert len(documented()) >= 10


@pytest.mark.parametrize(("gold", "boxed", "person", "grader"), documented())
def test_what_the_page_calls_wrong_is_still_wrong(gold: str, boxed: str, person: str, grader: str) -> None:
    found = verdict(gold, boxed)
    assert grader == ("unparsed" if found == "unparsed" else "equal" if found else "different")
    assert person != grader


@pytest.mark.parametrize("boxed", [r"+\times", r"\frac{1}{2}y\left(", r"x\in\in", "12;;;"])
def test_what_cannot_be_read_is_not_taken_for_a_part_of_it(boxed: str) -> None:
    assert verdict(r"\frac{1}{2}", boxed) == "unparsed"


@pytest.mark.parametrize(
    "gold",
    [
        "5",
        "-37_8",
        r"\frac{1}{2^{98}}",
        r"(-\infty,1) \cup (2,3]",
        r"4\!:\!51\!:\!06 \text{ p.m.}",
        r"1,i,-i",
        r"\mathbb{R}",
        r"\text{Softball, Kickball, Picnic}",
        r"\begin{pmatrix} \sqrt{2}/2 \\ 0 \end{pmatrix}",
        r"f(4 - x)",
        "12:05 a.m.",
    ],
)
def test_valid_golds_equal_themselves(gold: str) -> None:
    assert why_unmatchable(gold) is None
    assert equivalent(gold, gold)


def test_a_gold_that_has_no_value_is_named() -> None:
    assert "divide by zero" in str(why_unmatchable(r"\frac{1}{0}"))
