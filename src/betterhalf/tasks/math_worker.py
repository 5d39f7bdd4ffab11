"""Serve comparisons of mathematical answers in a worker process."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from betterhalf.tasks.math_equal import UnparsedAnswerError, equivalent, why_unmatchable
from betterhalf.tasks.worker_main import Serve
from betterhalf.user_code import load_object


def load(arguments: Mapping[str, Any]) -> Serve:
    """Warm up the comparison, before any time limit runs, and return the function that serves requests."""
    equivalent("3", "6/2")
    return partial(_compare, {"equal": load_object(arguments["equal"], "the comparison"), "gold": why_unmatchable})


def _compare(functions: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"result": functions[request["function"]](*request["answers"])}
    except MemoryError:
        return {"failure": "RESOURCES"}
    except UnparsedAnswerError:
        return {"failure": "UNPARSED"}
