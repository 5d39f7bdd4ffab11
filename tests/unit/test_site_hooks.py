"""The documentation site: links of the repository become links of the site, formulas become MathML."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.extra
ROOT = Path(__file__).parents[2]


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("mkdocs", "latex2mathml"):
        pytest.importorskip(
            name, reason="the packages of the site are not installed; scripts/install --docs brings them"
        )
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "site_hooks", raising=False)
    import site_hooks

    return site_hooks


@pytest.mark.parametrize(
    ("here", "link", "expected"),
    [
        ("usage.md", "metrics.md", "metrics.md"),
        ("usage.md", "../experiments/README.md", "experiments/README.md"),
        ("log/one.md", "../LOG.md", "LOG.md"),
        ("experiments/README.md", "../docs/sweep.md", "sweep.md"),
        ("CONTRIBUTING.md", "docs/LOG.md", "LOG.md"),
        ("api.md", "notebook.ipynb", "notebook.md"),
    ],
)
def test_a_link_of_the_repository_leads_to_the_page_of_the_site(
    hooks: Any, here: str, link: str, expected: str
) -> None:
    assert hooks.site_path(here, link) == expected


class Named:
    """A page, or the files of a site, as far as the hook looks."""

    def __init__(self, *paths: str) -> None:
        self.paths = paths
        self.file, self.src_uri = self, paths[0]

    def get_file_from_path(self, path: str) -> str | None:
        return path if path in self.paths else None


def test_links_are_rewritten_outside_of_code_only(hooks: Any) -> None:
    page, files = Named("log/one.md"), Named("experiments/README.md")
    text = "[a](../../experiments/README.md#b) [c](../../scripts/x)\n```sh\n[a](../../experiments/README.md)\n```\n"
    changed = hooks.on_page_markdown(text, page=page, config=None, files=files)
    assert changed == "[a](../experiments/README.md#b) c\n```sh\n[a](../../experiments/README.md)\n```\n"


def test_a_reader_sees_what_a_block_needs(hooks: Any) -> None:
    shown = hooks.on_page_markdown(
        "<!-- needs: Ray -->\n```sh\nls\n```\n", page=Named("a.md"), config=None, files=Named("a")
    )
    assert shown == '<p class="needs">needs Ray</p>\n\n```sh\nls\n```\n'


def test_formulas_are_mathml(hooks: Any) -> None:
    shown = hooks.math(r"e^{-L}" + "\n\n" + r"\pi(y_t)", "math", "math", {}, None)
    assert shown.count("<math") == 2 and "<msup>" in shown and "&#x003C0;" in shown
