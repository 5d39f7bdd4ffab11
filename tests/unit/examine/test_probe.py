"""Pairs of the demo model: sampling, scoring, recording, and failures of single parts."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from betterhalf.config.schema import RunConfig
from betterhalf.errors import EngineDiedError, EngineError, InputError, MissingExtraError, NumericsError, RunError
from betterhalf.examine import pairs as pairs_module
from betterhalf.examine.pairs import measure_pairs
from betterhalf.examine.probe import probe, probe_json, wanted_pairs
from betterhalf.examine.probe_record import ratio_of
from betterhalf.examine.scoring import score_completions
from betterhalf.examine.subject import Subject, engine_in, open_subject, sample_groups_of, trainer_in
from betterhalf.run_dir import RunDir, read_json, read_jsonl
from betterhalf.training.pack import pack_step
from betterhalf.types import DtypeName, Rollout

SMALL: dict[str, Any] = {
    "sampling": {"max_tokens": 24},
    "probe": {"prompts": 2, "group_size": 2, "bootstrap": 20},
    "logging": {"console": "quiet"},
    "training": {"tokens_per_micro_batch": 64},
}


def config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate(SMALL | changes)


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    with open_subject("demo", config()) as opened:
        yield opened


def fail_in(monkeypatch: pytest.MonkeyPatch, name: str, dtypes: Sequence[str], error: Exception) -> list[str]:
    """Make the engines or trainers of some dtypes fail; return a list that collects the dtypes that were tried."""
    real = getattr(pairs_module, name)
    tried: list[str] = []

    def failing(subject: Subject, dtype: DtypeName) -> Any:
        tried.append(dtype)
        if dtype in dtypes:
            raise error
        return real(subject, dtype)

    monkeypatch.setattr(pairs_module, name, failing)
    return tried


def test_pairs_are_named_in_the_order_of_rows_and_columns() -> None:
    assert len(wanted_pairs(config())) == 9
    assert wanted_pairs(config(precision={"pairs": "matched"})) == [
        ("fp16", "fp16"),
        ("bf16", "bf16"),
        ("fp32", "fp32"),
    ]
    some = config(precision={"pairs": ["fp32/bf16", "fp16/fp16", "fp32/bf16"]})
    assert wanted_pairs(some) == [("fp32", "bf16"), ("fp16", "fp16")]


@pytest.mark.parametrize(("selection", "count"), [("full", 10), ("matched", 4)])
@pytest.mark.parametrize("trainer", ["e8m2", "fp32"])
def test_the_configured_pair_is_measured_if_it_is_emulated(selection: str, count: int, trainer: str) -> None:
    found = wanted_pairs(config(precision={"preset": "e8m2", "compute_dtype": trainer, "pairs": selection}))
    assert len(found) == count and found[-1] == (trainer, "e8m2")


def test_the_ratio_needs_both_matched_pairs_and_a_mismatch_in_fp16() -> None:
    fp16, bf16 = {"train": "fp16", "rollout": "fp16", "k3": 2e-8}, {"train": "bf16", "rollout": "bf16", "k3": 1e-6}
    crossed = {"train": "fp16", "rollout": "bf16", "k3": 9e-3}
    assert ratio_of([fp16, bf16, crossed]) == pytest.approx(50)
    assert ratio_of([fp16, crossed]) is None
    assert ratio_of([fp16 | {"k3": 0.0}, bf16]) is None
    assert ratio_of([{"train": "fp16", "rollout": "fp16", "error": "overflow"}, bf16]) is None


def test_scores_are_those_of_the_packs_that_train(subject: Subject) -> None:
    prompts = subject.prompts(2)
    with engine_in(subject, "fp16") as engine:
        siblings = sample_groups_of(subject, engine, prompts, 3)
    flat = [(prompt, completion) for prompt, group in zip(prompts, siblings, strict=True) for completion in group]
    trainer = trainer_in(subject, "fp16")
    scores = score_completions(trainer, [(prompt.token_ids, c) for prompt, c in flat], subject.config)
    rollouts = [Rollout(prompt=prompt, completion=c, text="", reward=0.0) for prompt, c in flat]
    packs = pack_step(rollouts, [1.0] * 6, subject.config, 0).packs
    expected = {}
    for pack in packs:
        logprobs = trainer.measure([pack])[0].logprobs_C
        for place, index in enumerate(pack.rollout_index_S):
            expected[index] = logprobs[pack.sequence_index_C == place]
    for index, row in enumerate(scores):
        assert len(row) == len(flat[index][1].token_ids)
        torch.testing.assert_close(torch.tensor(row), expected[index], rtol=1e-3, atol=1e-3)


def test_one_rollout_is_scored_by_every_trainer_and_kept(subject: Subject, tmp_path: Path) -> None:
    done: list[str] = []
    pairs: list[tuple[DtypeName, DtypeName]] = [("fp16", "fp32"), ("fp32", "fp32")]
    found = measure_pairs(
        subject, pairs, prompts=subject.prompts(2), group_size=2, run=RunDir(tmp_path), advance=done.append
    )
    assert [(report.train, report.rollout) for report in found] == pairs
    assert done == ["sampled in fp32", "fp16/fp32", "fp32/fp32"]
    assert found[1].k3 < 1e-12 < found[0].k3 < 1e-4
    assert [length for length, _ in found[0].completions] == [length for length, _ in found[1].completions]
    rows = read_jsonl(tmp_path / "rollouts-fp32.jsonl")
    assert [len(row["token_ids"]) for row in rows] == [length for length, _ in found[0].completions]
    assert not (tmp_path / "rollouts-fp16.jsonl").exists()


def test_an_engine_that_refuses_a_format_costs_only_its_pairs(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in(monkeypatch, "engine_in", ["bf16"], InputError("bf16 is not for this engine"))
    pairs: list[tuple[DtypeName, DtypeName]] = [("fp32", "bf16"), ("fp32", "fp32")]
    refused, good = measure_pairs(subject, pairs, prompts=subject.prompts(1), group_size=2)
    assert refused.error == "bf16 is not for this engine" and math.isnan(refused.k3)
    assert good.error is None and good.k3 < 1e-12


def test_when_nothing_can_be_sampled_the_reason_is_raised(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in(monkeypatch, "engine_in", ["fp16", "fp32"], InputError("unknown architecture"))
    pairs: list[tuple[DtypeName, DtypeName]] = [("fp16", "fp16"), ("fp32", "fp32")]
    with pytest.raises(InputError, match="unknown architecture"):
        measure_pairs(subject, pairs, prompts=subject.prompts(1), group_size=2)


def test_a_missing_package_ends_the_probe_at_once(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fail_in(monkeypatch, "engine_in", ["fp16"], MissingExtraError("install the extra"))
    with pytest.raises(MissingExtraError):
        measure_pairs(subject, [("fp16", "fp16"), ("fp32", "fp32")], prompts=subject.prompts(1), group_size=2)
    assert tried == ["fp16"]


def test_an_engine_is_restarted_once_after_a_crash(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tried = pairs_module.sample_groups_of, []

    def dying(*arguments: Any) -> Any:
        tried.append("sample")
        if len(tried) == 1:
            raise EngineDiedError("gone")
        return real(*arguments)

    monkeypatch.setattr(pairs_module, "sample_groups_of", dying)
    (report,) = measure_pairs(subject, [("fp32", "fp32")], prompts=subject.prompts(1), group_size=2)
    assert report.error is None and len(tried) == 2


def test_only_one_trainer_is_in_memory_at_a_time(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    trainers: list[weakref.ref[Any]] = []
    real = pairs_module.trainer_in

    def counted(subject: Subject, dtype: DtypeName) -> Any:
        alive.append(sum(trainer() is not None for trainer in trainers))
        trainer = real(subject, dtype)
        trainers.append(weakref.ref(trainer.module))
        return trainer

    monkeypatch.setattr(pairs_module, "trainer_in", counted)
    pairs: list[tuple[DtypeName, DtypeName]] = [("fp16", "fp32"), ("bf16", "fp32"), ("fp32", "fp32")]
    measure_pairs(subject, pairs, prompts=subject.prompts(1), group_size=2)
    assert alive == [0, 0, 0]


def test_a_pair_that_fails_loses_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in(monkeypatch, "trainer_in", ["fp16"], NumericsError("fp16 overflows. Use bf16."))
    run = tmp_path / "run"
    wanted = config(precision={"pairs": ["fp16/fp32", "fp32/fp32"]})
    with pytest.raises(RunError, match=r"could not be measured: fp16/fp32: fp16 overflows. Use bf16. Everything else"):
        probe("demo", wanted, str(run))
    found = read_json(run / "probe.json")
    assert found["pairs"][0].keys() == {"train", "rollout", "seconds", "error"}
    assert found["pairs"][1]["k3"] < 1e-12
    assert read_json(run / "summary.json")["failed"] == {"fp16/fp32": "fp16 overflows. Use bf16."}
    assert (run / "report.html").exists() and (run / "tokens.parquet").exists()


def test_bad_input_and_run_time_failures_end_with_their_own_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(precision={"pairs": ["fp32/fp16", "fp32/fp32"]})
    fail_in(monkeypatch, "engine_in", ["fp16"], InputError("refused"))
    with pytest.raises(InputError, match="fp32/fp16: refused"):
        probe("demo", wanted, str(tmp_path / "input"))
    monkeypatch.undo()
    fail_in(monkeypatch, "engine_in", ["fp16"], EngineError("broken"))
    with pytest.raises(RunError, match="fp32/fp16: broken") as caught:
        probe("demo", wanted, str(tmp_path / "run"))
    assert caught.value.exit_code == 3


def test_an_interruption_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = pairs_module.score_completions, []

    def interrupted(*arguments: Any) -> Any:
        calls.append("score")
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(pairs_module, "score_completions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe("demo", config(precision={"pairs": "matched"}), str(tmp_path / "run"))
    found = read_json(tmp_path / "run" / "probe.json")
    assert [(pair["train"], pair["rollout"]) for pair in found["pairs"]] == [("fp16", "fp16")]
    assert all((tmp_path / "run" / f"rollouts-{dtype}.jsonl").exists() for dtype in ("fp16", "bf16", "fp32"))
    assert not (tmp_path / "run" / "summary.json").exists()


def test_json_has_only_the_documented_keys() -> None:
    pair = dict.fromkeys(("train", "rollout", "k3", "k3_ci", "mean_abs", "max_abs", "sequence_kl", "slope_per_1k"), 0)
    pair |= {"tokens": 1, "temperature": None, "seconds": 2.0, "metrics": {}, "points": []}
    found = probe_json({"pairs": [pair], "bf16_over_fp16": 60.0, "run_dir": "r", "gradient": None})
    assert found.keys() == {"pairs", "bf16_over_fp16", "run_dir"}
    assert found["pairs"][0].keys() == pair.keys() - {"metrics", "points"}
    assert json.dumps(found)


def test_a_probe_without_a_model_or_with_parts_that_a_dump_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="no model to examine"):
        probe(None, config(), None)
    with pytest.raises(InputError, match="leave them out with --from-dump"):
        probe("demo", config(), None, from_dump="x.jsonl", gradient=True)
