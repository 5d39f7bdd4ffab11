"""Fenced code blocks of the documentation, and what each one asks of a test.

A comment on the line before a fence marks a block; the site shows `needs` to its readers.

    <!-- needs: 8 GPUs -->            not run: it takes what the words name; command lines in it are still parsed
    <!-- parsed: an hour of CPU -->   not run, for the reason; its command lines are parsed and their settings resolved
    <!-- tested: tests/x/test_y.py -->  run by that test, which names the page
    <!-- file: NAME -->               written to NAME in the page's folder, for the blocks that follow

Without a mark a block is run: `sh` and `console` as command lines, `python` as a script, `toml` as an experiment file,
`json` as rows. `text` is output, and `math` a formula. Any other language, and none, is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *(ROOT / folder / "README.md" for folder in ("experiments", "benchmarks")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
MARKS = ("needs", "parsed", "tested", "file")
LANGUAGES = ("sh", "console", "python", "toml", "json", "text", "math")

_FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```[ ]*$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"<!-- (\w+): ([^>]*?) -->\s*\Z")
_INDENTED = re.compile(r"^(?: {4}|\t)(betterhalf|scripts/|python|pip|algorithm=|precision)\b", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced code block."""

    page: Path
    """File that holds it."""
    line: int
    """Line of its opening fence."""
    language: str
    """First word after the fence; empty without one."""
    text: str
    """Its lines, without the indentation of the fence."""
    marks: dict[str, str]
    """Mark -> its words."""

    @property
    def place(self) -> str:
        """Page and line, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """Name to write the block to: that of its mark, or of a first line `# NAME`; None without one."""
        named = re.match(r"# ([\w./-]+\.\w+)\n", self.text)
        return self.marks.get("file") or (named[1] if named else None)

    def commands(self) -> list[str]:
        """Return its command lines, with continued lines joined and comments removed."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [found for line in lines if (found := re.sub(r"(^|\s+)#.*", "", line).strip())]


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for fence in _FENCE.finditer(text):
        marks, before = {}, text[: fence.start()]
        while mark := _MARK.search(before):
            marks[mark[1]] = mark[2]
            before = before[: mark.start()]
        body = re.sub(rf"^{fence[1]}", "", fence[3], flags=re.MULTILINE)
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(page=page, line=line, language=fence[2], text=body, marks=marks))
    return found


def problems_of(page: Path) -> list[str]:
    """Return what is wrong with the marks of a page, in words."""
    found = []
    for block in blocks_of(page):
        if block.language not in LANGUAGES:
            found.append(f"{block.place}: the block's language is {block.language!r}; name one of {LANGUAGES}")
        found += [f"{block.place}: the mark {mark!r} is not known" for mark in block.marks if mark not in MARKS]
        found += [f"{block.place}: the mark {mark!r} has no words" for mark, words in block.marks.items() if not words]
        if "tested" in block.marks and page.name not in read(ROOT / block.marks["tested"]):
            found.append(f"{block.place}: {block.marks['tested']} does not exist, or does not name {page.name}")
    unfenced = _INDENTED.finditer(_FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), read(page)))
    found += [f"{page.name}: fence the indented command after {match[0].strip()!r}" for match in unfenced]
    return found


def read(file: Path) -> str:
    """Return the text of a file; empty if there is none."""
    return file.read_text(encoding="utf-8") if file.is_file() else ""
