"""Files about the repository hold what they must, and agree with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from betterhalf import __version__

ROOT = Path(__file__).parents[2]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert citation["references"][0]["url"].endswith("2510.26788")


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda form: form.stem
)
def test_issue_forms_have_what_a_form_needs(form: Path) -> None:
    """GitHub requires of a form a name, a description, and fields with an id and a label."""
    found = yaml.safe_load(form.read_text())
    if form.stem == "config":
        assert found == {"blank_issues_enabled": True}
        return
    assert found["name"] and found["description"]
    fields = [field for field in found["body"] if field["type"] != "markdown"]
    assert fields and all(field["id"] and field["attributes"]["label"] for field in fields)


def test_the_readme_is_short_and_shows_one_picture() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 120
    assert sum(line.startswith("![") for line in lines) == 1
