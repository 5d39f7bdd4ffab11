"""Imports run strictly downward between packages, without cycles, and heavy packages are imported in few places."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
FILES = sorted((SRC / "betterhalf").rglob("*.py"))

FLOORS = {
    "__main__": 11,
    "cli": 10,
    "integrations": 9,
    "api": 8,
    **dict.fromkeys(("runs", "examine"), 7),
    **dict.fromkeys(("setup", "cluster"), 6),
    **dict.fromkeys(("rollout", "training"), 5),
    **dict.fromkeys(("models", "algorithms", "diagnostics", "tasks", "report", "tracking"), 4),
    **dict.fromkeys(("precision", "metrics", "ops", "padded", "run_dir", "run_lock", "environment", "wire"), 3),
    "distributed": 2,
    **dict.fromkeys(("config", "reduction", "user_code"), 1),
    **dict.fromkeys(("types", "batches", "errors", "process", "kernels"), 0),
    **dict.fromkeys(("token_support", "words"), -1),
}

TORCH_FREE = (
    "types",
    "batches",
    "errors",
    "process",
    "config",
    "metrics",
    "run_dir",
    "run_lock",
    "user_code",
    "token_support",
    "words",
    "environment",
    "report",
    "tracking",
    "tasks",
    "cli",
    "__main__",
)
OPTIONAL = {
    *("vllm", "ray", "trl", "datasets", "gguf", "pandas", "reasoning_gym"),
    *("wandb", "trackio", "mlflow", "tensorboard", "prometheus_client"),
}
HEAVY = OPTIONAL | {"torch", "transformers", "accelerate"}


def module_name(file: Path) -> str:
    parts = file.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imported(tree: ast.AST) -> Iterator[str]:
    """Return the full names of all imports, those in functions and under TYPE_CHECKING included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_modules(file: Path) -> set[str]:
    """Return the modules of this package that a file imports."""
    names = set()
    for name in imported(ast.parse(file.read_text(encoding="utf-8"))):
        while name.startswith("betterhalf") and name not in MODULES:
            name = name.rpartition(".")[0]
        if name.startswith("betterhalf."):
            names.add(name)
    return names


def package(module: str) -> str:
    return module.split(".")[1]


def run_time_imports(body: list[ast.stmt]) -> Iterator[str]:
    """Return the imports that importing a module runs, without those in functions or under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from run_time_imports(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.ClassDef):
            inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            yield from run_time_imports(inner)


def at_run_time(file: Path) -> set[str]:
    return {name.split(".")[0] for name in run_time_imports(ast.parse(file.read_text(encoding="utf-8")).body)}


def test_walker_sees_imports_in_functions_and_for_type_checking() -> None:
    code = "if TYPE_CHECKING:\n    import torch.nn\ndef f():\n    from betterhalf.runs import loop\n"
    assert list(imported(ast.parse(code))) == ["torch.nn", "betterhalf.runs.loop"]
    assert list(run_time_imports(ast.parse(code).body)) == []
    assert list(run_time_imports(ast.parse("try:\n    import torch\nexcept E:\n    pass").body)) == ["torch"]


def test_every_package_has_a_floor() -> None:
    assert {package(name) for name in MODULES if "." in name} <= FLOORS.keys()


@pytest.mark.parametrize("module", sorted(name for name in MODULES if "." in name))
def test_imports_run_downward(module: str) -> None:
    floor = FLOORS[package(module)]
    upward = {
        name
        for name in own_modules(MODULES[module])
        if package(name) != package(module) and FLOORS[package(name)] >= floor
    }
    assert not upward, f"{module} (floor {floor}) imports {upward} on its own floor or above"


def test_the_root_package_imports_nothing_of_its_own_at_run_time() -> None:
    assert at_run_time(MODULES["betterhalf"]) == {"importlib", "typing"}


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name: own_modules(file) - {name} for name, file in MODULES.items()}
    # static_order raises CycleError, which names the cycle
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(MODULES)


@pytest.mark.parametrize("module", sorted(m for m in MODULES if "." in m and package(m) in TORCH_FREE))
def test_torch_free_packages_import_nothing_heavy(module: str) -> None:
    assert not at_run_time(MODULES[module]) & HEAVY


@pytest.mark.parametrize("module", sorted(MODULES))
def test_optional_packages_are_imported_where_they_are_used(module: str) -> None:
    """Refuse them at the top of a module, where they would break every installation without them."""
    assert not at_run_time(MODULES[module]) & OPTIONAL


def test_importing_the_torch_free_packages_loads_nothing_heavy() -> None:
    modules = [name for name in MODULES if "." in name and package(name) in TORCH_FREE]
    code = (
        f"import importlib, json, sys\n[importlib.import_module(name) for name in {modules!r}]\n"
        f"print(json.dumps(sorted({HEAVY!r} & sys.modules.keys())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SRC)
    assert json.loads(done.stdout) == []
