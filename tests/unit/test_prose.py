"""The checks of prose and of commit subjects: each rule with a text that breaks it and one that does not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

SCRIPTS = Path(__file__).parents[2] / "scripts"
LONG = "word " * 30


def script(name: str) -> ModuleType:
    """A script as a module, without leaving it among the imported ones."""
    spec = importlib.util.spec_from_file_location(f"_script_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PROSE, SUBJECT = script("lint_prose"), script("check_subject")


def in_python(text: str) -> list[tuple[int, str]]:
    return sorted(PROSE.python_findings(text))


def in_markdown(text: str) -> list[tuple[int, str]]:
    return sorted(PROSE.markdown_findings(text))


@pytest.mark.parametrize("word", PROSE.FIRST_WORDS)
def test_a_docstring_does_not_open_with_a_relative_word(word: str) -> None:
    ((line, problem),) = in_python(f'def f() -> None:\n    """{word} it is."""\n')
    assert line == 2
    assert repr(word) in problem


def test_docstrings_of_modules_classes_and_fields_are_read() -> None:
    code = '"""What."""\nclass A:\n    """How."""\n    x: int\n    """Of x."""\n'
    assert [line for line, _ in in_python(code)] == [1, 3, 5]


@pytest.mark.parametrize("verb", PROSE.FIRST_VERBS)
def test_a_docstring_does_not_open_with_a_verb_in_the_third_person(verb: str) -> None:
    summary = f'"""{verb} the values."""'
    code = f"class A:\n    {summary}\n    x: int\n    {summary}\ndef f() -> None:\n    {summary}\ny = 1\n{summary}\n"
    found = in_python(code)
    assert [line for line, _ in found] == [2, 4, 6, 8]
    assert all(repr(verb) in problem for _, problem in found)


@pytest.mark.parametrize(
    "summary",
    [
        *("Return what is left.", "Whatever the caller passed.", "Assemble.", "Offset.", "`What` as a name."),
        *("Sample completions.", "Sampler of completions.", "Records of a run.", "Checks that a model fits."),
        *("Keepsake.", "Sequences of a pack.", "Rows that `samples` returns."),
    ],
)
def test_imperatives_and_noun_phrases_pass(summary: str) -> None:
    assert not in_python(f'"""{summary}\n\nWhat follows is not the summary.\n"""\n')


def test_any_other_string_may_open_with_any_word() -> None:
    assert not in_python('x = "What it is"\nprint("How")\n')


@pytest.mark.parametrize("word", PROSE.OLD_WORDS)
def test_old_words_are_found_in_comments_messages_docstrings_and_pages(word: str) -> None:
    code = f'"""Text with {word} in it."""\n\nx = "text with {word} in it"\n# {word.capitalize()} in a comment\n'
    assert [line for line, _ in in_python(code)] == [1, 3, 4]
    assert [line for line, _ in in_markdown(f"Text.\n\nText with {word} in it.\n")] == [3]


def test_old_words_are_found_across_a_break_and_on_the_right_line() -> None:
    ((line, problem),) = in_python('"""First.\n\nText with so\nmany words.\n"""\n')
    assert line == 3
    assert "number of" in problem


@pytest.mark.parametrize("text", ["a secure, accurate, curer word", "canewood", "blest", "so very many", "Swinging"])
def test_parts_of_longer_words_pass(text: str) -> None:
    assert not in_markdown(text)


def test_prose_is_wrapped_and_list_items_are_prose() -> None:
    assert [line for line, _ in in_markdown(f"# Page\n\n{LONG}\n")] == [3]
    assert [line for line, _ in in_markdown(f"10. item\n    {LONG}\n")] == [2]
    assert not in_markdown("x" * PROSE.MAX_WIDTH)
    assert in_markdown("word " * 24 + "x")


@pytest.mark.parametrize(
    "text",
    [
        f"| {LONG} cure | anew |",
        f"```\n{LONG} anew\n```",
        f"* item\n\n  ```toml\n  {LONG} anew\n  ```",
        f"    {LONG} anew",
        "the name `cure` and `so many`",
        "see https://example.org/anew/cure?lest=1 for it",
        "[a link](https://example.org/" + "x" * 120 + ")",
    ],
    ids=["table", "fence", "fence in a list", "indented code", "code span", "address", "long link"],
)
def test_tables_code_and_addresses_are_not_prose(text: str) -> None:
    assert not in_markdown(f"Text.\n\n{text}\n\nText.\n")


def test_code_spans_and_addresses_in_docstrings_are_not_prose() -> None:
    assert not in_python('"""Return `cure`; https://example.org/anew tells why."""\n')


@given(
    words=st.lists(st.sampled_from([*PROSE.OLD_WORDS, "plain", "word"]), min_size=1, max_size=40),
    wrap=st.sampled_from(["`{}`", "| {} |", "```\n{}\n```", "https://example.org/{}"]),
)
def test_old_words_pass_wherever_they_are_not_prose(words: list[str], wrap: str) -> None:
    joined = ("-" if wrap.startswith("http") else " ").join(words)
    text = wrap.format(joined.replace(" ", "-") if wrap.startswith("http") else joined)
    assert not [problem for _, problem in in_markdown(text) if "write" in problem]


def test_the_script_prints_findings_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    for text, status, shown in (("Fine.\n", 0, ""), ("Start anew.\n", 1, "page.md:1: 'anew'")):
        page.write_text(text)
        monkeypatch.setattr(sys, "argv", ["lint_prose.py", str(tmp_path)])
        assert PROSE.main() == status
        assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    "subject",
    [
        "rollout: keep one prefill for all siblings",
        "docs/LOG.md: add the measurements of a GPU",
        "benchmarks, docs: name the peers",
        "tasks: embed no prompt twice",
        "config: bring back the defaults",
        "x: " + "a" * 69,
        "Merge branch 'engine'",
        'Revert "rollout: keep one prefill"',
        "fixup! Something Else.",
        "squash! rollout: keep",
    ],
)
def test_good_subjects_pass(subject: str) -> None:
    assert not list(SUBJECT.problems(subject))


@pytest.mark.parametrize(
    ("subject", "told"),
    [
        ("x: " + "a" * 70, "73 characters"),
        ("keep one prefill", "`area: summary`"),
        ("rollout:keep one prefill", "`area: summary`"),
        ("", "`area: summary`"),
        ("rollout: keep one prefill.", "full stop"),
        ("rollout: Keep one prefill", "capital letter"),
        ("rollout: added a test", "'added'"),
        ("rollout: adding a test", "'adding'"),
    ],
)
def test_each_rule_of_subjects_is_told(subject: str, told: str) -> None:
    (problem,) = SUBJECT.problems(subject)
    assert told in problem


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ("# a comment\n\nrollout: keep one prefill\n\nAdded a body.\n", 0),
        ("Keep it.\n\nrollout: keep one prefill\n", 1),
        ("# only comments\n", 1),
    ],
)
def test_the_hook_reads_the_first_line_that_is_no_comment(
    message: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "COMMIT_EDITMSG"
    file.write_text(message)
    monkeypatch.setattr(sys, "argv", ["check_subject.py", str(file)])
    assert SUBJECT.main() == status
