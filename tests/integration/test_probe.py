"""`betterhalf probe` from the command line, with its own rollouts and with dumps of other frameworks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from betterhalf import cli
from betterhalf.models import loading
from betterhalf.run_dir import read_json, read_jsonl

Ends = Callable[..., str]
Probe = Callable[..., dict[str, Any]]

SMALL = ("probe.prompts=2", "probe.group_size=2", "probe.bootstrap=50", "sampling.max_tokens=24")
QUIET = "logging.console=quiet"


@pytest.fixture
def probe(capsys: pytest.CaptureFixture[str]) -> Probe:
    """Run a probe that succeeds, and return the object on its last line, with standard error under `said`."""

    def run(*arguments: str | Path) -> dict[str, Any]:
        capsys.readouterr()
        status = cli.main(["probe", *map(str, arguments), QUIET, "--json"])
        out, err = capsys.readouterr()
        assert status == 0, err
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found | {"said": err}

    return run


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a full probe of the demo model."""
    run = tmp_path_factory.mktemp("probe") / "run"
    assert cli.main(["probe", "demo", *SMALL, QUIET, f"run_dir={run}"]) == 0
    return run


def test_the_whole_matrix_is_on_disk(measured: Path) -> None:
    found = read_json(measured / "probe.json")
    assert [(p["train"], p["rollout"]) for p in found["pairs"]] == [
        (train, rollout) for train in ("fp16", "bf16", "fp32") for rollout in ("fp16", "bf16", "fp32")
    ]
    k3 = {(p["train"], p["rollout"]): p["k3"] for p in found["pairs"]}
    assert k3["fp32", "fp32"] < 1e-12 < k3["fp16", "fp16"] < k3["bf16", "bf16"]
    assert found["bf16_over_fp16"] == pytest.approx(k3["bf16", "bf16"] / k3["fp16", "fp16"])
    assert found["engine"] == "native" and found["completions"] == 4 and found["max_tokens"] == 24
    assert found["seconds"]["generate"].keys() == found["seconds"]["score"].keys() == {"fp16", "bf16", "fp32"}
    files = {path.name for path in measured.iterdir()}
    assert files == {
        *("config.json", "environment.json", "probe.json", "summary.json", "report.html", "tokens.parquet"),
        *(f"rollouts-{dtype}.jsonl" for dtype in ("fp16", "bf16", "fp32")),
    }


def test_the_token_table_has_a_row_for_each_token_and_pair(measured: Path) -> None:
    table = pyarrow.parquet.read_table(measured / "tokens.parquet").to_pylist()
    found = read_json(measured / "probe.json")
    assert len(table) == sum(pair["tokens"] for pair in found["pairs"])
    rows = [row for row in table if (row["train"], row["rollout"]) == ("bf16", "fp16")]
    pair = next(p for p in found["pairs"] if (p["train"], p["rollout"]) == ("bf16", "fp16"))
    first = [row for row in rows if row["completion"] == 0]
    assert [row["position"] for row in first] == list(range(pair["completions"][0][0]))
    assert sum(row["trainer_logprob"] - row["behavior_logprob"] for row in first) == pytest.approx(
        pair["completions"][0][1], rel=1e-9
    )
    rollouts = rows_of(measured / "rollouts-fp16.jsonl")
    assert [row["token_id"] for row in first] == rollouts[0]["token_ids"]
    assert [row["behavior_logprob"] for row in first] == rollouts[0]["behavior_logprobs"]


def test_a_dump_of_the_same_rollouts_gives_the_same_numbers(measured: Path, probe: Probe, tmp_path: Path) -> None:
    found = probe(
        *("demo", "--from-dump", measured / "rollouts-fp16.jsonl", "precision.pairs=matched", "probe.bootstrap=50"),
        f"run_dir={tmp_path / 'run'}",
    )
    (pair,) = found["pairs"]
    original = read_json(measured / "probe.json")["pairs"][0]
    assert list(pair) == [
        *("train", "rollout", "k3", "k3_ci", "mean_abs", "max_abs", "sequence_kl", "slope_per_1k", "tokens"),
        *("temperature", "seconds"),
    ]
    assert {key: pair[key] for key in pair if key != "seconds"} == {
        key: original[key] for key in pair if key != "seconds"
    }
    assert read_json(tmp_path / "run" / "probe.json")["engine"] == "dump"


def test_a_dump_with_trainer_logprobs_needs_no_model(measured: Path, probe: Probe, tmp_path: Path) -> None:
    rows = rows_of(measured / "rollouts-fp32.jsonl")
    for row in rows:
        row["trainer_logprobs"] = [value - 0.01 for value in row["behavior_logprobs"]]
        del row["rollout_dtype"]
    path = write(tmp_path / "dump.jsonl", [*rows, "oops", {**rows[0], "trainer_logprobs": None}])
    found = probe("--from-dump", path, f"run_dir={tmp_path / 'run'}")
    (pair,) = found["pairs"]
    assert (pair["train"], pair["rollout"]) == ("dump", "dump")
    assert pair["k3"] == pytest.approx(0.01**2 / 2, rel=0.01)
    assert pair["slope_per_1k"] == pytest.approx(-10, rel=1e-6)
    assert "line 5 is not used: not JSON" in found["said"]
    assert "line 6 is not used: no trainer_logprobs, and no MODEL" in found["said"]
    assert [row["line"] for row in read_jsonl(tmp_path / "run" / "rejected.jsonl")] == [5, 6]


def test_with_a_model_given_trainer_logprobs_make_a_pair_of_their_own(
    measured: Path, probe: Probe, tmp_path: Path
) -> None:
    rows = rows_of(measured / "rollouts-bf16.jsonl")
    rows[0]["trainer_logprobs"] = rows[0]["behavior_logprobs"]
    path = write(tmp_path / "dump.jsonl", rows)
    found = probe("demo", "--from-dump", path, f"run_dir={tmp_path / 'run'}", "precision.pairs=fp32/fp32")
    assert [(p["train"], p["rollout"]) for p in found["pairs"]] == [("dump", "bf16"), ("fp32", "bf16")]
    assert found["pairs"][0]["k3"] == 0.0
    assert found["pairs"][0]["tokens"] == len(rows[0]["token_ids"])
    assert found["pairs"][1]["tokens"] == sum(len(row["token_ids"]) for row in rows)


def test_a_model_that_no_engine_supports_scores_a_dump(
    measured: Path, probe: Probe, ends: Ends, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(Path(loading.__file__).parent / "demo", model, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((model / "config.json").read_text())
    config = Olmo2Config(
        **{key: value for key, value in settings.items() if key not in ("architectures", "model_type")}
    )
    torch.manual_seed(0)
    Olmo2ForCausalLM(config).save_pretrained(model)
    dump = ("--from-dump", measured / "rollouts-fp32.jsonl", "precision.pairs=fp32/fp32")
    (pair,) = probe(model, *dump, f"run_dir={tmp_path / 'run'}")["pairs"]
    assert pair["tokens"] == sum(len(row["token_ids"]) for row in rows_of(measured / "rollouts-fp32.jsonl"))
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.1}))
    assert "attention_dropout=0.1" in ends(2, "probe", model, *dump, QUIET, f"run_dir={tmp_path / 'other'}")


def test_trls_rollouts_are_recognised(measured: Path, probe: Probe, tmp_path: Path) -> None:
    rows = rows_of(measured / "rollouts-fp32.jsonl")
    batch = {
        "prompt_ids": [row["prompt_token_ids"] for row in rows],
        "completion_ids": [row["token_ids"] for row in rows],
        "logprobs": [[[value] for value in row["behavior_logprobs"]] for row in rows],
    }
    path = write(tmp_path / "trl.jsonl", [batch])
    found = probe("demo", "--from-dump", path, "precision.pairs=fp32/fp32", f"run_dir={tmp_path / 'run'}")
    (pair,) = found["pairs"]
    assert (pair["train"], pair["rollout"], pair["tokens"]) == ("fp32", "dump", sum(map(len, batch["completion_ids"])))
    assert pair["k3"] < 1e-12


def test_a_dump_is_scored_at_its_own_temperature(probe: Probe, tmp_path: Path) -> None:
    arguments = ("demo", *SMALL, "precision.pairs=fp32/fp32")
    probe(*arguments, "sampling.temperature=0.5", f"run_dir={tmp_path / 'sampled'}")
    dump = tmp_path / "sampled" / "rollouts-fp32.jsonl"
    found = probe(*arguments, "--from-dump", dump, f"run_dir={tmp_path / 'again'}")
    assert found["pairs"][0]["k3"] < 1e-12


def test_the_terminal_shows_a_matrix(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from betterhalf.examine.probe_text import WIDTH, show_probe

    show_probe(read_json(measured / "probe.json"))
    out = capsys.readouterr().out
    assert "k3 in nats per token, with its 95% interval" in out
    assert out.count("fp16/bf16") == 2 and out.count("slope_per_1k") == 3
    assert "k3 ratio BF16 / FP16" in out and "seconds: load" in out
    assert "\u2026" not in out, "a number is cut off"
    assert all(len(line) <= WIDTH for line in out.splitlines() if not line.startswith(("seconds", "k3 ratio")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"rollout_log_probs": [-1.0]}, "holds no behavior_logprobs"),
        ({"behavior_logprobs": [-1.0, -2.0]}, "behavior_logprobs has 2 values for 1 token_ids"),
        ({"behavior_logprobs": [float("nan")]}, "is not a finite number"),
    ],
)
def test_a_dump_that_cannot_be_used_ends_with_status_2_and_leaves_nothing(
    ends: Ends, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "dump.jsonl", [{"prompt_token_ids": [1], "token_ids": [2]} | row])
    said = ends(2, "probe", "demo", "--from-dump", path, f"run_dir={tmp_path / 'run'}")
    assert message in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such-model",), "no-such-model"),
        ((), "takes MODEL"),
        (("demo", "precision.pairs=diagonal"), "is not full, matched or a list"),
        (("demo", "--from-dump", "absent.jsonl"), "cannot be read"),
        (("demo", "--localize", "--from-dump", "absent.jsonl"), "leave them out with --from-dump"),
    ],
)
def test_bad_input_ends_with_status_2_and_leaves_nothing(
    ends: Ends, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert message in ends(2, "probe", *arguments, QUIET, f"run_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_prompts_longer_than_the_context_end_with_status_2(ends: Ends, tmp_path: Path) -> None:
    path = write(tmp_path / "long.jsonl", [{"problem": "12345678" * 16, "answer": "1"}])
    arguments = ("task.type=math", f"task.path={path}", "task.template=none", f"run_dir={tmp_path / 'run'}")
    said = ends(2, "probe", "demo", *arguments, QUIET)
    assert "leaves no room in the model's context of 128" in said and "[transformers]" not in said
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_not_written_to(measured: Path, ends: Ends) -> None:
    assert "already holds a run" in ends(2, "probe", "demo", f"run_dir={measured}")
