"""Hugging Face names and tensors read from layers shaped like vLLM's, on one rank and two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from betterhalf.rollout.vllm import weights


class _Layer(nn.Module):
    tp_size = 1

    def __init__(self, weight: Tensor, bias: Tensor | None = None, **facts: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        for name, value in facts.items():
            setattr(self, name, value)


class QKVParallelLinear(_Layer):
    pass


class RowParallelLinear(_Layer):
    pass


class RMSNorm(_Layer):
    pass


class VocabParallelEmbedding(_Layer):
    pass


class ParallelLMHead(VocabParallelEmbedding):
    pass


class FusedMoE(_Layer):
    pass


def numbers(rows: int, columns: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + rows * columns).float().view(rows, columns)


def model(**layers: nn.Module) -> nn.Module:
    built = nn.Module()
    built.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # type: ignore[assignment]
    built.model = nn.Module()
    for name, layer in layers.items():
        (built if name == "lm_head" else built.model).add_module(name, layer)
    return built


def qkv(**facts: Any) -> QKVParallelLinear:
    sizes = {"output_partition_sizes": [4, 2, 2], "input_size": 3, "input_size_per_partition": 3}
    return QKVParallelLinear(numbers(8, 3), torch.arange(8.0), **(sizes | facts))


def test_fused_projections_are_split_under_their_names() -> None:
    found = dict(weights.held(model(qkv_proj=qkv())))
    assert torch.equal(found["model.q_proj.weight"], numbers(4, 3))
    assert torch.equal(found["model.k_proj.weight"], numbers(2, 3, 12))
    assert torch.equal(found["model.v_proj.weight"], numbers(2, 3, 18))
    assert found["model.v_proj.bias"].tolist() == [6.0, 7.0]


def test_expected_shapes_are_those_held() -> None:
    embedding = VocabParallelEmbedding(
        numbers(8, 3), num_embeddings_per_partition=8, org_vocab_size=5, embedding_dim=3, input_size=3
    )
    row = RowParallelLinear(numbers(3, 4), output_partition_sizes=[3], input_size=4)
    built = model(embed_tokens=embedding, qkv_proj=qkv(), o_proj=row, norm=RMSNorm(torch.ones(3)))
    assert weights.expected_shapes(built) == {name: tuple(held.shape) for name, held in weights.held(built)}
    assert weights.expected_shapes(built)["model.embed_tokens.weight"] == (5, 3)


def test_an_emptied_parameter_is_read_through_its_packed_copy() -> None:
    packed = numbers(8, 3)
    layer = qkv()
    layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    layer.cpu_linear = lambda x, weight, bias: x @ packed.T
    found = dict(weights.held(model(qkv_proj=layer)))
    assert torch.equal(found["model.k_proj.weight"], numbers(2, 3, 12))
    packed[4, 0] += 1
    assert not torch.equal(dict(weights.held(model(qkv_proj=layer)))["model.k_proj.weight"], numbers(2, 3, 12))


def test_a_stale_copy_of_a_tied_head_shows_and_is_packed_again() -> None:
    weight = numbers(8, 3)
    facts = {"num_embeddings_per_partition": 8, "org_vocab_size": 8, "embedding_dim": 3}
    embedding, head = VocabParallelEmbedding(weight, **facts), ParallelLMHead(weight, **facts)
    head.weight = embedding.weight
    stale = weight.clone() + 1

    class Method:
        def process_weights_after_loading(self, layer: Any) -> None:
            fresh = layer.weight.clone()
            layer.cpu_linear = lambda x, weight, bias: x @ fresh.T

    head.cpu_linear, head.quant_method = (lambda x, weight, bias: x @ stale.T), Method()
    built = model(embed_tokens=embedding, lm_head=head)
    assert list(weights.expected_shapes(built)) == ["model.embed_tokens.weight"]
    assert torch.equal(dict(weights.held(built))["lm_head.weight"], stale)
    weights.repack_tied_head(built)
    assert list(dict(weights.held(built))) == ["model.embed_tokens.weight"]


def test_two_ranks_make_whole_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four query heads and one key head over two ranks: queries are split, keys are held twice."""
    monkeypatch.setattr(weights, "_over_ranks", lambda layer, mine: [mine, mine + (0 if len(mine) == 2 else 100)])
    layer = qkv(tp_size=2, num_kv_head_replicas=2)
    row = RowParallelLinear(numbers(3, 2), output_partition_sizes=[3], input_size=4, tp_size=2)
    built = model(qkv_proj=layer, o_proj=row)
    found = dict(weights.held(built))
    assert torch.equal(found["model.q_proj.weight"], torch.cat([numbers(4, 3), numbers(4, 3) + 100]))
    assert torch.equal(found["model.k_proj.weight"], numbers(2, 3, 12))
    assert torch.equal(found["model.o_proj.weight"], torch.cat([numbers(3, 2), numbers(3, 2) + 100], dim=1))
    assert weights.expected_shapes(built) == {name: tuple(held.shape) for name, held in found.items()}


def test_layers_without_known_names_are_refused() -> None:
    with pytest.raises(weights.UnknownLayer, match=r"model\.experts \(FusedMoE: weight\) have no Hugging Face names"):
        weights.expected_shapes(model(experts=FusedMoE(numbers(2, 2))))
