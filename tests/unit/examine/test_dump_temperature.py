"""Raw logprobs in a dump that states a temperature: they are detected and reported wherever the pair is shown."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from betterhalf.config.schema import RunConfig
from betterhalf.diagnostics.pair_report import RAW_RATIO
from betterhalf.examine import pairs as pairs_module
from betterhalf.examine.probe import probe, probe_json
from betterhalf.examine.probe_text import show_probe
from betterhalf.examine.scoring import score_completions
from betterhalf.examine.subject import Subject, engine_in, open_subject, sample_groups_of, trainer_in
from betterhalf.run_dir import read_json
from betterhalf.types import DtypeName


def config(temperature: float, **changes: Any) -> RunConfig:
    small = {
        "sampling": {"max_tokens": 16, "temperature": temperature},
        "probe": {"bootstrap": 20},
        "logging": {"console": "quiet"},
        "precision": {"pairs": "matched"},
    }
    return RunConfig.model_validate(small | changes)


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    with open_subject("demo", config(0.7)) as opened:
        yield opened


def rows_of(subject: Subject, dtype: DtypeName, *, raw: bool) -> list[dict[str, Any]]:
    """Return completions sampled at 0.7 with the engine's logprobs, or raw logprobs with the engine's mismatch."""
    prompts = subject.prompts(6)
    with engine_in(subject, dtype) as engine:
        groups = sample_groups_of(subject, engine, prompts, 2)
    items = [(prompt.token_ids, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    behavior = [list(c.behavior_logprobs) for _, c in items]
    if raw:
        trainer = trainer_in(subject, dtype)
        processed = score_completions(trainer, items, subject.config)
        plain = score_completions(trainer, items, subject.config, temperature=1.0)
        behavior = [
            [min(0.0, at_1 + 0.7 * (mu - at_t)) for at_1, mu, at_t in zip(*row, strict=True)]
            for row in zip(plain, behavior, processed, strict=True)
        ]
    return [
        {
            "prompt_token_ids": list(prompt),
            "token_ids": list(completion.token_ids),
            "behavior_logprobs": logprobs,
            "rollout_dtype": dtype,
            "temperature": 0.7,
        }
        for (prompt, completion), logprobs in zip(items, behavior, strict=True)
    ]


def examined(rows: list[dict[str, Any]], folder: Path, wanted: RunConfig) -> dict[str, Any]:
    path = folder / "dump.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return probe("demo", wanted, str(folder / "run"), from_dump=str(path))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("stated_by", ["file", "configuration"])
def test_raw_logprobs_are_reported_on_the_terminal_the_page_and_in_json(
    subject: Subject, dtype: DtypeName, stated_by: str, tmp_path: Path
) -> None:
    rows = rows_of(subject, dtype, raw=True)
    if stated_by == "configuration":
        rows = [{key: value for key, value in row.items() if key != "temperature"} for row in rows]
    found = examined(rows, tmp_path, config(1.0 if stated_by == "file" else 0.7))
    (pair,) = found["pairs"]
    fit = pair["temperature"]
    assert (fit["stated"], fit["raw"], fit["tokens"]) == (0.7, True, pair["tokens"])
    assert fit["k3_at_stated"] == pytest.approx(pair["k3"])
    assert fit["k3_at_1"] * RAW_RATIO < fit["k3_at_stated"]
    assert probe_json(found)["pairs"][0]["temperature"] == fit
    terminal, said = io.StringIO(), f"the dump's logprobs fit temperature 1 (raw): k3 {fit['k3_at_1']:.2e}, against"
    show_probe(read_json(tmp_path / "run" / "probe.json"), terminal)
    assert said in terminal.getvalue()
    assert said in (tmp_path / "run" / "report.html").read_text().replace("&#x27;", "'")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_processed_logprobs_fit_the_stated_temperature(subject: Subject, dtype: DtypeName, tmp_path: Path) -> None:
    found = examined(rows_of(subject, dtype, raw=False), tmp_path, config(1.0))
    fit = found["pairs"][0]["temperature"]
    assert not fit["raw"] and fit["k3_at_stated"] * RAW_RATIO < fit["k3_at_1"]
    terminal = io.StringIO()
    show_probe(found, terminal)
    assert "raw" not in terminal.getvalue()


def test_at_temperature_1_there_is_nothing_to_compare(subject: Subject, tmp_path: Path) -> None:
    rows = [row | {"temperature": 1} for row in rows_of(subject, "fp32", raw=True)]
    assert examined(rows, tmp_path, config(0.7))["pairs"][0]["temperature"] is None


def test_the_first_completions_decide(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "_FIT_TOKENS", 3)
    rows = rows_of(subject, "fp32", raw=True)
    fit = examined(rows, tmp_path, config(1.0))["pairs"][0]["temperature"]
    lengths = [len(row["token_ids"]) for row in rows]
    assert fit["raw"] and 3 <= fit["tokens"] < 3 + max(lengths)
