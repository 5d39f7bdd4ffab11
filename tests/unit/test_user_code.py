from __future__ import annotations

import sys
from pathlib import Path

import pytest

from betterhalf.errors import ConfigError
from betterhalf.user_code import load_object, require_call, source_digest

EXAMPLE = "def reward(prompts, completions, metadata) -> list[float]"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, completions, metadata):\n    return [len(c) for c in completions]\n\n"
        "def short(prompts):\n    return 0\n\nclass Box:\n    value = 3\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import not_there_at_all\n")
    (tmp_path / "leaving_rewards.py").write_text("import sys\n\nsys.exit(0)\n")
    for name, text in (("needy_package", "import not_there_at_all\n"), ("leaving_package", "raise SystemExit(0)\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_and_its_module_give_the_object(here: Path) -> None:
    by_file = load_object("my_rewards.py:length", "task.reward")
    assert by_file([], ["ab"], []) == [2]
    assert load_object(str(here / "my_rewards.py") + ":length", "task.reward") is by_file
    assert load_object("my_rewards:length", "task.reward")([], ["abc"], []) == [3]
    assert load_object("my_rewards.py:Box.value", "task.reward") == 3


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("length", "not an import path"),
        (":length", "not an import path"),
        ("my_rewards.py:lenght", "no attribute 'lenght'. Did you mean length?"),
        ("my_reward.py:length", "does not exist. Did you mean my_rewards.py?"),
        ("nowhere/my_rewards.py:length", "nowhere/my_rewards.py does not exist"),
        ("my_reward:length", "no module 'my_reward'. Did you mean my_rewards?"),
        ("jsn:loads", "Did you mean json?"),
        ("xml.etre:x", "Did you mean xml.etree?"),
        ("broken_rewards.py:x", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("broken_rewards:x", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("leaving_rewards.py:x", "importing leaving_rewards.py fails with SystemExit: 0"),
        ("leaving_rewards:x", "importing leaving_rewards fails with SystemExit: 0"),
        (
            "needy_package.inner:x",
            "importing needy_package.inner fails with ModuleNotFoundError: No",
        ),
        ("leaving_package.inner:x", "importing leaving_package.inner fails with SystemExit: 0"),
    ],
)
def test_a_wrong_path_is_answered_with_the_nearest(here: Path, path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_object(path, "task.reward")
    assert words in str(caught.value)
    assert "task.reward" in str(caught.value)


def test_a_file_may_import_another_one_beside_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (here / "inner").mkdir()
    (here / "inner" / "uses_neighbour.py").write_text("from neighbour_of_uses import factor\n\nvalue = 2 * factor\n")
    (here / "inner" / "neighbour_of_uses.py").write_text("factor = 21\n")
    assert load_object("inner/uses_neighbour.py:value", "task.reward") == 42


def test_a_broken_file_can_be_corrected_and_loaded_again(here: Path) -> None:
    with pytest.raises(ConfigError):
        load_object("broken_rewards.py:value", "task.reward")
    (here / "broken_rewards.py").write_text("value = 7\n")
    assert load_object("broken_rewards.py:value", "task.reward") == 7


def test_a_wrong_signature_is_shown_beside_the_expected_one(here: Path) -> None:
    arguments = ("prompts", "completions", "metadata")
    require_call(load_object("my_rewards.py:length", "k"), EXAMPLE, arguments, "task.reward")
    with pytest.raises(
        ConfigError, match=r"short\(prompts\), which does not fit: too many positional arguments.*Expected: def reward"
    ):
        require_call(load_object("my_rewards.py:short", "k"), EXAMPLE, arguments, "task.reward=my_rewards.py:short")
    with pytest.raises(ConfigError, match="is int, which cannot be called"):
        require_call(3, EXAMPLE, arguments, "task.reward")


def test_the_digest_follows_the_file(here: Path) -> None:
    before = source_digest("my_rewards.py:length")
    assert before == source_digest("my_rewards:length") != "unknown"
    (here / "my_rewards.py").write_text("length = 1\n")
    assert source_digest("my_rewards.py:length") != before
    assert source_digest("nowhere_at_all:x") == "unknown"
