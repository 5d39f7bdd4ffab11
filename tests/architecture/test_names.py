"""Each list of names that a configuration uses is written once, in `types.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from betterhalf import types

SRC = Path(__file__).parents[2] / "src" / "betterhalf"
FILES = sorted(file for file in SRC.rglob("*.py") if file.name != "types.py")
LISTS = {name: frozenset(get_args(value)) for name, value in vars(types).items() if get_origin(value) is Literal}


def relative(file: Path) -> str:
    return str(file.relative_to(SRC))


def names_in(node: ast.AST) -> frozenset[str]:
    """Return the strings of a display or of a Literal's argument; none if it holds anything else."""
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    values = [part.value for part in parts if isinstance(part, ast.Constant)]
    return frozenset(values) if len(values) == len(parts) and all(isinstance(v, str) for v in values) else frozenset()


def literals(tree: ast.AST) -> Iterator[tuple[int, frozenset[str]]]:
    """Yield line and names of every `Literal[...]` of two or more strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal"):
            names = names_in(node.slice)
            if len(names) > 1:
                yield node.lineno, names


def displays(tree: ast.AST) -> Iterator[tuple[int, frozenset[str]]]:
    """Yield line and names of every tuple, list and set of strings outside a subscript."""
    inside = {id(node.slice) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List | ast.Set) and id(node) not in inside:
            yield node.lineno, names_in(node)


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_the_detectors_detect() -> None:
    tree = ast.parse('a: Literal["x"]\nb: typing.Literal["x", "y"]\nc = ("x", "y")\nd = ["x", z]')
    assert list(literals(tree)) == [(2, {"x", "y"})]
    assert [found for found in displays(tree) if found[1]] == [(3, {"x", "y"})]
    assert LISTS["HardwareDtype"] == {"fp16", "bf16", "fp32"} < LISTS["DtypeName"]


@pytest.mark.parametrize("file", [file for file in FILES if file.parent.name == "config"], ids=relative)
def test_the_configuration_takes_its_lists_of_names_from_types(file: Path) -> None:
    lines = [line for line, _ in literals(tree_of(file))]
    assert not lines, f"lines {lines}: give the list a name in types.py"


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_no_literal_repeats_names_of_a_list(file: Path) -> None:
    repeated = {
        f"line {line}: use types.{name}"
        for line, names in literals(tree_of(file))
        for name, listed in LISTS.items()
        if names <= listed
    }
    assert not repeated


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_no_list_of_names_is_typed_out_again(file: Path) -> None:
    """Allow lists of the three formats of processors, whose order has a different meaning in each place."""
    repeated = {
        f"line {line}: use get_args(types.{name})"
        for line, names in displays(tree_of(file))
        for name, listed in LISTS.items()
        if names == listed and name != "HardwareDtype"
    }
    assert not repeated
