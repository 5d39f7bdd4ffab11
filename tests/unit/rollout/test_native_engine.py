"""Continuous batching, stop tokens, limits, seeds, errors and the report of the native engine."""

from __future__ import annotations

import math

import pytest
import torch

from betterhalf.config.schema import SamplingConfig
from betterhalf.errors import EngineError, EngineNumericsError, InputError
from betterhalf.precision.products import has_native_matmul
from betterhalf.rollout.native import engine as engine_module
from betterhalf.rollout.native.cuda_graphs import batch_bucket
from betterhalf.rollout.native.engine import require_kernels
from betterhalf.rollout.native.running_batch import RunningBatch
from betterhalf.types import GenerateRequest


def requests(count=5, group_size=3, seed=0, lengths=(4, 9, 4, 6, 11)):
    return [
        GenerateRequest(
            token_ids=tuple((3 * index + k * k) % 23 for k in range(lengths[index % len(lengths)])),
            group_size=group_size,
            key=(seed, 1, index),
        )
        for index in range(count)
    ]


def tokens(completions):
    return [[completion.token_ids for completion in group] for group in completions]


def test_completions_come_in_request_and_sibling_order(make_engine):
    asked, sampling = requests(), SamplingConfig(max_tokens=7)
    together = make_engine().generate(asked, sampling)
    assert [len(group) for group in together] == [3] * 5
    for request, group in zip(asked, together, strict=True):
        alone = make_engine().generate([request], sampling)
        assert tokens(alone) == tokens([group])


def test_tokens_do_not_depend_on_the_number_of_slots(make_engine):
    asked, sampling = requests(count=7), SamplingConfig(max_tokens=12)
    expected = make_engine(stop_token_ids=(5, 11)).generate(asked, sampling)
    for slots in (1, 2, 4, 20):
        found = make_engine(stop_token_ids=(5, 11), max_concurrent=slots).generate(asked, sampling)
        assert tokens(found) == tokens(expected)
        for ours, theirs in zip(sum(found, ()), sum(expected, ()), strict=True):
            assert ours.finish_reason == theirs.finish_reason
            assert ours.behavior_logprobs == pytest.approx(theirs.behavior_logprobs, abs=2e-5)


def test_siblings_differ_and_repetition_does_not(make_engine):
    engine, sampling = make_engine(), SamplingConfig(max_tokens=16)
    first = engine.generate(requests(), sampling)
    assert all(len(set(group)) == 3 for group in tokens(first))
    assert engine.generate(requests(), sampling) == first
    assert tokens(engine.generate(requests(seed=1), sampling)) != tokens(first)


def test_a_gpu_without_triton_is_refused_with_the_fix(monkeypatch):
    require_kernels(torch.device("cpu"))
    monkeypatch.setattr(engine_module, "has_triton", lambda: False)
    require_kernels(torch.device("cpu"))
    with pytest.raises(InputError, match="pip install triton.*engine=vllm"):
        require_kernels(torch.device("cuda"))


def test_tokens_do_not_depend_on_when_the_host_looks(make_engine, monkeypatch):
    """A GPU is a step ahead of the host: sequences that have ended stand still until the host knows."""
    asked, sampling = requests(), SamplingConfig(max_tokens=20)
    for stops in ((), (2, 7, 20)):
        expected = make_engine(stop_token_ids=stops).generate(asked, sampling)
        with monkeypatch.context() as patched:
            patched.setattr(RunningBatch, "lag", 1)
            for slots in (1, 2, 3, 256):
                engine = make_engine(stop_token_ids=stops, max_concurrent=slots)
                found = [engine.generate(asked, sampling) for _ in range(2)]
                assert [[[c.token_ids for c in g] for g in once] for once in found] == [
                    [[c.token_ids for c in g] for g in expected]
                ] * 2


def test_a_stop_token_ends_the_completion_and_belongs_to_it(make_engine):
    stops, sampling = (2, 7, 20), SamplingConfig(max_tokens=20)
    free = sum(make_engine().generate(requests(), sampling), ())
    found = sum(make_engine(stop_token_ids=stops).generate(requests(), sampling), ())
    for stopped, whole in zip(found, free, strict=True):
        ends = [k for k, token in enumerate(whole.token_ids) if token in stops]
        expected = whole.token_ids[: ends[0] + 1] if ends else whole.token_ids
        assert stopped.token_ids == expected
        assert stopped.finish_reason == ("stop" if ends else "length")
        assert len(stopped.behavior_logprobs) == len(expected)
    assert {completion.finish_reason for completion in found} == {"stop", "length"}


@pytest.mark.parametrize("limit", [1, 2, 9])
def test_completions_are_as_long_as_asked(make_engine, limit):
    found = make_engine(max_concurrent=4).generate(requests(), SamplingConfig(max_tokens=limit))
    assert all(len(c.token_ids) == limit and c.finish_reason == "length" for group in found for c in group)


def test_the_context_cuts_the_completion(make_engine):
    long, short = tuple(range(20)) * 3, (1, 2)
    asked = [GenerateRequest(token_ids=t, group_size=2, key=(0, 0, i)) for i, t in enumerate((long, short, long[:-1]))]
    found = make_engine().generate(asked, SamplingConfig(max_tokens=10))
    assert [len(group[0].token_ids) for group in found] == [4, 10, 5]
    assert found[0][1].finish_reason == "length"


def test_a_prompt_runs_once_for_all_its_siblings(make_engine, monkeypatch):
    engine, ran = make_engine(max_concurrent=2), []
    prefill = engine._decoder.prefill

    def counted(token_ids, lengths):
        ran.extend(lengths)
        return prefill(token_ids, lengths)

    monkeypatch.setattr(engine._decoder, "prefill", counted)
    engine.generate(requests(group_size=5), SamplingConfig(max_tokens=6))
    assert sorted(ran) == [4, 4, 6, 9, 11]


def test_a_finished_sequence_is_replaced_at_once(make_engine, monkeypatch):
    engine, sizes = make_engine(max_concurrent=3, stop_token_ids=(2, 7, 20)), []
    decode = engine._decoder.decode

    def counted(token_ids, *rest):
        sizes.append(len(token_ids))
        return decode(token_ids, *rest)

    monkeypatch.setattr(engine._decoder, "decode", counted)
    found = engine.generate(requests(count=6), SamplingConfig(max_tokens=15))
    # The first token of each sequence comes from its prompt; every other is one row of one decode step.
    assert sum(sizes) == sum(len(c.token_ids) - 1 for group in found for c in group)
    drained = len(sizes) - next((k for k, size in enumerate(sizes) if size < 3), len(sizes))
    assert drained <= 15


def test_logprobs_are_those_of_the_tempered_distribution(make_engine, module):
    request = requests(count=1, group_size=4)[0]
    found = make_engine().generate([request], SamplingConfig(max_tokens=8, temperature=0.6))[0]
    for completion in found:
        ids = torch.tensor([request.token_ids + completion.token_ids])
        with torch.no_grad():
            logits = module(ids).logits[0, len(request.token_ids) - 1 : -1].double() / 0.6
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert completion.behavior_logprobs == pytest.approx(expected.tolist(), abs=5e-5)


def test_truncated_sampling_draws_from_the_tokens_kept_and_reports_their_logprobs(make_engine, module):
    request = requests(count=1, group_size=16)[0]
    sampling = SamplingConfig(max_tokens=6, temperature=2.0, top_k=3)
    assert len({c.token_ids for c in make_engine().generate([request], sampling)[0]}) > 3
    for completion in make_engine().generate([request], sampling)[0]:
        ids = torch.tensor([request.token_ids + completion.token_ids])
        with torch.no_grad():
            logits = module(ids).logits[0, len(request.token_ids) - 1 : -1].double() / 2.0
        best = logits.topk(3)
        assert all(token in row for token, row in zip(completion.token_ids, best.indices.tolist(), strict=True))
        place = (best.indices == torch.tensor(completion.token_ids)[:, None]).long().argmax(1, keepdim=True)
        expected = best.values.log_softmax(-1).gather(1, place)[:, 0]
        assert completion.behavior_logprobs == pytest.approx(expected.tolist(), abs=5e-5)


def test_one_token_to_choose_from_makes_siblings_equal(make_engine):
    (group,) = make_engine().generate(requests(count=1, group_size=4), SamplingConfig(max_tokens=6, top_k=1))
    assert len({completion.token_ids for completion in group}) == 1
    assert all(logprob == 0 for completion in group for logprob in completion.behavior_logprobs)


def test_a_vocabulary_sampled_in_parts_gives_the_same_tokens(make_engine, monkeypatch):
    expected = make_engine().generate(requests(), SamplingConfig(max_tokens=5))
    monkeypatch.setattr("betterhalf.rollout.native.running_batch._MAX_LOGITS", 23 * 4)
    assert tokens(make_engine().generate(requests(), SamplingConfig(max_tokens=5))) == tokens(expected)


def test_prompts_run_in_parts_give_the_same_tokens(make_engine, monkeypatch):
    expected = make_engine().generate(requests(), SamplingConfig(max_tokens=5))
    monkeypatch.setattr("betterhalf.rollout.native.queue._PREFILL_TOKENS", 10)
    monkeypatch.setattr("betterhalf.rollout.native.attention._MAX_SCORES", 60)
    assert tokens(make_engine().generate(requests(), SamplingConfig(max_tokens=5))) == tokens(expected)


def test_the_version_of_the_weights_is_on_every_completion(make_engine, wire):
    engine = make_engine()
    assert {c.policy_version for g in engine.generate(requests(), SamplingConfig(max_tokens=2)) for c in g} == {3}
    engine.load_weights(wire(torch.float32), policy_version=9)
    assert {c.policy_version for g in engine.generate(requests(), SamplingConfig(max_tokens=2)) for c in g} == {9}


def test_new_weights_change_what_is_sampled(make_engine, wire):
    engine, sampling = make_engine(), SamplingConfig(max_tokens=8)
    before = tokens(engine.generate(requests(), sampling))
    other = [(name, tensor.flip(0)) for name, tensor in wire(torch.float32)]
    engine.load_weights(other, policy_version=4)
    assert tokens(engine.generate(requests(), sampling)) != before
    engine.load_weights(wire(torch.float32), policy_version=5)
    assert tokens(engine.generate(requests(), sampling)) == before


def test_generating_without_weights_is_refused(make_engine):
    with pytest.raises(EngineError, match="holds no weights"):
        make_engine(load=False).generate(requests(), SamplingConfig())


def test_a_failed_load_leaves_no_weights_to_sample_from(make_engine):
    engine = make_engine()
    with pytest.raises(EngineError):
        engine.load_weights([], policy_version=4)
    with pytest.raises(EngineError, match="holds no weights"):
        engine.generate(requests(), SamplingConfig())


@pytest.mark.parametrize("length", [64, 65, 0])
def test_a_prompt_that_leaves_no_room_is_refused_before_anything_runs(make_engine, length):
    asked = [*requests(count=1), GenerateRequest(token_ids=(1,) * length, group_size=1, key=(0, 0, 1))]
    with pytest.raises(InputError, match=f"prompt 1 has {length} tokens, but the model's context of 64"):
        make_engine().generate(asked, SamplingConfig())


@pytest.mark.parametrize("token", [23, -1])
def test_a_token_outside_the_vocabulary_is_refused(make_engine, token):
    with pytest.raises(InputError, match="vocabulary of 23"):
        make_engine().generate([GenerateRequest(token_ids=(1, token), group_size=1, key=(0, 0, 0))], SamplingConfig())


def test_no_requests_give_no_completions(make_engine):
    assert make_engine().generate([], SamplingConfig()) == []


def test_weights_that_are_not_finite_are_an_error_that_names_the_place(make_engine, wire):
    engine = make_engine()
    engine.load_weights([(n, torch.full_like(t, math.nan)) for n, t in wire(torch.float32)], policy_version=4)
    with pytest.raises(EngineError, match="prompt 0, sibling 0: the logits of completion token 0 are not"):
        engine.generate(requests(), SamplingConfig())


def overflowing_on(token, weights):
    """Return weights that overflow FP16 in the first MLP after this token and no other."""
    named = dict(weights)
    named["model.embed_tokens.weight"][:, 0] = 0
    named["model.embed_tokens.weight"][token, 0] = 1
    named["model.layers.0.self_attn.o_proj.weight"][0] = 0
    for projection in ("gate", "up"):
        named[f"model.layers.0.mlp.{projection}_proj.weight"][:, 0] = 1e3
    return weights


def test_an_overflow_is_blamed_on_the_prompt_that_made_it_and_does_not_outlive_it(make_engine, wire):
    engine, sampling = make_engine("fp16"), SamplingConfig(max_tokens=6)
    expected = engine.generate(requests(), sampling)
    engine.load_weights(overflowing_on(22, wire(torch.float16)), policy_version=4)
    asked = [*requests(), GenerateRequest(token_ids=(4, 22), group_size=1, key=(0, 1, 9))]
    assert all(22 not in request.token_ids for request in requests())
    with pytest.raises(EngineNumericsError, match=r"prompt 5, sibling 0: .* token 0 are not finite in fp16:.*bf16"):
        engine.generate(asked, SamplingConfig(max_tokens=1))
    engine.load_weights(wire(torch.float16), policy_version=3)
    assert engine.generate(requests(), sampling) == expected


def test_closing_twice_is_harmless_and_keeps_the_weights(make_engine):
    engine, sampling = make_engine(), SamplingConfig(max_tokens=4)
    expected = engine.generate(requests(), sampling)
    engine.close()
    engine.close()
    assert engine.generate(requests(), sampling) == expected


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_report_says_what_runs(make_engine, precision):
    report = make_engine(precision, rounding="aligned").report()
    wide = {"lm_head": "fp32", "rope": "fp32"}
    assert report.side == "engine"
    assert report.dtypes == dict.fromkeys(("weights", "compute", "wire", "kv", "norm"), precision) | wide
    assert report.facts["rounding"] == "aligned"
    bf16 = "native" if has_native_matmul(torch.bfloat16) else "widened to fp32"
    kinds = {"fp32": "in fp32", "fp16": "widened to fp32", "bf16": bf16}
    assert report.facts["linear_layers"] == f"14 {kinds[precision]}" and report.facts["matmul_sums"] == "fp32"


def test_a_value_off_the_rollout_grid_shows_in_the_report(make_engine):
    engine = make_engine("fp16")
    weights, name = engine._weights, "model.layers.0.mlp.down_proj.weight"
    parameter = weights._layers[0]["down"]
    parameter.begin()
    parameter.write(name, torch.full(parameter.shape(name), 1 / 3))
    assert engine.report().dtypes["weights"] == "fp32"


@pytest.mark.parametrize("mode", ["engine", "aligned"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", {"preset": "bf16", "half_matmul": "fp32_sums"}])
def test_half_precision_stays_close_to_fp32(make_engine, module, precision, mode):
    request = requests(count=1, group_size=8)[0]
    found = make_engine(precision, rounding=mode).generate([request], SamplingConfig(max_tokens=10))[0]
    worst = 0.0
    for completion in found:
        ids = torch.tensor([request.token_ids + completion.token_ids])
        with torch.no_grad():
            logits = module(ids).logits[0, len(request.token_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(completion.behavior_logprobs)).abs().max().item())
    assert 1e-5 < worst < (0.06 if precision == "fp16" else 0.5)


def test_a_coarser_cache_changes_the_logprobs(make_engine):
    sampling = SamplingConfig(max_tokens=6)
    plain = make_engine("fp16").generate(requests(), sampling)
    coarse = make_engine({"preset": "fp16", "kv_dtype": "bf16"}).generate(requests(), sampling)
    finer = make_engine({"preset": "fp16", "kv_dtype": "fp32"}).generate(requests(), sampling)
    assert finer == plain
    assert [c.behavior_logprobs for g in coarse for c in g] != [c.behavior_logprobs for g in plain for c in g]


def test_buckets_cover_the_active_slots_and_few_more():
    assert [batch_bucket(n, 256) for n in (1, 2, 3, 32, 33, 64, 65, 250)] == [1, 2, 4, 32, 64, 64, 96, 256]
    assert batch_bucket(33, 40) == 40


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_larger_cache_left_by_earlier_requests_changes_no_bit(make_engine, precision):
    used, fresh, sampling = make_engine(precision), make_engine(precision), SamplingConfig(max_tokens=10)
    used.generate(requests(count=12, lengths=(25, 30)), SamplingConfig(max_tokens=30))
    assert used.generate(requests(), sampling) == fresh.generate(requests(), sampling)
