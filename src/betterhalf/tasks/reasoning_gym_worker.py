"""Serve the scorer of a reasoning-gym generator in a worker process."""

from __future__ import annotations

import base64
import pickle
import reprlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from betterhalf.tasks.worker_main import Serve

Entry = Mapping[str, Any]
"""A problem as the generator returns it: question, answer, metadata."""


def load(arguments: Mapping[str, Any]) -> Serve:
    """Create the generator, and return the function that scores answers."""
    return partial(_score, create_generator(arguments["generator"], arguments["settings"], seed=0, size=1))


def packed(entry: Entry) -> str:
    """Return a problem as text; JSON alone would change the tuples and the numbered keys that scorers read."""
    return base64.b64encode(pickle.dumps(dict(entry))).decode("ascii")


def _score(generator: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the score of an answer; a score that is not a number becomes text."""
    entry = pickle.loads(base64.b64decode(request["entry"]))
    try:
        score = generator.score_answer(request["answer"], entry)
    except MemoryError:
        return {"error": "crash", "message": "it used more memory than a worker has"}
    try:
        return {"score": float(score)}
    except (TypeError, ValueError):
        return {"score": reprlib.repr(score)}


def create_generator(name: str, settings: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """Return a generator of reasoning-gym; a mixture of several (`composite`) takes each as a table."""
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec

    given = dict(settings)
    if name == "composite":
        given["datasets"] = [DatasetSpec(**spec) for spec in settings.get("datasets", ())]
    return reasoning_gym.create_dataset(name, **given, seed=seed, size=size)
