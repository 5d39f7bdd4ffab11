"""The page: self-contained, complete, safe, and explicit about missing data."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.unit.report.conftest import COLLAPSE, collapse_summary, config, fill_run, metrics_row

from betterhalf.errors import InputError, RunError
from betterhalf.report import experts, staleness
from betterhalf.report.data import load
from betterhalf.report.drawing import drawings_of
from betterhalf.report.figures import FIGURES
from betterhalf.report.library import unpacked
from betterhalf.report.page import render, write_report
from betterhalf.report.timing import phase_seconds
from betterhalf.report.tokens import sample_evenly, token_pairs
from betterhalf.run_dir import RunDir, append_jsonl, read_jsonl, write_json_atomic

MakeRun = Callable[..., RunDir]


class Outline(HTMLParser):
    """Tags, ids, attributes and text of a page; fails on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script", "noscript"} & set(self.open):
            self.text += f" {data}"


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    parser.text = " ".join(parser.text.split())
    return parser


def report(*runs: RunDir) -> Outline:
    return outline(render(load(runs)))


def test_a_sanity_page_has_verdict_figures_contract_differences_and_samples(make_sanity: MakeRun) -> None:
    page = report(make_sanity())
    for expected in (
        "fp16 0.973 \u2713 passed 0.971 \u2713 learned 5.02e-08 1.19e-03 1 85",
        "bf16 0.969 \u2713 passed 0.966 \u2713 learned 4.00e-06 1.33e-02 0 87",
        "k3 ratio BF16 / FP16: 80.",
        "kv bf16 bf16 equal",
        "attention sdpa native reported",
        "setting fp16 bf16 precision.preset fp16 bf16",
        "model demo \u00b7 task arithmetic \u00b7 algorithm grpo",
        "Example CPU @ 2.5GHz \u00b7 2 cores",
        "commit 0123456789 with uncommitted changes",
        "fp16, step 65, reward",
        "fp16 65 steps",
    ):
        assert expected in page.text
    titles = [spec.title for spec in FIGURES if not spec.only_if_recorded] + [
        "Time of a step",
        "Token probabilities",
        "Token gap",
    ]
    assert all(title in page.text for title in titles)
    assert "Not recorded" not in page.text


def scripts_of(page: str) -> list[tuple[str, str]]:
    """Return attributes and text of each script."""
    return re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)


def test_the_page_loads_nothing_runs_its_own_script_alone_and_has_unique_ids(
    make_sanity: MakeRun, tmp_path: Path
) -> None:
    path = write_report([make_sanity()], tmp_path / "out" / "report.html")
    text = path.read_text()
    page = outline(text)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not [pair for pair in page.attributes if pair[0] in ("src", "href", "onload", "onclick")]
    (script,) = [content for attributes, content in scripts_of(text) if attributes == ""]
    (library,) = [unpacked(content) for attributes, content in scripts_of(text) if "id=library" in attributes]
    hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in (script, library)]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}\"" in text
    assert not re.search(r"https?://|@import|url\(", text)
    assert len(page.ids) == len(set(page.ids))
    assert "prefers-color-scheme:dark" in text
    assert "width=device-width" in text


def test_a_page_without_figures_has_no_script(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", resume=False)
    write_json_atomic(run.environment, {})
    write_json_atomic(run.config, {"training": {"steps": 65}})
    assert "<script" not in render(load([run]))
    assert len(render(load([run]))) < 50_000


def test_every_figure_names_a_title_and_a_description_that_exist(make_sanity: MakeRun) -> None:
    page = report(make_sanity())
    named = [value.split() for name, value in page.attributes if name == "aria-labelledby"]
    assert len(named) == page.tags.count("figure") == 22
    assert all(identifier in page.ids for pair in named for identifier in pair)


def long_run(path: Path, arms: tuple[str, ...], steps: int) -> RunDir:
    """Write a run of many steps, with one accident in the first arm."""
    run = RunDir.create(path, resume=False)
    for name in arms:
        arm, rng = RunDir.create(run.arm(name).path, resume=False), random.Random(name)
        rows = [metrics_row(step, name, rng) | {"mismatch/accident_fraction": 0.0} for step in range(1, steps + 1)]
        if name == arms[0]:
            rows[steps // 3]["mismatch/accident_fraction"] = 0.0625
        arm.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        write_json_atomic(arm.config, config(name, steps))
    return run


def test_a_page_of_long_runs_is_small_fast_and_keeps_a_lone_accident(tmp_path: Path) -> None:
    run = long_run(tmp_path / "long", ("fp16", "bf16", "fp32", "e8m2"), 5000)
    begun = time.process_time()
    page = render(load([run]))
    assert time.process_time() - begun < 5.0
    assert len(page.encode()) < 2_000_000
    (accidents,) = [drawing for drawing in drawings_of(page) if drawing.key == "accidents"]
    values = [y for part in accidents.tables["values"] for y in part["y"]]
    assert max(values) == 0.0625
    assert len(values) < 3000


def test_a_page_with_every_figure_of_four_long_arms_and_long_completions_is_small(tmp_path: Path) -> None:
    rng, folders = random.Random(0), []
    recorded = [metric for spec in (*FIGURES, *experts.FIGURES, *staleness.FIGURES) for metric in spec.metrics]
    own = [f"{kind}{index}{end}" for kind, end in (("task/r", "/mean"), ("loss/l", "")) for index in range(24)]
    for arm in ("a", "b", "c", "d"):
        run = RunDir.create(tmp_path / arm, resume=False)
        rows = [{"step": step, **{name: rng.random() for name in [*recorded, *own]}} for step in range(1, 501)]
        run.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        tokens = [f" token{rng.randrange(10**5)}" for _ in range(4096)]
        for reward in (0.0, 1.0):
            logprobs = {
                side: [-rng.expovariate(3) for _ in tokens] for side in ("trainer_logprobs", "behavior_logprobs")
            }
            row = {"step": 500, "prompt": "".join(tokens), "completion": "".join(tokens), "reward": reward}
            append_jsonl(run.rollouts, row | {"tokens": tokens} | logprobs)
        folders.append(run)
    page = render(load(folders))
    assert page.count("<figure") > len(FIGURES) + len(experts.FIGURES) + len(staleness.FIGURES) + 48
    assert len(page.encode()) < 2_000_000


def test_figures_are_files_too(make_sanity: MakeRun, tmp_path: Path) -> None:
    write_report([make_sanity(steps=20)], tmp_path / "report.html", tmp_path / "figures")
    svg = (tmp_path / "figures" / "k3.svg").read_text()
    assert all(word in svg for word in ("Mismatch k3", "fp16", "bf16", "step", "healthy: at most 0.001"))
    assert "var(--" not in svg
    assert (tmp_path / "figures" / "k3.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    keys = re.findall(r'<figure id="([^"]+)"', page)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(
        f"{key}.{kind}" for key in keys for kind in ("svg", "png")
    )


def test_a_folder_for_figures_that_cannot_be_made_is_bad_input(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--figures DIR"):
        write_report([make_run(steps=3)], tmp_path / "report.html", tmp_path / "file" / "figures")


def test_the_distance_to_a_reference_policy_is_drawn_where_there_is_one(make_run: MakeRun) -> None:
    run = make_run("run", "fp16", steps=20)
    assert "Distance to the reference policy" not in report(run).text
    rows = [row | {"policy/reference_kl/mean": 0.001 * row["step"]} for row in read_jsonl(run.metrics)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Distance to the reference policy" in report(run).text


def test_several_runs_are_overlaid_under_letters(make_run: MakeRun) -> None:
    page = report(make_run("first-long-name", "fp16", steps=20), make_run("second-long-name", "bf16", steps=10))
    assert "A first-long-name 20 steps B second-long-name 10 steps" in page.text
    assert "training.steps 20 10" in page.text


def test_arms_of_several_sanity_runs_keep_their_run_in_the_name(make_sanity: MakeRun) -> None:
    page = report(make_sanity("one", steps=3), make_sanity("two", steps=3))
    assert "A one / fp16" in page.text
    assert "D two / bf16" in page.text


def test_a_page_of_seven_arms_begins_with_the_reward_of_each_by_name(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "collapse", resume=False)
    for index, name in enumerate(COLLAPSE):
        fill_run(run.arm(name).path, "e8m2" if name == "e8m2" else "bf16", steps=40, seed=index)
    write_json_atomic(run.summary, collapse_summary() | {"pass_accuracy": 0.9})
    text = render(load([run]))
    page = outline(text)
    first = text[text.index("<figure") : text.index("</figure>")]
    assert first.startswith('<figure id="reward" class=wide>')
    ends = drawings_of(text)[0].tables["ends"]
    assert {(end["a"], end["text"]) for end in ends} == set(enumerate(COLLAPSE))
    assert "e8m2_aligned precision.preset=e8m2 (emulated), engine.rounding=aligned" in page.text
    assert "e8m2 0.000 \u2717 failed 0.000 \u2717 collapsed 2.50e-01" in page.text
    assert page.text.count("e8m2 is emulated: BF16 arithmetic on a CPU") == 1
    assert "test: passed from a final accuracy of 0.9 on (sanity.pass_accuracy)." in page.text
    keys = re.findall(r'<figure id="([^"]+)"', text)
    assert keys[:5] == ["reward", "k3", "accidents", "ratio", "token-share"]


def test_a_run_that_stopped_before_its_first_step_says_so(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", resume=False)
    write_json_atomic(run.environment, {})
    write_json_atomic(run.config, {"training": {"steps": 65}})
    page = report(run)
    assert "No step is recorded yet" in page.text
    assert "no step of 65 recorded" in page.text
    assert "No summary" in page.text


def test_a_run_that_stopped_early_shows_what_it_has(make_run: MakeRun) -> None:
    run = make_run(steps=65)
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    run.metrics.write_bytes(b"".join(lines[:30]) + lines[30][:40])
    page = report(run)
    assert "stopped after 30 of 65 steps" in page.text
    assert page.tags.count("figure") == 22


def test_metrics_that_were_not_recorded_are_listed(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", resume=False)
    for step in (1, 2):
        append_jsonl(run.metrics, {"step": step, "rollout/reward/mean": 0.5, "mismatch/k3/mean": math.nan})
    page = report(run)
    assert page.tags.count("figure") == 1
    assert "Not recorded: Mismatch k3, Accidents of rounding" in page.text


def test_text_of_models_and_names_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    run = RunDir.create(tmp_path / "a&b<i>", resume=False)
    write_json_atomic(run.config, {"model": {"name": evil}, evil: evil})
    write_json_atomic(run.contract, {"rows": [dict.fromkeys(("region", "trainer", "engine", "status"), evil)]})
    write_json_atomic(run.summary, {"passed": True, "arms": {evil: {"passed": True}}})
    write_json_atomic(run.environment, {"cpu": evil, "gpus": [evil]})
    append_jsonl(run.metrics, {"step": 1, "rollout/reward/mean": 0.5, "optim/skipped": 1.0, "optim/loss_scale": 2.0})
    row = {"step": 1, "prompt": evil, "completion": evil, "reward": 1.0, "tokens": [evil]}
    append_jsonl(run.rollouts, row | {"trainer_logprobs": [-0.1], "behavior_logprobs": [-0.2]})
    text = render(load([run]))
    page = outline(text)
    assert not {"img", "i"} & set(page.tags)
    assert "onerror" not in dict(page.attributes)
    assert "<script>alert(1)</script>" in page.text
    assert [
        content for attributes, content in scripts_of(text) if "alert" in content and "json" not in attributes
    ] == []


_OTHER_SHAPES = {
    "environment": [{"packages": [1], "git": "x", "gpus": 3, "cluster": 7}]
    + [{"cluster": {"backend": "ray", "hosts": hosts, "ranks": "x"}} for hosts in ([], {"a": 1})],
    "summary": [{"arms": arms} for arms in ([1], 7, "x", {"fp16": 1}, {"fp16": {"changes": [1]}})],
    "contract": [{"rows": rows} for rows in (7, {"a": 1}, [1])],
}


@pytest.mark.parametrize("name", _OTHER_SHAPES)
def test_records_of_another_shape_still_give_a_page(name: str, make_sanity: Callable[..., RunDir]) -> None:
    run = make_sanity(steps=3)
    for content in _OTHER_SHAPES[name]:
        for folder in (run, run.arm("fp16")):
            write_json_atomic(getattr(folder, name), content)
        assert "figure" in report(run).tags


def test_a_task_s_own_rewards_have_a_figure_each_and_its_failures_one(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", resume=False)
    for step in (1, 2):
        own = {"task/score/mean": 0.5 * step, "task/score/ends/mean": 0.2, "task/<b>/mean": 1.0, "task/score/std": 0.1}
        run.append_metrics({"step": step, "rollout/reward/mean": 0.5, "task/errors": 0.0, **own})
    page = render(load([run]))
    assert "Reward score</" in page and "Reward score/ends</" in page
    assert "<b>" not in page and "Failed rewards" not in page
    run.append_metrics({"step": 3, "rollout/reward/mean": 0.5, "task/errors": 4.0})
    assert "Failed rewards" in render(load([run]))


def test_a_single_reward_that_is_the_run_s_has_no_second_figure(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", resume=False)
    for step in (1, 2):
        own = {"task/reward/mean": 0.5 * step, "task/half/mean": 0.25 * step}
        run.append_metrics({"step": step, "rollout/reward/mean": 0.5 * step, "task/errors": 0.0, **own})
    page = render(load([run]))
    assert "Reward half</" in page and "Reward reward</" not in page


def test_metrics_of_a_loss_have_a_figure_each(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", resume=False)
    for step in (1, 2):
        run.append_metrics({"step": step, "rollout/reward/mean": 0.5, "loss/clipped": 0.1 * step, "loss/<b>": 1.0})
    page = render(load([run]))
    assert "Loss: clipped (mean over tokens)</" in page and "<b>" not in page
    assert "Loss: " not in page.replace("Loss: clipped", "")


def test_a_folder_that_is_not_a_run_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run folder"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_metrics_file_is_bad_input_with_its_line(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(steps=3)
    lines = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join([lines[0], "oops", lines[2]]) + "\n")
    with pytest.raises(InputError, match="line 2"):
        write_report([run], tmp_path / "report.html")


@pytest.mark.parametrize("step", ['"x"', "null", "1.5"])
def test_a_row_without_a_number_of_its_step_is_bad_input(make_run: MakeRun, tmp_path: Path, step: str) -> None:
    run = make_run(steps=3)
    run.metrics.write_text(run.metrics.read_text() + f'{{"step": {step}}}\n')
    with pytest.raises(InputError, match=r"has a row with step .*, not a number. Repair or delete"):
        write_report([run], tmp_path / "report.html")


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report.html"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = make_run(steps=2)
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RunError, match="disk is full"):
        write_report([run], out)
    assert out.read_text() == "old"


def test_a_train_run_shows_its_summary_as_a_table(make_run: MakeRun) -> None:
    run = make_run(steps=2)
    write_json_atomic(run.summary, {"verb": "train", "last_reward": 0.8125, "precision": {"kv_dtype": "fp16"}})
    text = report(run).text
    assert "last_reward 0.8125" in text
    assert "precision.kv_dtype fp16" in text


def test_a_run_on_a_cluster_shows_its_processes_and_hosts(make_run: MakeRun) -> None:
    run = make_run("spread")
    alone = report(run).text
    assert "cluster.trainers" not in alone and "ranks" not in alone
    config = json.loads(run.config.read_text())
    write_json_atomic(run.config, config | {"cluster": {"backend": "ray", "trainers": 2, "engines": 1}})
    record = {"backend": "ray", "ray": "2.60.0", "address": None, "ranks": 2, "engines": 1, "placement": "separate"}
    hosts = {"first": ["engine 0", "rank 0"], "second": ["rank 1"]}
    environment = json.loads(run.environment.read_text()) if run.environment.exists() else {}
    write_json_atomic(run.environment, environment | {"cluster": record | {"hosts": hosts}})
    text = report(run).text
    words = "2 ranks and 1 engine (separate) on a Ray of its own, ray 2.60.0 (first: engine 0, rank 0; second: rank 1)"
    assert words in text
    assert re.search(r"cluster\.backend\s+ray\s+cluster\.trainers\s+2\s+cluster\.engines\s+1", text)


def test_phases_add_up_to_the_step() -> None:
    row: dict[str, Any] = {"time/step_seconds": 2.0, "time/generate_seconds": 0.5, "time/train_seconds": 1.0}
    arm = type("FakeArm", (), {"finite": lambda _, name: [row[name]] if name in row else []})()
    seconds = phase_seconds(arm)
    assert seconds == {"generate": 0.5, "reward": 0, "measure": 0, "train": 1.0, "sync": 0, "other": 0.5}


def test_token_pairs_are_probabilities_of_tokens_scored_on_both_sides(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", resume=False)
    half, quarter = math.log(0.5), math.log(0.25)
    append_jsonl(run.rollouts, {"step": 1, "trainer_logprobs": [half, None], "behavior_logprobs": [quarter, half]})
    append_jsonl(run.rollouts, {"step": 1, "trainer_logprobs": None, "behavior_logprobs": [quarter]})
    pairs = list(token_pairs(load([run]).arms[0]))
    assert [(pair.mu, pair.pi) for pair in pairs] == [pytest.approx((0.25, 0.5))]
    assert len(sample_evenly(pairs * 2500, 1000)) == 834


def test_tokens_are_shaded_by_their_gap_only_when_they_are_text(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", resume=False)
    columns = {"trainer_logprobs": [-0.5, -0.5], "behavior_logprobs": [-0.5, -0.6]}
    base = {"step": 1, "prompt": "p", "completion": "ab", "reward": 1.0, **columns}
    append_jsonl(run.rollouts, base | {"tokens": ["a", "b"]})
    shaded = render(load([run]))
    assert '<span class="t0" title="mu 0.606531, pi 0.606531">a</span>' in shaded
    assert '<span class="t4" title="mu 0.548812, pi 0.606531">b</span>' in shaded
    run.rollouts.unlink()
    append_jsonl(run.rollouts, base | {"tokens": [17, 18]})
    assert '<span class="prompt">p</span>ab</pre>' in render(load([run]))


def test_the_middle_of_a_long_completion_is_left_out_and_counted(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", resume=False)
    tokens = [f"<{index}>" for index in range(1000)]
    row = {"step": 1, "prompt": "p" * 7000, "completion": "".join(tokens), "reward": 1.0, "tokens": tokens}
    append_jsonl(run.rollouts, row | {"trainer_logprobs": [-0.5] * 1000, "behavior_logprobs": [-0.5] * 1000})
    page = render(load([run]))
    assert "[600 tokens left out]" in page and "[3000 letters left out]" in page
    assert all(f"&lt;{index}&gt;</span>" in page for index in (0, 199, 800, 999))
    assert not any(f"&lt;{index}&gt;</span>" in page for index in (200, 799))


def test_observations_stand_where_they_were_made_and_are_marked_as_context(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", resume=False)
    row = {"step": 1, "prompt": "p", "completion": "a<o>b", "reward": 1.0, "tokens": ["a", "b"]}
    columns = {"trainer_logprobs": [-0.5, -0.5], "behavior_logprobs": [-0.5, -0.5]}
    append_jsonl(run.rollouts, row | columns | {"observations": [{"before": 1, "text": "<o>", "token_ids": [7]}]})
    page = render(load([run]))
    token = '<span class="t0" title="mu 0.606531, pi 0.606531">{}</span>'
    observation = '<span class="prompt" title="observation">&lt;o&gt;</span>'
    assert token.format("a") + observation + token.format("b") in page
