"""Hooks of mkdocs.yml: pages from outside docs/ or from the schema, the notebook as a page, formulas as MathML.

Links in the Markdown files are those of the repository, so that they work there too; `on_page_markdown` turns them into
links of the site. A link to a file that the site does not hold becomes plain text.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from site_settings import settings_page

ROOT = Path(__file__).parents[1]

OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "experiments/README.md", "benchmarks/README.md")
"""Pages outside docs/, by their path in the repository and on the site."""

NOTEBOOK = "notebook.ipynb"
SETTINGS = "reference/settings.md"

_FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2\s*$", re.DOTALL | re.MULTILINE)
_NEEDS = re.compile(r"^( *)<!-- needs: ([^>]*?) -->$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    page = notebook_page((ROOT / "docs" / NOTEBOOK).read_text(encoding="utf-8"))
    files.append(File.generated(config, SETTINGS, content=settings_page()))
    files.append(File.generated(config, NOTEBOOK.replace(".ipynb", ".md"), content=page))
    return files


def notebook_page(text: str) -> str:
    """Return the cells of a notebook as Markdown."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page of the repository into links of the site, and show what a code block needs."""
    here = page.file.src_uri

    def replaced(match: re.Match[str]) -> str:
        words, path, anchor = match[1], match[2], match[3] or ""
        target = site_path(here, path)
        if files.get_file_from_path(target) is None:
            return words
        return f"[{words}]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{anchor})"

    def shown(prose: str) -> str:
        return _NEEDS.sub(r'\1<p class="needs">needs \2</p>\n', _LINK.sub(replaced, prose))

    return outside_fences(markdown, shown)


def outside_fences(markdown: str, change: Any) -> str:
    """Apply `change` to what is not in a fenced code block."""
    out, end = [], 0
    for fence in _FENCED.finditer(markdown):
        out += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*out, change(markdown[end:])])


def site_path(here: str, link: str) -> str:
    """Return the path on the site of what a page at `here` links to.

    Args:
        here: path of the page on the site.
        link: relative link, as it is in the repository.
    """
    source = here if here in OUTSIDE else f"docs/{here}"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    found = target.removeprefix("docs/")
    return found.replace(".ipynb", ".md") if found == NOTEBOOK else found


def math(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    """Render a fenced block of LaTeX as MathML, a formula for each paragraph."""
    formulas = [convert(formula, display="block") for formula in source.strip().split("\n\n")]
    return f'<div class="{css_class}">{"".join(formulas)}</div>'
