"""The record of a run's environment."""

from __future__ import annotations

import json
import sys

import pytest

from betterhalf.environment import environment


def test_environment_says_what_is_installed_and_survives_a_bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["pydantic"]
    assert found["cores"] >= 1
    monkeypatch.setenv("PATH", "")
    bare = environment()
    assert bare["gpus"] == []
    assert bare["git"] is None or bare["git"]["commit"] is None
    json.dumps(bare)
