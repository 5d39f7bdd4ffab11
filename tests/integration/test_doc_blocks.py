"""Every code block of the documentation runs, or says what it needs; `tests/doc_blocks.py` has the marks.

Commands run in a folder of their page, in this process, with the settings of the page and then small sizes. The folder
holds what pages speak of: a finished run `runs/mine`, a data set, a reward. A word in capitals stands for one of them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.doc_blocks import PAGES, ROOT, Block, blocks_of, problems_of

from betterhalf import cli
from betterhalf.cli.parse import parse, to_request
from betterhalf.cli.request import Request
from betterhalf.config.grid import load_grid

WORDS = {
    "MODEL": "demo",
    "MODEL|RUN": "demo",
    "EXPERIMENT": "experiments/smoke/demo.toml",
    "FILE": "experiments/laptop/rounding.sweep.toml",
    "RUN": "runs/mine",
    "DIR": "some-folder",
    "FOLDER": "demo",
}
"""Placeholder of a page -> what it stands for here."""

STEPS = ("training.steps=1", "training.prompts_per_step=2", "training.group_size=2", "training.optimizer_steps=1")
SAMPLES = ("sampling.max_tokens=8",)
PROBE = ("probe.prompts=2", "probe.group_size=2", "probe.bootstrap=100", "probe.gradient_completions=2")
SMALL = {
    "train": (*STEPS, *SAMPLES, "evaluate.max_prompts=2", "evaluate.samples=1"),
    "sanity": (*STEPS, *SAMPLES, "sanity.candidates=4", "sanity.samples=2", "sanity.upper=1.0", "sanity.lower=0.0"),
    "sweep": (*STEPS, *SAMPLES, "sweep.seeds=0"),
    "probe": (*PROBE, *SAMPLES, "precision.pairs=matched"),
    "doctor": ("doctor.prompts=2", "doctor.group_size=2", "doctor.max_tokens=8"),
    "evaluate": ("evaluate.max_prompts=4", "evaluate.samples=2", "evaluate.k=1,2", "evaluate.resamples=100", *SAMPLES),
}
"""Verb -> settings that make it small. They win over those of the page, which are parsed and checked all the same."""

Names = dict[str, Any]
Runs = Callable[[Block, Names], None]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a finished run, data and a reward, once for all pages."""
    folder = tmp_path_factory.mktemp("pages")
    here = Path.cwd()
    os.chdir(folder)
    try:
        run("betterhalf new mine")
        run("betterhalf train mine.toml run_dir=runs/mine training.checkpoint_every=1 evaluate.every=1")
    finally:
        os.chdir(here)
    (folder / "experiments").symlink_to(ROOT / "experiments")
    (folder / "problems.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n{"problem": "2+3=", "answer": "5"}\n')
    (folder / "score.py").write_text(
        "def score(prompts, completions, metadata):\n    return [0.0] * len(completions)\n"
    )
    (folder / "my.toml").write_text((folder / "mine.toml").read_text())
    (folder / "rollouts.jsonl").write_text(
        '{"prompt_token_ids": [1, 3], "token_ids": [4, 5, 2], "behavior_logprobs": [-0.3, -1.9, -0.1], '
        '"trainer_logprobs": [-0.3, -1.8, -0.1]}\n' * 2
    )
    for name in ("first", "a", "b", "another"):
        shutil.copytree(folder / "runs" / "mine", folder / "runs" / name)
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Copy the prepared folder for one page, and work in it."""
    copied = tmp_path / "page"
    shutil.copytree(prepared, copied, symlinks=True)
    monkeypatch.chdir(copied)
    monkeypatch.setattr(sys, "path", [str(copied), *sys.path])
    yield copied


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_run_or_says_what_it_needs(page: Path) -> None:
    assert not problems_of(page)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks_of(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_blocks_of_a_page_run(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: Names = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.marks.keys() & {"needs", "parsed", "tested"}:
            check_commands(block)
        elif block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text)
        if not block.marks.keys() & {"needs", "parsed", "tested"}:
            RUNS[block.language](block, names)
    capsys.readouterr()


def run_commands(block: Block, _names: Names) -> None:
    """Run each command line in this process; a transcript that shows an error must end in one."""
    expected = 2 if "\nerror: " in block.text else 0
    for command in block.commands():
        status = run(command.partition(";")[0])
        assert status == expected or may_fail(command), f"{block.place}: {command}: {status}"


def may_fail(command: str) -> bool:
    """Return whether a verdict (status 1) of a small run may fail, which is no error of the page."""
    return command.split()[:2] in (["betterhalf", verb] for verb in ("sanity", "doctor", "plan", "audit"))


def run(command: str) -> int:
    """Run one command line of betterhalf with small sizes, and return its status."""
    words = words_of(command)
    verb = words[0]
    run_dir = [] if any(word.startswith("run_dir=") for word in words) or verb != "train" else ["run_dir=unnamed"]
    if "--resume" in words or "--help" in words:
        return status_of(words)
    if verb == "new":
        for old in Path().glob(f"{words[1]}*.*"):
            old.unlink()
    shutil.rmtree("unnamed", ignore_errors=True)
    for old in (word.removeprefix("run_dir=") for word in words if word.startswith("run_dir=")):
        shutil.rmtree(old, ignore_errors=True)
    settings = SMALL.get(verb, ())
    quiet = ["logging.console=quiet"] if settings else []
    return status_of([*words, *run_dir, *settings, *quiet])


def status_of(words: list[str]) -> int:
    """Run `betterhalf WORDS` in this process."""
    try:
        return cli.main(words)
    except SystemExit as ended:  # --help and --version
        return int(ended.code or 0)


def words_of(command: str) -> list[str]:
    """Return the words after `betterhalf`, with placeholders replaced and optional ones in brackets left out."""
    words = shlex.split(re.sub(r'^eval "\$\((.*)\)"$', r"\1", command))
    assert words[0] == "betterhalf", f"no test can run {command!r}; mark the block (tests/doc_blocks.py)"
    return [WORDS.get(word, word.replace("run_dir=RUN", "run_dir=runs/mine")) for word in words[1:] if word[0] != "["]


def check_commands(block: Block) -> None:
    """Parse the command lines of betterhalf in a block that is not run, and resolve their settings."""
    if block.language not in ("sh", "console"):
        return
    for command in block.commands():
        found = re.search(r"(?:^|\s|/)(betterhalf .*)", command)
        if found is None or "|" in found[1]:
            continue
        words = words_of(found[1].partition(";")[0].partition("&&")[0])
        request = to_request(words[0], cli.VERBS[words[0]], parse(words[0], cli.VERBS[words[0]], words[1:]))
        resolve(words[0], request)


def resolve(verb: str, request: Request) -> None:
    """Resolve the configuration of a request; a file that the page does not show counts as the defaults."""
    named = request.words[0] if request.words else None
    if verb == "sweep":
        load_grid(named or "", request.overrides)
    elif cli.VERBS[verb].settings:
        request.config(named if named and named.startswith("experiments/") else None)


def run_python(block: Block, names: Names) -> None:
    """Execute a block in the names of its page; a file is executed by the commands that name it."""
    if block.file is None:
        exec(compile(block.text, block.place, "exec"), names)


def load_toml(block: Block, _names: Names) -> None:
    """Resolve an experiment, a part of one, or a sweep."""
    name = block.file or "block.toml"
    Path(name).write_text(block.text.replace('"../base/', '"experiments/base/'))
    if "[sweep" in block.text:
        load_grid(name, [])
    else:
        assert status_of(["config", name]) == 0, block.place


def load_json(block: Block, _names: Names) -> None:
    """Read each line as JSON."""
    for line in block.text.splitlines():
        json.loads(line)


RUNS: dict[str, Runs] = {
    "sh": run_commands,
    "console": run_commands,
    "python": run_python,
    "toml": load_toml,
    "json": load_json,
    "text": lambda _block, _names: None,
    "math": lambda _block, _names: None,
}


def test_a_block_that_nobody_can_run_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr("tests.doc_blocks.ROOT", tmp_path)
    page.write_text(
        "```\nx\n```\n<!-- need: x -->\n```sh\nls\n```\n<!-- tested: t.py -->\n```sh\nls\n```\n    betterhalf x\n"
    )
    assert [problem.partition(": ")[2] for problem in problems_of(page)] == [
        f"the block's language is ''; name one of {tuple(RUNS)}",
        "the mark 'need' is not known",
        "t.py does not exist, or does not name page.md",
        "fence the indented command after 'betterhalf'",
    ]
    with pytest.raises(AssertionError, match="no test can run 'ls'"):
        run_commands(blocks_of(page)[1], {})
    page.write_text("```sh\nbetterhalf train EXPERIMENT training.stepz=1\n```\n")
    with pytest.raises(AssertionError, match=r"page.md:1: .*stepz=1: 2"):
        run_commands(blocks_of(page)[0], {})
