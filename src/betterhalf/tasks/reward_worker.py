"""Serve the user's reward functions in a worker process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from betterhalf.tasks.reward_values import read_rewards
from betterhalf.tasks.worker_main import Serve
from betterhalf.user_code import load_object, require_call

EXPECTED = "def {name}(prompts, completions, metadata): return [1.0, ...]"
"""Signature of a reward over a batch."""
EXPECTED_ONE = "def {name}(prompt, completion, metadata): return 1.0"
"""Signature of a reward for one completion."""

Functions = Mapping[str, tuple[Callable[..., Any], bool]]
"""Name of each reward -> its function, and True if it takes a batch."""


def load(arguments: Mapping[str, Any]) -> Serve:
    """Import the reward functions, check that they can be called, and return the function that serves requests."""
    functions: dict[str, tuple[Callable[..., Any], bool]] = {}
    for name, each in arguments["functions"].items():
        key = f"{each['key']}={each['path']}"
        function = load_object(each["path"], each["key"])
        example = (EXPECTED if each["batched"] else EXPECTED_ONE).format(name=each["path"].rpartition(":")[2])
        require_call(function, example, ("prompts", "completions", "metadata"), key)
        functions[name] = (function, each["batched"])
    return partial(_grade, functions)


def _grade(functions: Functions, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rewards of the siblings of one prompt."""
    function, batched = functions[request["reward"]]
    completions: list[str] = request["completions"]
    metadata = [dict(each) for each in request["metadata"]]
    prompts = [request["prompt"]] * len(completions)
    if batched:
        return read_rewards(_finished(function(prompts, completions, metadata)), len(completions))
    calls = [function(*arguments) for arguments in zip(prompts, completions, metadata, strict=True)]
    return read_rewards(_all_finished(calls), len(completions))


def _finished(result: Any) -> Any:
    """Return the result of a function, or of its coroutine."""
    return _all_finished([result])[0]


def _all_finished(results: Sequence[Any]) -> list[Any]:
    """Await all coroutines among the results, at the same time."""
    if not any(inspect.isawaitable(result) for result in results):
        return list(results)
    import asyncio  # it takes longer to import than a typical reward takes to run

    async def awaited(result: Any) -> Any:
        return await result if inspect.isawaitable(result) else result

    async def together() -> list[Any]:
        return list(await asyncio.gather(*map(awaited, results)))

    return asyncio.run(together())
