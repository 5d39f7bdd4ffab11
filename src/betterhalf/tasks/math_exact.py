"""Exact comparison of sympy expressions. Every function here runs in a worker process, which may be killed."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

_DIGITS = 60
_POINTS = ("1.37", "-2.13", "0.61", "-0.29")
"""Coordinates at which two expressions are compared: no zeros, no integers, both signs, both sides of 1."""


def exact(expression: Any) -> Any:
    """Return an expression with decimals as fractions, rational constants evaluated, and i as the imaginary unit."""
    import sympy
    from latex2sympy2_extended.logic import And
    from latex2sympy2_extended.sets import FiniteSet

    if isinstance(expression, sympy.MatrixBase):
        return expression.applyfunc(exact)
    if isinstance(expression, FiniteSet):
        return FiniteSet(*map(exact, expression._unsorted_args))
    if isinstance(expression, sympy.Tuple):
        return sympy.Tuple(*map(exact, expression.args))
    if isinstance(expression, sympy.Interval) and expression.args:  # the real line is an interval without args
        start, end, left_open, right_open = expression.args
        return sympy.Interval(exact(start), exact(end), left_open, right_open)
    if isinstance(expression, And):
        return And(*map(exact, expression._unsorted_args), evaluate=False)
    if isinstance(expression, sympy.core.relational.Relational):
        return expression.func(exact(expression.lhs), exact(expression.rhs), evaluate=False)
    return _exact_value(expression) if isinstance(expression, sympy.Expr) else expression


def _exact_value(expression: Any) -> Any:
    import sympy

    changes = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    changes |= {symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"}
    expression = expression.xreplace(changes) if changes else expression
    if not is_constant(expression):
        return expression
    value = expression.doit()
    return value if value.is_Rational else expression


def is_constant(expression: Any) -> bool:
    """Return whether an expression is a number, without a variable."""
    import sympy

    return isinstance(expression, sympy.Expr) and bool(expression.is_number)


def same_constant(gold: Any, candidate: Any, decimals: int | None = None) -> bool:
    """Return whether two numbers are equal: fractions exactly, others to 40 digits.

    Args:
        gold: gold answer.
        candidate: answer of the model.
        decimals: decimal places of a gold answer that is itself rounded. A candidate that has no finite decimal
            expansion is then equal if it rounds to the gold answer.
    """
    import sympy

    if gold.has(sympy.nan, sympy.zoo) or candidate.has(sympy.nan, sympy.zoo):
        return False
    if gold == candidate or gold.is_infinite or candidate.is_infinite:
        return bool(gold == candidate)
    decimals = None if _is_decimal(candidate) else decimals
    if decimals is None and gold.is_Rational and candidate.is_Rational:
        return False
    left, right = gold.doit().evalf(_DIGITS), candidate.doit().evalf(_DIGITS)
    distance, size = abs(left - right), max(abs(left), abs(right))
    if decimals is not None:
        return bool(distance <= sympy.Rational(1, 2 * 10**decimals))
    if min(abs(left), abs(right)) < sympy.Rational(1, 10**30):
        return bool(sympy.simplify(gold - candidate) == 0)  # leading digits say nothing about a sum that cancels
    return bool(distance <= size * sympy.Rational(1, 10**40))


def _is_decimal(number: Any) -> bool:
    """Return whether a number has a finite decimal expansion: its denominator has no factors but two and five."""
    if not number.is_Rational:
        return False
    rest = int(number.q)
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    return rest == 1


def equal_if_positive(gold: Any, candidate: Any) -> bool:
    """Return whether two expressions are equal for positive variables, such as sqrt(1/n) and 1/sqrt(n)."""
    import sympy

    if not (isinstance(gold, sympy.Expr) and isinstance(candidate, sympy.Expr)):
        return False
    names = {symbol: sympy.Dummy(symbol.name, positive=True) for symbol in gold.free_symbols}
    if not names or gold.free_symbols != candidate.free_symbols:
        return False
    return bool(sympy.simplify(gold.xreplace(names) - candidate.xreplace(names)) == 0)


def differ_somewhere(gold: Any, candidate: Any) -> bool:
    """Return whether two expressions differ at one of a few points where at least one of them is real.

    The result overrules two laxer comparisons: one within tolerances, which takes e^{-50}x for e^{-60}x, and one for
    positive variables only, which takes sqrt(x^2) for x.
    """
    import sympy

    if not (isinstance(gold, sympy.Expr) and isinstance(candidate, sympy.Expr)):
        return False
    symbols = sorted(gold.free_symbols | candidate.free_symbols, key=str)
    if not symbols or gold.free_symbols != candidate.free_symbols:
        return False
    points = (dict(zip(symbols, map(sympy.Rational, point), strict=True)) for point in _points(len(symbols)))
    return any(_differ(gold, candidate, point) for point in points)


def _points(variables: int) -> list[tuple[str, ...]]:
    """Return every combination of coordinates for one or two variables, and a fixed choice of sixteen for more."""
    if variables <= 2:
        return list(product(_POINTS, repeat=variables))
    draw = random.Random(0)
    return [tuple(draw.choices(_POINTS, k=variables)) for _ in range(16)]


def _differ(gold: Any, candidate: Any, point: dict[Any, Any]) -> bool:
    values = [side.xreplace(point).doit().evalf(30) for side in (gold, candidate)]
    if not all(value.is_number and value.is_finite for value in values):
        return False
    if not any(value.is_real for value in values):
        return False
    return bool(abs(values[0] - values[1]) > max(map(abs, values)) * 1e-20)


def both_unsolvable(gold: Any, candidate: Any) -> bool:
    """Return whether two different equations have no solution; math-verify compares solutions, and finds them equal."""
    import sympy

    if not (isinstance(gold, sympy.Eq) and isinstance(candidate, sympy.Eq)):
        return False
    left, right = gold.lhs - gold.rhs, candidate.lhs - candidate.rhs
    if not (isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr)):
        return False
    if right == 0 or sympy.simplify(left / right).is_constant():
        return False
    return not sympy.solve(left, left.free_symbols)


def contradicts(candidate: Any) -> bool:
    """Return whether an equation between numbers is wrong, such as 7 = 5."""
    import sympy

    if not (isinstance(candidate, sympy.Eq) and is_constant(candidate.lhs) and is_constant(candidate.rhs)):
        return False
    return not same_constant(candidate.lhs, candidate.rhs)


def lengths_differ(gold: Any, candidate: Any) -> bool:
    """Return whether two lists differ in length; compared as sets, 1,1,2 would equal 1,2."""
    members = [getattr(side, "_unsorted_args", None) for side in (gold, candidate)]
    return None not in members and len({len(side) for side in members if side is not None}) > 1
