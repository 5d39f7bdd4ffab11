"""The native engine on a CUDA device: equal to the CPU in FP32, graphs equal to plain launches, half close to FP32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny_models import CUDA, tiny_config, tiny_module

from betterhalf.config.schema import RunConfig, SamplingConfig
from betterhalf.errors import EngineError
from betterhalf.precision.contract import weights_digests
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.rollout.native.scheduler import Capacity
from betterhalf.rollout.sampler import draw, sequence_key, uniforms
from betterhalf.token_support import decode
from betterhalf.types import GenerateRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FAMILIES: dict[str, Any] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {},
}
"""Model options of each family."""
SAMPLING = SamplingConfig(max_tokens=20)


def module_of(family: str) -> Any:
    config = tiny_config(family, CUDA, initializer_range=0.1, **FAMILIES[family])
    return tiny_module(config, seed=5)


def engine_of(module: Any, precision: str, device: str = "cuda", islands: tuple[str, ...] = (), **settings: Any) -> Any:
    section = {"preset": precision, "fp32_modules": islands}
    config = RunConfig.model_validate({"precision": section, "engine": {"type": "native", **settings}})
    roles = build_precision(config.precision, torch.device(device))
    engine = build_engine(config, module.config, (3, 50), roles)
    sent = ((name, p.detach().to(device, roles.wire_dtype)) for name, p in module.named_parameters())
    engine.load_weights(sent, policy_version=0)
    return engine


def requests(lengths: tuple[int, ...] = (12, 3, 12, 40, 1)) -> list[GenerateRequest]:
    return [
        GenerateRequest(token_ids=tuple((5 * i + 7 * k) % 101 for k in range(n)), group_size=4, key=(2, 5, i))
        for i, n in enumerate(lengths)
    ]


def gap(module: Any, found: list[Any]) -> torch.Tensor:
    """Return the logprobs of the FP32 module on the CPU minus those of the engine, over all sampled tokens, float64."""
    parts = []
    for request, group in zip(requests(), found, strict=True):
        for completion in group:
            with torch.no_grad():
                logits = module(torch.tensor([request.token_ids + completion.token_ids])).logits[0]
            logprobs = logits[len(request.token_ids) - 1 : -1].double().log_softmax(-1)
            chosen = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            parts.append(chosen - torch.tensor(completion.behavior_logprobs, dtype=torch.float64))
    return torch.cat(parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_on_the_device_equals_the_transformers_module(family):
    module = module_of(family)
    difference = gap(module, engine_of(module, "fp32").generate(requests(), SAMPLING))
    assert (difference.exp() - 1 - difference).mean() < 1e-9


@pytest.mark.parametrize("mode", ["engine", "aligned"])
@pytest.mark.parametrize(("precision", "bound"), [("fp16", 2e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_on_the_device_stays_close_to_fp32(family, precision, bound, mode):
    module = module_of(family)
    difference = gap(module, engine_of(module, precision, rounding=mode).generate(requests(), SAMPLING))
    assert 0 < (difference.exp() - 1 - difference).mean() < bound


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_give_what_plain_launches_give(family, precision):
    module = module_of(family)
    graphs = engine_of(module, precision, cuda_graphs=True, max_concurrent=6)
    plain = engine_of(module, precision, cuda_graphs=False, max_concurrent=6)
    found, expected = graphs.generate(requests(), SAMPLING), plain.generate(requests(), SAMPLING)
    assert graphs._graphs is not None and plain._graphs is None
    if precision == "fp32":
        assert [[c.token_ids for c in g] for g in found] == [[c.token_ids for c in g] for g in expected]
    assert gap(module, found).abs().mean() < 2 * gap(module, expected).abs().mean() + 1e-6


DOWN = "model.layers.1.mlp.down_proj"
ISLANDS = [DOWN, "model.layers.1.mlp", "model.layers.1.self_attn.o_proj", "model.layers.1.self_attn", "model.layers.1"]


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(("precision", "bound"), [("fp16", 2e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("island", ISLANDS)
def test_islands_stay_as_close_to_fp32_and_keep_the_cache_in_half(island, precision, bound, graphs):
    module = module_of("qwen3")
    engine = engine_of(module, precision, islands=(island,), cuda_graphs=graphs)
    difference = gap(module, engine.generate(requests(), SAMPLING))
    assert 0 < (difference.exp() - 1 - difference).mean() < bound
    report = engine.report()
    assert report.facts["fp32_modules"] == island and report.dtypes["kv"] == report.dtypes["compute"] == precision
    assert engine._weights.layers[1].down.dtype == (engine._weights.storage.grid if "attn" in island else torch.float32)
    assert engine._table.cache.keys.dtype == engine._weights.storage.grid


@pytest.mark.parametrize("island", [(), (DOWN,)])
@pytest.mark.parametrize(("precision", "bound"), [("fp16", 2e-4), ("bf16", 2e-2)])
def test_a_down_projection_in_parts_stays_as_close_to_fp32(precision, bound, island, monkeypatch):
    monkeypatch.setattr("betterhalf.rollout.native.decoder._LONG_SUM", 64)
    module = module_of("llama")
    difference = gap(module, engine_of(module, precision, islands=island).generate(requests(), SAMPLING))
    assert 0 < (difference.exp() - 1 - difference).mean() < bound


def test_an_island_prevents_an_overflow():
    module = module_of("llama")
    with torch.no_grad():
        module.get_submodule(DOWN).weight.mul_(1e5)
    with pytest.raises(EngineError, match="not finite"):
        engine_of(module, "fp16").generate(requests(), SAMPLING)
    difference = gap(module, engine_of(module, "fp16", islands=(DOWN,)).generate(requests(), SAMPLING))
    assert (difference.exp() - 1 - difference).mean() < 1e-3


def test_graphs_survive_longer_rope_tables_made_while_scoring():
    module = module_of("llama")
    engine = engine_of(module, "fp32")
    before = engine.generate(requests(), SAMPLING)
    engine.score([tuple(k % 101 for k in range(600))])
    assert engine.generate(requests(), SAMPLING) == before


def test_graphs_follow_new_weights_and_are_kept(monkeypatch):
    module, other = module_of("llama"), module_of("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.flip(0))
    engine = engine_of(module, "fp16")
    engine.generate(requests(), SAMPLING)
    captured = engine._graphs
    sent = [(name, p.detach().to("cuda", torch.float16)) for name, p in other.named_parameters()]
    engine.load_weights(sent, policy_version=1)
    found = engine.generate(requests(), SAMPLING)
    assert engine._graphs is captured
    assert gap(other, found).abs().max() < 0.1
    assert engine.report().digests == weights_digests(sent)


def test_a_longer_request_makes_a_larger_cache():
    module = module_of("llama")
    engine = engine_of(module, "fp32")
    short = engine.generate(requests(), SAMPLING)
    engine.generate(requests((500, 300)), SamplingConfig(max_tokens=100))
    assert engine.generate(requests(), SAMPLING)[0][0].token_ids == short[0][0].token_ids


def test_fp32_tokens_equal_those_of_the_cpu():
    module = module_of("qwen3")
    on_cpu = engine_of(module, "fp32", "cpu").generate(requests(), SAMPLING)
    on_gpu = engine_of(module, "fp32").generate(requests(), SAMPLING)
    assert [[c.token_ids for c in g] for g in on_gpu] == [[c.token_ids for c in g] for g in on_cpu]


@pytest.mark.parametrize("graphs", [True, False])
def test_requests_join_and_leave_between_steps(graphs, device="cuda"):
    module, asked = module_of("llama"), requests()
    expected = engine_of(module, "fp32", device).generate(asked, SAMPLING)
    engine = engine_of(module, "fp32", device, cuda_graphs=graphs, max_concurrent=6)
    scheduler, found = engine.scheduler(SAMPLING, Capacity(sequences=6, length=64, tokens=20)), {}
    for number, request in enumerate(asked):
        scheduler.add(request)
        if number == 3:
            scheduler.cancel(1)
        for _ in range(2):
            collect(scheduler.step(), found)
    while scheduler.unfinished:
        collect(scheduler.step(), found)
    for number in (0, 2, 3, 4):
        assert [found[number, sibling] for sibling in range(4)] == [one.token_ids for one in expected[number]]


def collect(finished, found):
    for some in finished:
        for sequence, completion in zip(some.sequences, some.completions((3, 50), 0), strict=True):
            found[sequence.request, sequence.sibling] = completion.token_ids


@pytest.mark.parametrize("sampling", [{"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.1, "top_p": 0.9}], ids=str)
def test_graphs_report_the_tokens_that_truncation_kept(sampling, device="cuda"):
    module, settings = module_of("qwen3"), SamplingConfig(max_tokens=20, temperature=0.7, **sampling)
    asked = [replace(request, with_support=True) for request in requests()]
    expected = engine_of(module, "fp32", "cpu").generate(asked, settings)
    for graphs in (True, False):
        found = engine_of(module, "fp32", device, cuda_graphs=graphs, max_concurrent=6).generate(asked, settings)
        for group, others in zip(found, expected, strict=True):
            for one, other in zip(group, others, strict=True):
                assert one.token_ids == other.token_ids
                assert decode(one.support) == decode(other.support)
                assert one.support.masses == pytest.approx(other.support.masses, abs=1e-4)


def test_random_numbers_equal_those_of_the_cpu():
    keys = torch.tensor([sequence_key((1, 2, 3), sibling) for sibling in range(1000)])
    positions = torch.arange(1000)
    assert torch.equal(uniforms(keys.cuda(), positions.cuda()).cpu(), uniforms(keys, positions))


def test_no_device_draw_has_probability_zero():
    logits = torch.randn(256, 50_000, generator=torch.Generator().manual_seed(0))
    logits[:, :100] = logits[:, -100:] = -300.0
    uniform = torch.tensor([0.5 * 2.0**-52, 1 - 2.0**-53], dtype=torch.float64).repeat(128)
    token_ids = draw(logits.cuda(), uniform.cuda(), 1.0).token_ids
    assert token_ids.min() >= 100 and token_ids.max() < 49_900


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_logits_are_fp32_and_never_rounded_to_half(precision):
    engine = engine_of(module_of("llama"), precision)
    decoder = engine._decoder
    hidden = torch.randn(7, 128, device="cuda").to(decoder.rounding.dtype)
    with torch.inference_mode():
        logits = decoder.logits(hidden)
    exact = hidden.double() @ decoder.weights.head.double().t()
    assert logits.dtype == torch.float32
    assert (logits.double() - exact).abs().max() < 1e-4 * exact.abs().max()
    assert engine.report().dtypes["lm_head"] == "fp32"
    facts = engine.report().facts
    assert facts["linear_layers"].endswith(" native") and facts["matmul_sums"] == "fp32"
