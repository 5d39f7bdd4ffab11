"""The native decoder against the transformers module of every family, and its prefill against its decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_models import tiny_config, tiny_module

from betterhalf.config.schema import RunConfig, SamplingConfig
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.types import GenerateRequest

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "initializer_range": 0.25,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}
CONFIGS: dict[str, Any] = {
    "llama": tiny_config("llama", SIZES, tie_word_embeddings=True),
    "llama_biased": tiny_config("llama", SIZES, attention_bias=True, mlp_bias=True),
    "llama_rope3": tiny_config("llama", SIZES, rope_parameters=LLAMA3),
    "llama_linear": tiny_config(
        "llama", SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
    ),
    "llama_yarn": tiny_config("llama", SIZES, rope_parameters=YARN),
    "mistral": tiny_config("mistral", SIZES, sliding_window=None),
    "mistral_sliding": tiny_config("mistral", SIZES, sliding_window=7),
    "qwen2": tiny_config("qwen2", SIZES, tie_word_embeddings=True),
    "qwen2_sliding": tiny_config("qwen2", SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": tiny_config("qwen3", SIZES, head_dim=16),
    "qwen3_biased": tiny_config("qwen3", SIZES, attention_bias=True),
}
SAMPLING = SamplingConfig(max_tokens=24)


@pytest.fixture(params=CONFIGS)
def module(request: pytest.FixtureRequest) -> Any:
    return tiny_module(CONFIGS[request.param], seed=11, biases=0.5, norms=0.3)


def engine_of(module: Any, **settings: Any) -> Any:
    config = RunConfig.model_validate({"precision": {"preset": "fp32"}, "engine": settings})
    engine = build_engine(config, module.config, (), build_precision(config.precision, torch.device("cpu")))
    engine.load_weights(((name, p.detach()) for name, p in module.named_parameters()), policy_version=0)
    return engine


def requests() -> list[GenerateRequest]:
    lengths = (12, 3, 12, 30, 1)
    return [
        GenerateRequest(token_ids=tuple((5 * i + 7 * k) % 61 for k in range(n)), group_size=3, key=(2, 5, i))
        for i, n in enumerate(lengths)
    ]


def module_logits(module: Any, token_ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = module(torch.tensor([token_ids])).logits[0]
    return logits


def test_logprobs_equal_those_of_the_transformers_module(module):
    gaps = []
    for request, group in zip(requests(), engine_of(module).generate(requests(), SAMPLING), strict=True):
        for completion in group:
            logits = module_logits(module, request.token_ids + completion.token_ids)
            logprobs = logits[len(request.token_ids) - 1 : -1].log_softmax(-1)
            chosen = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            gaps.append(chosen.double() - torch.tensor(completion.behavior_logprobs).double())
    gap = torch.cat(gaps)
    assert (gap.exp() - 1 - gap).mean() < 1e-9
    assert gap.abs().max() < 1e-4


def test_greedy_tokens_equal_those_of_the_transformers_module(module):
    cold = SamplingConfig(max_tokens=16, temperature=1e-4)
    for request, group in zip(requests(), engine_of(module).generate(requests(), cold), strict=True):
        logits = module_logits(module, request.token_ids + group[0].token_ids)
        expected = logits[len(request.token_ids) - 1 : -1].argmax(-1)
        assert group[0].token_ids == tuple(expected.tolist())


def test_prefill_logits_equal_those_of_the_transformers_module(module):
    decoder = engine_of(module)._decoder
    decoder.reserve(96)
    prompts = [request.token_ids for request in requests()]
    packed = torch.tensor([token for prompt in prompts for token in prompt])
    with torch.inference_mode():
        hidden, _ = decoder.prefill(packed, tuple(len(prompt) for prompt in prompts))
        found = decoder.logits(hidden)
    expected = torch.stack([module_logits(module, prompt)[-1] for prompt in prompts])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_a_prompt_continues_its_own_completion(module):
    """Decoding token by token and one pass over prompt and completion give the same next distribution."""
    engine = engine_of(module)
    first = requests()[0]
    whole = engine.generate([first], SAMPLING)[0][0]
    for cut in (1, 9, 20):
        longer = GenerateRequest(token_ids=first.token_ids + whole.token_ids[:cut], group_size=1, key=first.key)
        decoder = engine._decoder
        with torch.inference_mode():
            hidden, _ = decoder.prefill(torch.tensor(longer.token_ids), (len(longer.token_ids),))
            logprob = decoder.logits(hidden)[0].log_softmax(-1)[whole.token_ids[cut]]
        assert logprob.item() == pytest.approx(whole.behavior_logprobs[cut], abs=5e-5)


def test_tokens_do_not_depend_on_batch_composition(module):
    expected = engine_of(module).generate(requests(), SAMPLING)
    for slots in (1, 4, 9):
        found = engine_of(module, max_concurrent=slots).generate(requests(), SAMPLING)
        assert [[c.token_ids for c in g] for g in found] == [[c.token_ids for c in g] for g in expected]


def test_the_names_held_are_those_of_the_module(module):
    assert set(engine_of(module).report().digests) == {name for name, _ in module.named_parameters()}
