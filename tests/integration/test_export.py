"""A run is exported as a folder that transformers loads, even if the model has settings that cannot be saved."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from betterhalf.models import loading
from betterhalf.models.generation import repaired

DEMO = Path(loading.__file__).parent / "demo"

Ends = Callable[..., str]


def demo_with(folder: Path, file: str, **entries: Any) -> Path:
    shutil.copytree(DEMO, folder)
    known = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(known | entries))
    return folder


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_generation_settings_that_cannot_be_saved_are_left_out_and_named(
    file: str, train: Ends, ends: Ends, tmp_path: Path
) -> None:
    """With `do_sample=false`, transformers loads a temperature but refuses to save it."""
    model = demo_with(tmp_path / file.partition(".")[0], file, do_sample=False, temperature=0.7, top_p=0.9)
    if file == "config.json":
        (model / "generation_config.json").unlink()
    said = train(0, f"model={model}", "logging.console=lines")
    assert "note: " in said and "export leaves out temperature, top_p" in said
    ends(0, "export", tmp_path / "run", tmp_path / "exported")
    saved = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == 15 and "temperature" not in saved and saved["do_sample"] is False
    AutoModelForCausalLM.from_pretrained(tmp_path / "exported").save_pretrained(tmp_path / "again")


def test_what_is_left_out_is_in_the_result(train: Ends, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from betterhalf import cli

    model = demo_with(tmp_path / "model", "generation_config.json", do_sample=False, temperature=0.7)
    train(0, f"model={model}")
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "exported"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["generation_settings_left_out"] == "temperature"


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"do_sample": True, "temperature": 0.7}, ()),
        ({"do_sample": False, "temperature": 0.7, "top_k": 3}, ("temperature", "top_k")),
        ({"temperature": 0.7, "eos_token_id": [1, 2]}, ("temperature",)),
        ({"early_stopping": True, "length_penalty": 2.0}, ("early_stopping", "length_penalty")),
        ({"output_scores": True, "max_length": 40}, ("output_scores",)),
    ],
)
def test_only_what_transformers_refuses_is_left_out(settings: dict[str, Any], left_out: tuple[str, ...]) -> None:
    kept, gone = repaired(GenerationConfig(**settings))
    assert gone == left_out
    kept.validate(strict=True)
    for name in settings.keys() - set(left_out):
        assert getattr(kept, name) == settings[name]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "free disk space"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "free disk space"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), "fix the cause, or name another folder"),
        (RuntimeError("no such key"), "fix the model's configuration files"),
    ],
    ids=["full", "quota", "permission", "other"],
)
def test_an_export_that_fails_reports_what_was_seen(
    error: Exception, words: str, train: Ends, ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(0)

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
        message = ends(3, "export", tmp_path / "run", tmp_path / "exported")
    assert str(error) in message and words in message
    assert ("free disk space" in message) == (words == "free disk space")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
