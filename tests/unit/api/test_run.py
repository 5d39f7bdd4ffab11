"""`Run` reads a folder as it is, finished or not, and a notebook shows it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import betterhalf
from betterhalf.api.rows import Rows
from betterhalf.config.load import configuration_of, resolved_json
from betterhalf.errors import ConfigError, InputError, MissingExtraError
from betterhalf.run_dir import RunDir, append_jsonl, write_json_atomic


def write_run(path: Path, *, steps: int = 2) -> RunDir:
    path.mkdir(parents=True, exist_ok=True)
    run = RunDir(path)
    write_json_atomic(run.config, resolved_json(configuration_of({"seed": 7, "name": "mine"})))
    write_json_atomic(run.environment, {})
    for step in range(1, steps + 1):
        append_jsonl(run.metrics, {"step": step, "rollout/reward/mean": step / 4, "mismatch/k3/mean": 1e-6})
    append_jsonl(run.rollouts, {"step": 1, "completion": "<b>4</b>", "reward": 1.0})
    return run


def test_a_run_gives_what_its_files_hold(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    write_json_atomic(folder.summary, {"verb": "train", "steps": 2, "last_reward": 0.5})
    write_json_atomic(folder.contract, {"ok": True})
    run = betterhalf.load_run(tmp_path / "r")
    assert (run.config.seed, run.config.name) == (7, "mine")
    assert run.summary == run.result == {"verb": "train", "steps": 2, "last_reward": 0.5}
    assert run.metrics.column("rollout/reward/mean") == [0.25, 0.5]
    assert [row["completion"] for row in run.rollouts()] == ["<b>4</b>"]
    assert (run.contract, run.passed, run.arms) == ({"ok": True}, None, {})
    assert run.path == (tmp_path / "r").absolute()
    assert repr(run) == f"Run({str(tmp_path / 'r')!r})"


def test_a_run_in_progress_is_read_again_at_every_look(tmp_path: Path) -> None:
    folder = write_run(tmp_path, steps=1)
    run = betterhalf.load_run(tmp_path)
    assert (run.summary, len(run.metrics)) == ({}, 1)
    append_jsonl(folder.metrics, {"step": 2})
    assert len(run.metrics) == 2
    assert "unfinished" in run._repr_html_()


def test_a_sanity_run_has_its_arms_and_their_verdicts(tmp_path: Path) -> None:
    for name, passed in (("fp16", True), ("bf16", False)):
        arm = write_run(tmp_path / "arms" / name)
        write_json_atomic(arm.summary, {"verb": "train", "passed": passed})
    write_json_atomic(RunDir(tmp_path).summary, {"verb": "sanity", "passed": True, "arms": {"fp16": {}, "bf16": {}}})
    run = betterhalf.load_run(tmp_path)
    assert {name: arm.passed for name, arm in run.arms.items()} == {"fp16": True, "bf16": False}
    assert list(run.arms) == ["fp16", "bf16"]
    assert (run.passed, run.metrics) == (True, [])


@pytest.mark.parametrize("file", ["doctor.json", "probe.json"])
def test_a_study_has_its_whole_result(file: str, tmp_path: Path) -> None:
    write_json_atomic(tmp_path / file, {"verb": file.removesuffix(".json"), "passed": True, "pairs": [1]})
    run = betterhalf.load_run(tmp_path)
    assert (run.result["pairs"], run.passed, run.summary) == ([1], True, {})


def test_a_notebook_gets_a_table_and_figures_apart_from_its_own_style(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    write_json_atomic(folder.summary, {"verb": "train", "name": "<script>", "seconds": 1.5})
    html = betterhalf.load_run(tmp_path)._repr_html_()
    assert "<tr><th>name</th><td>&lt;script&gt;</td></tr>" in html
    assert "<tr><th>seconds</th><td>1.5</td></tr>" in html
    assert html.count("<iframe sandbox srcdoc=") == 1
    assert "<style" not in html and "<svg" not in html  # both are inside the frame, escaped
    assert "Mismatch k3" in html and "Reward" in html


def test_the_report_is_written_into_the_folder(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = betterhalf.load_run(tmp_path).report()
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        betterhalf.load_run(tmp_path / "nothing")
    with pytest.raises(InputError, match="is not a run folder"):
        betterhalf.load_run(tmp_path)


def test_a_run_without_a_configuration_says_so(tmp_path: Path) -> None:
    append_jsonl(RunDir(tmp_path).metrics, {"step": 1})
    with pytest.raises(ConfigError, match="has lost its config.json"):
        _ = betterhalf.load_run(tmp_path).config


def test_a_column_that_no_row_has_names_the_others() -> None:
    rows = Rows([{"a": 1}, {"b": 2}])
    assert rows.column("a") == [1, None]
    assert Rows().column("a") == []
    with pytest.raises(InputError, match="no row has 'c'. The names are a, b."):
        rows.column("c")


def test_a_frame_has_the_rows(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = Rows([{"a": 1}, {"a": 2}]).frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["a"].tolist() == [1, 2]


def test_a_frame_without_pandas_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match="betterhalf\\[notebook\\]"):
        Rows([{"a": 1}]).frame()
