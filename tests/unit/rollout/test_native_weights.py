"""Weights arrive under their Hugging Face names, on the rollout grid, in the tensors that products read."""

from __future__ import annotations

import pytest
import torch

from betterhalf.config.schema import SamplingConfig
from betterhalf.errors import EngineError
from betterhalf.precision.contract import weights_digests
from betterhalf.precision.products import unpacked
from betterhalf.rollout.native.weights import Storage
from betterhalf.types import GenerateRequest


def held(engine):
    return dict(engine._weights.narrowed())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_digests_equal_those_of_the_weights_sent(module, make_engine, precision, wire):
    engine = make_engine(precision)
    sent = wire({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision])
    assert engine.report().digests == weights_digests(sent)
    assert list(held(engine)) and set(held(engine)) == {name for name, _ in module.named_parameters()}
    assert all(torch.equal(held(engine)[name], tensor) for name, tensor in sent)


def test_one_changed_element_changes_its_digest_only(make_engine, wire):
    engine, sent = make_engine("fp16"), wire(torch.float16)
    before = engine.report().digests
    name = "model.layers.1.self_attn.v_proj.weight"
    dict(sent)[name][0, 0] += 1
    engine.load_weights(sent, policy_version=4)
    after = engine.report().digests
    assert [key for key in before if before[key] != after[key]] == [name]


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_loading_replaces_every_value_and_moves_no_plain_buffer(make_engine, precision, wire, packs, monkeypatch):
    monkeypatch.setattr(Storage, "packs", packs)
    engine = make_engine(precision)
    weights = engine._weights
    plain = [weights.embedding, weights.norm, weights.layers[0].input_norm]
    matrices = [weights.head, weights.layers[0].qkv, weights.layers[0].gate_up, weights.layers[0].down]
    before = [tensor.data_ptr() for tensor in (plain if packs else plain + matrices)]
    doubled = {name: 2 * tensor for name, tensor in wire(torch.float32)}
    engine.load_weights(doubled.items(), policy_version=4)
    assert [tensor.data_ptr() for tensor in (plain if packs else plain + matrices)] == before
    assert all(torch.equal(held(engine)[name], doubled[name].to(weights.storage.grid)) for name in doubled)
    assert torch.equal(unpacked(weights.head).float(), weights.embedding.float())
    assert (weights.head is weights.embedding) == (not packs)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_completions_depend_on_the_storage_of_weights_by_rounding_alone(make_engine, precision, monkeypatch):
    request = GenerateRequest(token_ids=(1, 2, 3), group_size=1, key=(0, 1, 0))
    scores = {}
    for packs in (False, True):
        monkeypatch.setattr(Storage, "packs", packs)
        scores[packs] = make_engine(precision).score([(1, 2, 3, 4, 5)])[0]
        assert make_engine(precision).generate([request], SamplingConfig(max_tokens=4))
    assert scores[True] == pytest.approx(scores[False], abs={"fp32": 1e-5, "fp16": 1e-2, "bf16": 1e-1}[precision])


def test_a_half_finished_load_leaves_nothing_behind(make_engine, wire):
    engine, sent = make_engine("fp16"), wire(torch.float16)
    before = weights_digests(held(engine).items())
    with pytest.raises(EngineError, match="did not arrive"):
        engine.load_weights([(name, 2 * tensor) for name, tensor in sent if "k_proj" in name], policy_version=4)
    engine.load_weights(sent, policy_version=4)
    assert weights_digests(held(engine).items()) == before


def test_a_tied_head_that_differs_from_the_embedding_is_an_error(make_engine):
    engine = make_engine("fp16")
    engine._weights.embedding[3, 5] += 1
    with pytest.raises(EngineError, match="tied head and its embedding differ"):
        engine.digests()


def test_fused_projections_hold_their_parts_in_order(module, make_engine):
    layer, state = make_engine("fp32")._weights.layers[1], module.state_dict()
    prefix = "model.layers.1."
    qkv = torch.cat([state[f"{prefix}self_attn.{x}_proj.weight"] for x in "qkv"])
    gate_up = torch.cat([state[f"{prefix}mlp.{x}_proj.weight"] for x in ("gate", "up")])
    assert torch.equal(unpacked(layer.qkv), qkv) and torch.equal(unpacked(layer.gate_up), gate_up)


def test_a_wire_wider_than_the_rollout_is_rounded_once_and_reported(module, make_engine):
    engine = make_engine({"preset": "bf16", "wire_dtype": "fp32"})
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(held(engine)[name], module.state_dict()[name].bfloat16())
    assert engine.report().dtypes["wire"] == "fp32"
    assert engine.report().dtypes["weights"] == "bf16"


def test_a_tied_head_is_one_weight(module, make_engine):
    engine = make_engine("fp16", load=False)
    engine.load_weights(module.state_dict().items(), policy_version=0)
    assert "lm_head.weight" not in held(engine)
    assert torch.equal(unpacked(engine._weights.head), engine._weights.embedding.float())


def test_an_unknown_name_is_named(make_engine):
    with pytest.raises(EngineError, match=r"no weight 'model\.layers\.9\.x'"):
        make_engine().load_weights([("model.layers.9.x", torch.zeros(1))], policy_version=0)


def test_a_missing_weight_is_named(make_engine, wire):
    sent = [(name, tensor) for name, tensor in wire(torch.float32) if name != "model.norm.weight"]
    with pytest.raises(EngineError, match=r"1 weights did not arrive at the engine, 'model\.norm\.weight'"):
        make_engine().load_weights(sent, policy_version=0)


def test_a_weight_sent_twice_is_named(make_engine, wire):
    sent = wire(torch.float32)
    with pytest.raises(EngineError, match=r"'model\.embed_tokens\.weight' arrived twice"):
        make_engine().load_weights([sent[0], *sent], policy_version=0)


def test_a_wrong_shape_is_named(make_engine):
    with pytest.raises(EngineError, match=r"shape \(3,\), the engine's has \(32,\)"):
        make_engine().load_weights([("model.norm.weight", torch.zeros(3))], policy_version=0)
