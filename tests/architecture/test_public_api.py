"""`betterhalf` offers its public names lazily, with types, and every one is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import betterhalf

ROOT = Path(__file__).parents[2]
INIT = ROOT / "src" / "betterhalf" / "__init__.py"
PAGE = ROOT / "docs" / "api.md"
NAMES = [name for name in betterhalf.__all__ if name != "__version__"]

ASKED = (
    *("train", "sanity", "probe", "doctor", "evaluate", "load_run", "compare"),
    *(
        "mismatch_metrics",
        "fit_budget",
        "policy_loss",
        "LossScaler",
        "build_loss_scaler",
        "contract",
        "BetterhalfError",
    ),
)


def in_new_process(code: str) -> object:
    """Return the JSON that `code` prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "src", timeout=120
    )
    return json.loads(done.stdout)


def test_importing_the_package_loads_next_to_nothing() -> None:
    """Count modules, which does not depend on the machine: the standard library's start-up has most of them already."""
    loaded = in_new_process(
        "import importlib, json, sys, typing\nbefore = set(sys.modules)\nimport betterhalf\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    assert loaded == ["betterhalf"]


def test_importing_the_package_takes_under_a_tenth_of_a_second() -> None:
    seconds = in_new_process(
        "import json, time\nstart = time.process_time()\nimport betterhalf\n"
        "print(json.dumps(time.process_time() - start))"
    )
    assert isinstance(seconds, float)
    assert seconds < 0.1


@pytest.mark.parametrize("name", ["train", "load_run", "RunConfig", "InputError", "evaluate", "configuration_of"])
def test_torch_is_not_loaded_before_a_function_needs_it(name: str) -> None:
    """Threads are chosen by a verb, and that has to happen before torch is imported."""
    code = f"import betterhalf, json, sys\nbetterhalf.{name}\nprint(json.dumps('torch' in sys.modules))"
    assert in_new_process(code) is False


def test_the_asked_names_are_there() -> None:
    assert set(ASKED) <= set(betterhalf.__all__)
    assert set(betterhalf.__all__) <= set(dir(betterhalf))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_the_object_of_its_module(name: str) -> None:
    module = importlib.import_module(betterhalf._SOURCES[name])
    assert getattr(betterhalf, name) is getattr(module, name)


def test_editors_see_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse(INIT.read_text(encoding="utf-8"))
    typed = {
        alias.asname: node.module
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == betterhalf._SOURCES
    assert sorted([*typed, "__version__"]) == betterhalf.__all__


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'betterhalf' has no attribute 'nothing'"):
        betterhalf.nothing  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_documented(name: str) -> None:
    assert re.search(rf"`{name}\b", PAGE.read_text(encoding="ascii")), f"docs/api.md does not name {name}"


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isfunction(getattr(betterhalf, name))])
def test_every_parameter_is_in_the_documented_signature(name: str) -> None:
    signature = re.search(rf"^{name}\((.*?)\)", PAGE.read_text(encoding="ascii"), re.MULTILINE | re.DOTALL)
    described = signature[1] if signature else _in_prose(name)
    shown = [part.partition("=")[0].strip(" *\n") for part in described.split(",")]
    expected = [part.name for part in inspect.signature(getattr(betterhalf, name)).parameters.values()]
    assert [part for part in shown if part] == expected


def _in_prose(name: str) -> str:
    found = re.search(rf"`{name}\(([^`]*)\)`", PAGE.read_text(encoding="ascii"))
    assert found, f"docs/api.md has no signature of {name}"
    return found[1]
