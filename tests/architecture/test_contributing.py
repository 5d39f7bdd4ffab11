"""The table of packages in CONTRIBUTING.md has the floors that the test of imports holds."""

from __future__ import annotations

import re
from pathlib import Path

from tests.architecture.test_floors import FLOORS

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def test_contributing_lists_every_package_on_its_floor() -> None:
    rows = re.findall(r"^\| (-?\d+) \| `(\w+)` \| \S", PAGE.read_text(encoding="ascii"), re.MULTILINE)
    assert {name: int(floor) for floor, name in rows} == FLOORS
    assert [int(floor) for floor, _ in rows] == sorted((int(floor) for floor, _ in rows), reverse=True)
