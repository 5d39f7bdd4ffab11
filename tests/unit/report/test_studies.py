"""Pages of probe and doctor folders: complete, safe, and valid with incomplete data."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.report.studies import doctor_json, fill_study, probe_json
from tests.unit.report.test_page import Outline, outline

from betterhalf.report.data import load
from betterhalf.report.page import render
from betterhalf.run_dir import RunDir

Tree = dict[str, Any]
Path_ = tuple[str | int, ...]


def page_of(tmp_path: Path, file: str, result: Tree, name: str = "study") -> Outline:
    return outline(render(load([fill_study(tmp_path / name, file, result)])))


def test_a_probe_page_gives_the_reason_for_having_no_interval(tmp_path: Path) -> None:
    result = probe_json()
    none = {"value": -0.5, "low": None, "high": None, "reason": "64 completions are too few"}
    for pair in result["pairs"]:
        if "metrics" in pair:
            pair["metrics"]["sequence_log_ratio/p1"] = none
    page = page_of(tmp_path, "probe.json", result)
    assert "sequence_log_ratio/p1 -0.5 (1)" in page.text
    assert page.text.count("(1) no interval: 64 completions are too few") == 1


def test_a_probe_page_has_matrix_ratio_figures_and_tables(tmp_path: Path) -> None:
    page = page_of(tmp_path, "probe.json", probe_json())
    for expected in (
        "smollm2 \u00b7 native engine \u00b7 64 completions \u00b7 up to 128 tokens each",
        "k3 of the BF16 pair is 64 times that of the FP16 pair",
        "4.50e-06 3.6e-06 to 5.6e-06",
        "Token probabilities, bf16",
        "Log-ratio against length",
        "fp16 65536 0.90% 0.999960 0.00% no",
        "bf16 47.00%",
        "first differ by more than rounding at layer 3, mlp.down_proj (difference 0.0123, bound 0.0021)",
        "prefill against decode: no difference beyond rounding",
        "generate, bf16 31.5",
        "usable length, tokens fp16 / fp16 9e-06 0.07 0.9991 0.9992 77,016",
    ):
        assert expected in page.text
    assert page.tags.count("figure") == 10
    assert "No contract" not in page.text
    assert "Verdict" not in page.text


def test_a_doctor_page_has_cards_config_census_and_islands(tmp_path: Path) -> None:
    page = page_of(tmp_path, "doctor.json", doctor_json(unsafe=True))
    for expected in (
        "fp16 \u2717 unsafe 1 forward value is not finite Modules: model.layers.3.mlp.down_proj",
        "bf16 ! watch",
        'name = "smollm2" [precision] preset = "fp16"',
        "\u2713 Engine and trainer agree.",
        "Entries that are not finite, drawn below the limit: 1.",
        "model.layers.3.mlp.down_proj forward - none",
        "Scales of 1 to 2\u00b9\u2078 keep every gradient finite; the run starts at 2\u00b9\u2076.",
        "FP32 for model.layers.3.mlp.down_proj : \u2713 solves the problem",
    ):
        assert expected in page.text


def test_folders_of_all_kinds_share_a_page(tmp_path: Path, make_run: Callable[..., RunDir]) -> None:
    runs = [make_run("run-a", steps=3), make_run("run-b", "bf16", steps=3)]
    probes = [fill_study(tmp_path / name, "probe.json", probe_json(("fp16", "bf16"))) for name in ("p1", "p2")]
    doctor = fill_study(tmp_path / "d1", "doctor.json", doctor_json())
    page = outline(render(load([runs[0], probes[0], doctor, runs[1], probes[1]])))
    titles = ("Precision check: d1", "Mismatch: p1", "Mismatch: p2", "run-a 3 steps", "run-b 3 steps")
    assert [title for title in titles if title not in page.text] == []
    assert len(page.ids) == len(set(page.ids))
    references = {one for name, value in page.attributes if name == "aria-labelledby" for one in value.split()}
    assert references <= set(page.ids)


@pytest.mark.parametrize("file", ["probe.json", "doctor.json"])
def test_headings_never_skip_a_level(tmp_path: Path, file: str) -> None:
    page = page_of(tmp_path, file, probe_json() if file == "probe.json" else doctor_json())
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


@pytest.mark.parametrize(("file", "missing"), [("probe.json", "No pair"), ("doctor.json", "No verdict")])
def test_an_empty_result_says_what_is_missing(tmp_path: Path, file: str, missing: str) -> None:
    assert missing in page_of(tmp_path, file, {}).text


@pytest.mark.parametrize("file", ["probe.json", "doctor.json"])
def test_a_damaged_result_is_reported_on_the_page(tmp_path: Path, file: str) -> None:
    run = fill_study(tmp_path / "study", file, {})
    (run.path / file).write_text('{"pairs": [{"train"')
    page = outline(render(load([run])))
    assert "cannot be read" in page.text


def test_pairs_that_failed_leave_the_others(tmp_path: Path) -> None:
    result = probe_json(("fp16", "bf16"))
    result["pairs"][3] = {"train": "bf16", "rollout": "bf16", "error": "the engine refuses <bf16>"}
    result["bf16_over_fp16"] = None
    page = page_of(tmp_path, "probe.json", result)
    assert "bf16: the engine refuses <bf16>" in page.text
    assert "could not be computed" in page.text
    assert "Token probabilities, fp16" in page.text
    assert "Token probabilities, bf16" not in page.text


def test_a_wrong_engine_is_called_wrong(tmp_path: Path) -> None:
    result = doctor_json() | {"engine_agrees": {"agrees": False, "reason": "k3 of the FP32 pair is 0.2"}}
    assert "differ by more than rounding explains: k3 of" in page_of(tmp_path, "doctor.json", result).text


def paths_of(tree: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every path in a tree; of each list, only the first element."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ()
    for key, child in items:
        yield from paths_of(child, (*path, key))


def put(tree: Tree, path: Path_, value: object) -> Tree:
    """A copy of `tree` with `value` at `path`."""
    changed = copy.deepcopy(tree)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


def small(tree: Any) -> Any:
    """The tree with shortened lists, for speed."""
    if isinstance(tree, dict):
        return {key: small(child) for key, child in tree.items()}
    return [small(child) for child in tree[:2]] if isinstance(tree, list) else tree


_WRONG = ("<b>oops</b>", {}, [None], -1e308)


@pytest.mark.parametrize("wrong", [(None,), _WRONG], ids=["null", "wrong"])
@pytest.mark.parametrize("file", ["probe.json", "doctor.json"])
def test_no_wrong_value_anywhere_breaks_the_page(tmp_path: Path, file: str, wrong: tuple[object, ...]) -> None:
    """Replace each place of the file in turn by one of the values, which alternate."""
    whole = small(probe_json(("fp16",)) if file == "probe.json" else doctor_json(unsafe=True))
    run = fill_study(tmp_path / "study", file, whole)
    for path, value in zip(list(paths_of(whole))[1:], itertools.cycle(wrong), strict=False):
        (run.path / file).write_text(json.dumps(put(whole, path, value)))
        assert "<b>oops</b>" not in render(load([run])), path
