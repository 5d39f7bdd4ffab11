"""The run folder: refusals, and its state after a kill or on a full disk."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from betterhalf.errors import InputError, RunError
from betterhalf.run_dir import (
    RunDir,
    append_jsonl,
    read_json,
    read_jsonl,
    truncate_jsonl,
    write_json_atomic,
)
from betterhalf.setup.folder import default_run_dir


def no_space(*_: object, **__: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_that_holds_a_run_is_refused_unless_resumed(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "new" / "run", resume=False)
    write_json_atomic(run.config, {"seed": 1})
    with pytest.raises(InputError, match=r"already holds a run.*--resume.*run_dir=PATH"):
        RunDir.create(run.path, resume=False)
    assert RunDir.create(run.path, resume=True) == run


def test_resuming_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run to resume"):
        RunDir.create(tmp_path, resume=True)


def test_a_folder_with_other_files_only_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert RunDir.create(tmp_path, resume=False).path == tmp_path


def test_a_path_below_a_file_is_refused_as_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be created"):
        RunDir.create(tmp_path / "file" / "run", resume=False)


def test_a_folder_that_is_not_a_run_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run folder"):
        RunDir.open(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        RunDir.open(tmp_path / "absent")


def test_arms_come_in_the_order_of_the_summary_then_by_name(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", resume=False)
    for name in ("bf16", "fp16", "fp32"):
        run.arm(name).path.mkdir(parents=True)
    assert run.arm_names() == ["bf16", "fp16", "fp32"]
    write_json_atomic(run.summary, {"arms": {"fp32": {}, "fp16": {}}})
    assert run.arm_names() == ["fp32", "fp16", "bf16"]


def test_default_run_dir_is_safe_and_never_an_existing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260102-030405")
    first = default_run_dir("train", "org/model name")
    assert first == Path("runs/train-org-model-name-20260102-030405")
    first.mkdir(parents=True)
    assert default_run_dir("train", "org/model name") == Path("runs/train-org-model-name-20260102-030405-2")


def test_non_finite_numbers_are_written_as_null_at_any_depth(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"x": math.nan, "deep": [{"y": -math.inf}, (1.5, math.inf)]})
    assert read_json(tmp_path / "a.json") == {"x": None, "deep": [{"y": None}, [1.5, None]]}


def test_a_lone_surrogate_does_not_stop_a_write(tmp_path: Path) -> None:
    append_jsonl(tmp_path / "r.jsonl", {"completion": "a\ud800b"})
    assert read_jsonl(tmp_path / "r.jsonl") == [{"completion": "a?b"}]


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_full_disk_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"old": 1})
    monkeypatch.setattr(failing, no_space)
    with pytest.raises(RunError, match=r"disk is full.*intact.*--resume"):
        write_json_atomic(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_failed_append_is_an_error_and_leaves_the_rows_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1})
    monkeypatch.setattr("os.write", no_space)
    with pytest.raises(RunError, match="disk is full"):
        append_jsonl(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n'


def test_a_short_append_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "metrics.jsonl", os.write
    append_jsonl(path, {"step": 1})

    def short_then_full(fd: int, data: bytes) -> int:
        """Write five more bytes, then fail as on a full disk."""
        if not data.startswith(b"{"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[:5])

    monkeypatch.setattr("os.write", short_then_full)
    with pytest.raises(RunError, match="disk is full"):
        append_jsonl(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n'


def test_other_write_errors_name_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"could not be written \(No such file"):
        append_jsonl(tmp_path / "absent" / "metrics.jsonl", {"step": 1})


def test_a_torn_last_line_is_dropped_and_the_next_append_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "x"')
    assert read_jsonl(path) == [{"step": 1}]
    append_jsonl(path, {"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_whole_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "perfectible.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    append_jsonl(path, {"step": 3})
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3]


@pytest.mark.parametrize("bad", ["{oops", "[1]", '"text"'])
def test_a_bad_line_before_the_end_is_named_by_its_number(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match="line 2, is not a JSON object"):
        read_jsonl(path)


def test_a_missing_jsonl_has_no_rows(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_truncation_keeps_steps_up_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3, 4):
        append_jsonl(path, {"step": step, "x": step / 3})
    before = path.read_bytes().splitlines(keepends=True)
    truncate_jsonl(path, 2)
    # Byte for byte: a resumed run's file is compared with an uninterrupted one's.
    assert path.read_bytes() == b"".join(before[:2])
    truncate_jsonl(path, lambda row: row["step"] == 2)
    assert [row["step"] for row in read_jsonl(path)] == [2]
    truncate_jsonl(tmp_path / "absent.jsonl", 2)


def test_truncation_on_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        append_jsonl(path, {"step": step})
    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(RunError, match="disk is full"):
        truncate_jsonl(path, 1)
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]


def test_damaged_json_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("[]")
    for name, reason in (("a.json", "cannot be read"), ("b.json", "holds a list"), ("c.json", "cannot be read")):
        with pytest.raises(InputError, match=reason):
            read_json(tmp_path / name)


def test_written_files_are_readable_by_others_as_the_umask_says(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        write_json_atomic(tmp_path / "a.json", {})
    finally:
        os.umask(umask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_run_dir_and_everything_that_shows_a_run_import_no_torch() -> None:
    names = ("environment", "run_dir", "metrics.metric", "metrics.console", "report.page")
    modules = ", ".join(f"betterhalf.{name}" for name in names)
    code = f"import sys, {modules}; betterhalf.environment.environment(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
