"""The run's side of vLLM, against a fake server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import tiny_config

from betterhalf.config.schema import PrecisionConfig, SamplingConfig, VllmEngineConfig
from betterhalf.errors import (
    ConfigError,
    EngineDiedError,
    EngineError,
    EngineNumericsError,
    InputError,
    MissingExtraError,
)
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.sampler import sequence_key
from betterhalf.rollout.vllm import engine as engine_module
from betterhalf.rollout.vllm.engine import VllmEngine
from betterhalf.types import GenerateRequest

Make = Callable[..., VllmEngine]

CONFIG = tiny_config(vocab_size=23, max_position_embeddings=16)
WEIGHTS = {"model.embed_tokens.weight": torch.zeros(23, 4), "model.norm.weight": torch.zeros(4)}


@pytest.fixture
def make(fake_module: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Return make(precision={...}, load=True, **engine settings) -> an engine on the fake server."""
    monkeypatch.setattr(engine_module.options, "check_installed", lambda: None)
    made: list[VllmEngine] = []

    def build(
        precision: dict[str, Any] | None = None, *, load: bool = True, device: str = "cpu", **settings: Any
    ) -> VllmEngine:
        roles = build_precision(PrecisionConfig.model_validate(precision or {}), torch.device(device))
        config = VllmEngineConfig.model_validate(settings)
        made.append(VllmEngine(CONFIG, precision=roles, config=config, stop_token_ids=(5,), module=fake_module))
        if load:
            made[-1].load_weights(WEIGHTS.items(), policy_version=4)
        return made[-1]

    yield build
    for engine in made:
        engine.close()


def request(*token_ids: int, group_size: int = 1, index: int = 0) -> GenerateRequest:
    return GenerateRequest(token_ids=token_ids, group_size=group_size, key=(1, 2, index))


def test_each_sibling_has_the_seed_of_its_key_and_its_own_place(make: Make) -> None:
    groups = make().generate([request(1, 2, group_size=3), request(3, index=1)], SamplingConfig(max_tokens=6))
    assert [len(group) for group in groups] == [3, 1]
    seeds = [sequence_key((1, 2, 0), sibling) & (2**63 - 1) for sibling in range(3)]
    assert [completion.token_ids[0] for completion in groups[0]] == [seed % 23 for seed in seeds]
    assert groups[1][0].token_ids[0] == (sequence_key((1, 2, 1), 0) & (2**63 - 1)) % 23
    assert {completion.policy_version for group in groups for completion in group} == {4}
    assert groups[0][0].behavior_logprobs == (-0.25, -0.5)
    assert groups[0][0].finish_reason == "stop"


def test_the_length_limit_is_what_the_context_leaves(make: Make) -> None:
    (short,), (long,) = make().generate([request(*[1] * 3), request(*[1] * 11)], SamplingConfig(max_tokens=9))
    assert (short.token_ids[1], long.token_ids[1]) == (9, 16 - 11)
    assert short.finish_reason == "length"


def test_a_later_turn_has_a_seed_of_its_own_and_the_limit_that_is_left(make: Make) -> None:
    turn = GenerateRequest(
        token_ids=(1, 2), group_size=1, key=(1, 2, 0), first_sibling=2, first_position=7, max_tokens=3
    )
    ((found,),) = make().generate([turn], SamplingConfig(max_tokens=6))
    seed = sequence_key((1, 2, 0), 2, 7) & (2**63 - 1)
    assert found.token_ids == (seed % 23, 3)
    assert seed != sequence_key((1, 2, 0), 2) & (2**63 - 1)


def test_nothing_starts_before_it_is_needed(make: Make) -> None:
    engine = make(load=False)
    with pytest.raises(EngineError, match="holds no weights; call load_weights before generate"):
        engine.generate([request(1)], SamplingConfig())
    with pytest.raises(EngineError, match="call load_weights before score"):
        engine.score([(1, 2)])
    assert engine.pid is None
    engine.close()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ((), "prompt 0 has 0 tokens"),
        ((1,) * 16, "prompt 0 has 16 tokens, but the model's context of 16 must hold it and one token more"),
        ((1, 23), "prompt 0 holds a token outside the model's vocabulary of 23"),
        ((-1,), "outside the model's vocabulary"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(make: Make, prompt: tuple[int, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make().generate([request(*prompt)], SamplingConfig())


def test_scores_take_the_whole_context_and_nothing_beyond(make: Make) -> None:
    engine = make()
    assert engine.score([(1, 2, 3), (1,) * 16]) == [(-1.0, -1.0), (-1.0,) * 15]
    assert engine.score([]) == []
    for wrong in ((1,), (1,) * 17):
        with pytest.raises(InputError, match=f"sequence 0 has {len(wrong)} tokens; the engine scores 2 to 16"):
            engine.score([wrong])


def test_a_logprob_that_is_not_finite_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LOGPROB", "nan")
    with pytest.raises(
        EngineNumericsError, match="prompt 1, sibling 0: the logprob of completion token 1 is not finite in fp16"
    ):
        make().generate([request(1, group_size=0), request(1)], SamplingConfig())


def test_a_completion_without_tokens_is_no_verdict_on_the_precision(make: Make) -> None:
    with pytest.raises(EngineError, match="prompt 2, sibling 1: vLLM returned no token") as caught:
        make()._completion(request(1), 2, 1, ((), (), False, None), version=0)
    assert not isinstance(caught.value, EngineNumericsError)


def test_a_dead_engine_says_so_until_it_is_restarted(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_DIES_IN", "generate")
    monkeypatch.setenv("FAKE_MARK", str(tmp_path / "died"))
    engine = make()
    first = engine.pid
    for _ in range(2):
        with pytest.raises(EngineDiedError, match="signal SIGKILL"):
            engine.generate([request(1)], SamplingConfig())
    with pytest.raises(EngineDiedError):
        engine.load_weights(WEIGHTS.items(), policy_version=5)
    engine.restart()
    assert engine.pid != first
    with pytest.raises(EngineError, match="holds no weights"):
        engine.generate([request(1)], SamplingConfig())
    engine.load_weights(WEIGHTS.items(), policy_version=5)
    assert engine.generate([request(1)], SamplingConfig())[0][0].policy_version == 5


def test_a_refused_start_is_bad_input_and_leaves_no_process(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_REFUSES", "float16")
    engine = make(load=False)
    with pytest.raises(InputError, match="no such dtype"):
        engine.load_weights(WEIGHTS.items(), policy_version=0)
    assert engine.pid is None


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ({"preset": "fp16", "kv_dtype": "fp32"}, "vLLM keeps keys and values in the dtype it computes in, fp16"),
        ({"preset": "fp16", "fp32_modules": ("model.layers.0",)}, "precision.fp32_modules cannot be applied"),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_a_start(make: Make, precision: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make(precision, load=False)


def test_a_temperature_that_vllm_would_replace_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match="vLLM raises temperatures below 0.01 to 0.01, so 0.001 cannot"):
        make().generate([request(1)], SamplingConfig(temperature=0.001))


def test_without_vllm_the_extra_is_named(fake_module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    precision = build_precision(PrecisionConfig(), torch.device("cpu"))
    with pytest.raises(MissingExtraError, match=r"betterhalf\[vllm\](.|\n)*--vllm-cpu(.|\n)*torchvision"):
        VllmEngine(CONFIG, precision=precision, config=VllmEngineConfig(), stop_token_ids=(), module=fake_module)


def test_on_a_cpu_nothing_sleeps(make: Make) -> None:
    engine = make()
    engine.sleep()
    assert engine.generate([request(1)], SamplingConfig())
    engine.wake()


def test_sleep_and_wake_free_a_shared_gpu_and_take_it_again(make: Make) -> None:
    """Two ranks, so that weights go through a file; each verb that needs vLLM wakes it, once."""
    engine = make(device="cuda", tensor_parallel_size=2)
    for _ in range(2):
        engine.sleep()
    engine.wake()
    engine.sleep()
    engine.generate([request(1)], SamplingConfig())
    engine.sleep()
    engine.load_weights(WEIGHTS.items(), policy_version=5)
    names = "load model.embed_tokens.weight model.norm.weight"
    assert engine._ask("seen") == [names, "sleep", "wake", "sleep", "wake", "sleep", "wake", names]
    never = make(device="cuda", tensor_parallel_size=2, sleep="never")
    never.sleep()
    assert never._ask("seen") == [names]


def test_a_crash_during_the_start_is_not_one_to_recover_from(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DIES_IN", "start")
    engine = make(load=False)
    with pytest.raises(EngineError, match="vLLM does not start: .*exit status 9(.|\n)*fake vLLM starts") as caught:
        engine.load_weights(WEIGHTS.items(), policy_version=0)
    assert not isinstance(caught.value, EngineDiedError)
    assert engine.pid is None
