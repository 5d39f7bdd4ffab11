"""Which backend a run has is asked in one place: nothing above it knows Ray, and the loop reads the same for all."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "betterhalf"
ABOVE = sorted(path for package in ("runs", "api", "cli", "setup") for path in (SRC / package).rglob("*.py"))


def conditions(source: str) -> list[str]:
    """Return the conditions that depend on the backend or on Ray."""
    nodes = list(ast.walk(ast.parse(source)))
    tested = [ast.unparse(node.test) for node in nodes if isinstance(node, ast.If | ast.IfExp)]
    tested += [ast.unparse(node) for node in nodes if isinstance(node, ast.Compare)]
    return sorted({text for text in tested if re.search(r"\bcluster\.backend\b|\bray\b", text)})


def imports_ray(source: str) -> bool:
    """Return whether a file imports Ray."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return any(name.partition(".")[0] == "ray" for name in names)


def test_the_detectors_detect() -> None:
    assert conditions("if config.cluster.backend == 'ray': pass") == ["config.cluster.backend == 'ray'"]
    assert conditions("x = 1 if ray else 2") == ["ray"]
    assert conditions("backend_of(config).check(config)\nif array: pass") == []
    assert imports_ray("import ray.util") and imports_ray("from ray import get")
    assert not imports_ray("import rayon\nfrom array import array")


@pytest.mark.parametrize("file", ABOVE, ids=lambda path: str(path.relative_to(SRC)))
def test_nothing_above_the_assembly_asks_for_the_backend(file: Path) -> None:
    assert conditions(file.read_text(encoding="utf-8")) == []


def test_only_the_package_of_the_cluster_imports_ray() -> None:
    importing = {path.relative_to(SRC).parts[0] for path in SRC.rglob("*.py") if imports_ray(path.read_text("utf-8"))}
    assert importing == {"cluster"}


def test_the_loop_has_not_grown_for_other_backends() -> None:
    assert len((SRC / "runs" / "loop.py").read_text(encoding="utf-8").splitlines()) <= 121
