"""Rules of style that a machine can check: sizes, docstrings, dtype literals, vocabulary."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "betterhalf"
FILES = sorted(SRC.rglob("*.py"))

MAX_FILE_LINES = 400
MAX_LOOP_LINES = 200
MAX_FUNCTION_LINES = 60
MAX_MEDIAN_FUNCTION_LINES = 10

HALF_ATTRIBUTES = {"float16", "bfloat16", "half"}
HALF_STRINGS = {"float16", "bfloat16", "torch.float16", "torch.bfloat16", "half"}
MODULE_NAMES = re.compile(r"(^|_)(model|module|decoder|network|lm_head|linear|layer)$")

FORBIDDEN = {
    "actor": "policy",
    "learner": "policy",
    "new_logps": "trainer_logprobs",
    "new_log_probs": "trainer_logprobs",
    "rollout_log_probs": "behavior_logprobs",
    "rollout_logprobs": "behavior_logprobs",
    "vllm_logprobs": "behavior_logprobs",
    "inference_logprobs": "behavior_logprobs",
    "old_log_prob": "proximal_logprobs",
    "old_log_probs": "proximal_logprobs",
    "old_logprobs": "proximal_logprobs",
    "ref_logps": "reference_logprobs",
    "ref_logprobs": "reference_logprobs",
    "trajectory": "rollout",
    "trajectories": "rollouts",
    "num_samples": "group_size",
    "num_generations": "group_size",
    "mini_batch": "micro_batch or train_batch",
    "minibatch": "micro_batch or train_batch",
    "iteration": "step",
    "overflow_flag": "found_inf",
    "off_policy_gap": "mismatch, staleness or drift",
}
"""Identifier -> word of the vocabulary to use instead (docs/vocabulary.md)."""


def relative(file: Path) -> str:
    return str(file.relative_to(SRC))


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def half_literals(tree: ast.AST) -> Iterator[int]:
    """Return the lines that name a half dtype or cast to one."""
    for node in ast.walk(tree):
        attribute = isinstance(node, ast.Attribute) and node.attr in HALF_ATTRIBUTES
        string = isinstance(node, ast.Constant) and node.value in HALF_STRINGS
        if attribute or string:
            yield node.lineno


def module_casts(tree: ast.AST) -> Iterator[int]:
    """Return the lines that call `.to(dtype)` on what is named like a module: it would round rope's tables too."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to"):
            continue
        name = ast.unparse(node.func.value).rpartition(".")[2]
        arguments = ast.unparse(node).partition(".to(")[2]
        if MODULE_NAMES.search(name) and re.search(r"dtype|float", arguments):
            yield node.lineno


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield line, value.lower()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_the_detectors_detect() -> None:
    assert sorted(half_literals(ast.parse("x = torch.float16\ny = x.half()\nz = 'bfloat16'\n'a half step'"))) == [
        1,
        2,
        3,
    ]
    assert list(module_casts(ast.parse("model.to(dtype)\nself.module.to(dtype=d)\nmodel.to(device)\nw.to(dtype)"))) == [
        1,
        2,
    ]
    assert (1, "old_log_prob") in set(identifiers(ast.parse("old_log_prob = 1")))


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) < MAX_FILE_LINES


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_functions_are_short(file: Path) -> None:
    long = [f.name for f in functions(tree_of(file)) if (f.end_lineno or 0) - f.lineno + 1 > MAX_FUNCTION_LINES]
    assert not long, f"over {MAX_FUNCTION_LINES} lines: {long}"


def test_the_median_function_is_short() -> None:
    lengths = [(f.end_lineno or 0) - f.lineno + 1 for file in FILES for f in functions(tree_of(file))]
    assert statistics.median(lengths) <= MAX_MEDIAN_FUNCTION_LINES


def test_the_loop_is_short() -> None:
    assert len((SRC / "runs" / "loop.py").read_text(encoding="utf-8").splitlines()) < MAX_LOOP_LINES


def test_no_package_is_empty() -> None:
    assert [str(init) for init in SRC.rglob("__init__.py") if len(list(init.parent.rglob("*.py"))) == 1] == []


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_modules_say_what_they_are(file: Path) -> None:
    docstring = ast.get_docstring(tree_of(file))
    assert docstring and len(docstring) > 20 and "TODO" not in docstring


AUDIT = SRC / "integrations" / "audit"
"""Its tables spell the values of other frameworks' files; it names no dtype of a tensor."""


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name != "precision" and AUDIT not in f.parents], ids=relative
)
def test_half_dtypes_are_named_in_precision_only(file: Path) -> None:
    lines = list(half_literals(tree_of(file)))
    assert not lines, f"lines {lines}: use precision.formats.torch_dtype"


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_modules_are_never_cast_whole(file: Path) -> None:
    lines = list(module_casts(tree_of(file)))
    assert not lines, f"lines {lines}: cast parameters by name, so that rope's tables stay FP32"


TRL = SRC / "integrations" / "trl"
"""It reads the settings of TRL, by TRL's names."""


@pytest.mark.parametrize("file", [file for file in FILES if TRL not in file.parents], ids=relative)
def test_the_vocabulary_is_kept(file: Path) -> None:
    wrong = {
        f"line {line}: {name} -> {FORBIDDEN[name]}" for line, name in identifiers(tree_of(file)) if name in FORBIDDEN
    }
    assert not wrong


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_source_is_ascii(file: Path) -> None:
    assert file.read_text(encoding="utf-8").isascii()
