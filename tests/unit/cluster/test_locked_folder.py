"""Temporary folders: one process removes what another left behind, and nothing that is in use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from betterhalf.cluster.locked_folder import LockedFolder

MAKE = """
import sys
from betterhalf.cluster.locked_folder import LockedFolder
folder = LockedFolder("mine-", __import__("pathlib").Path(sys.argv[1]))
(folder.path / "content").write_text("x")
print(folder.path, flush=True)
sys.stdin.read()
"""


def test_a_folder_is_removed_by_the_next_once_its_process_was_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", MAKE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    held = Path(holder.stdout.readline().strip())
    first = LockedFolder("mine-", tmp_path)
    assert held.exists() and not first.path.samefile(held)
    holder.kill()
    holder.communicate()
    second = LockedFolder("mine-", tmp_path)
    assert not held.exists() and first.path.exists()
    assert second.empty
    (second.path / "file").touch()
    assert not second.empty
    for folder in (first, second, second):
        folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_lock_is_left_to_its_process_for_a_minute(tmp_path: Path) -> None:
    starting, old, other = (tmp_path / name for name in ("mine-starting", "mine-old", "other"))
    for folder in (starting, old, other):
        folder.mkdir()
    for folder in (old, other):
        os.utime(folder, (0, 0))
    LockedFolder("mine-", tmp_path).remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine-starting", "other"]
