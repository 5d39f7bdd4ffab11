"""The notebook of docs/ runs from top to bottom, and its numbers are what its text says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOK = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))

RUN = """
import ast, json, pathlib, sys

def show(cell, names):
    body = ast.parse(cell).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)

names, shown = {"__name__": "__main__"}, []
for cell in json.loads(sys.stdin.read()):
    value = show(cell, names)
    shown.append(value._repr_html_() if hasattr(value, "_repr_html_") else value)
json.dump(shown, open("shown.json", "w"), default=str)
"""
"""Execute the cells in order in one namespace, as a kernel does, and record the value of each last expression."""


def cells(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], str, Path]:
    """Return what the cells show, what they print, and the folder they ran in."""
    folder = tmp_path_factory.mktemp("notebook")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN],
        input=json.dumps(cells("code")),
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "shown.json").read_text()), done.stdout, folder


def test_the_notebook_is_stored_without_outputs() -> None:
    assert NOTEBOOK["nbformat"] == 4
    assert all(
        not cell["outputs"] and cell["execution_count"] is None for cell in NOTEBOOK["cells"] if "outputs" in cell
    )
    assert all(len(line) <= 120 for text in cells("markdown") + cells("code") for line in text.splitlines())


def test_every_cell_runs_and_shows_what_its_text_says(executed: tuple[list[Any], str, Path]) -> None:
    shown, printed, folder = executed
    values = [value for value in shown if value is not None]
    verdicts, k3, html, (rewards, mismatch), measured, (length, ess), (losses, _), contract = values
    assert verdicts.keys() == {"fp16", "bf16", "fp32"}
    assert k3["bf16"] > 10 * k3["fp16"] > 0
    assert "<table>" in html and "<iframe" in html and "runs/train-demo" in html
    assert len(rewards) == len(mismatch) == 3 and all(0 <= reward <= 1 for reward in rewards)
    assert measured[0] > 0 and measured[1] > 0
    assert length > 0 and 0 <= ess <= 1
    assert losses[2] < losses[1] < losses[0]
    assert contract[:2] == [True, False] and contract[2].startswith("weight weight is")
    assert "precision.preset=bf16" in printed and "precision.preset=fp16" in printed
    assert len(list((folder / "runs").iterdir())) == 4
