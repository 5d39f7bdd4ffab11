"""The gradient of a CPU embedding: an FP32 sum, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from betterhalf.config.schema import PrecisionConfig
from betterhalf.precision.cpu_embedding import CpuEmbedding, use_cpu_embedding
from betterhalf.precision.roles import build_precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_five_thousand_equal_tokens_add_up(dtype: torch.dtype) -> None:
    layer = CpuEmbedding(nn.Embedding(3, 2).to(dtype))
    layer(torch.ones(5000, dtype=torch.int64)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == dtype
    # 5000 is exact in FP16; BF16's neighbours there are 32 apart
    expected = torch.tensor(5000.0).to(dtype).item()
    assert layer.weight.grad.to_dense()[:, 0].tolist() == [0.0, expected, 0.0]


def test_gradient_equals_float64_rounded_once_and_leaves_padding_alone() -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(7, 4, padding_idx=2)
    layer = CpuEmbedding(nn.Embedding(7, 4, padding_idx=2, _weight=plain.weight.detach().half()))
    ids = torch.randint(7, (3, 50))
    upstream = torch.randn(3, 50, 4).half()
    layer(ids).backward(upstream)
    exact = torch.zeros(7, 4, dtype=torch.float64).index_add_(0, ids.flatten(), upstream.double().reshape(-1, 4))
    exact[2] = 0
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_sparse
    torch.testing.assert_close(layer.weight.grad.to_dense().double(), exact, rtol=2**-11 * 1.01, atol=1e-6)
    assert torch.equal(layer(ids), torch.nn.functional.embedding(ids, layer.weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_scaled_embedding_equals_that_of_transformers_forward_and_backward(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = Gemma3TextScaledWordEmbedding(5, 4, 0, embed_scale=640**0.5)
    theirs.weight.data = theirs.weight.data.to(dtype)
    ours = CpuEmbedding(nn.Embedding(5, 4, 0, _weight=theirs.weight.detach().clone()))
    ours.scale = CpuEmbedding(theirs).scale
    ids = torch.tensor([1, 4, 2, 3])
    upstream = torch.randn(4, 4).to(dtype)
    assert torch.equal(ours(ids), theirs(ids))
    for layer in (ours, theirs):
        layer(ids).backward(upstream)
    assert ours.weight.grad is not None and theirs.weight.grad is not None
    assert torch.equal(ours.weight.grad.to_dense(), theirs.weight.grad)


@pytest.mark.parametrize("preset", ["fp16", "bf16", "fp32"])
def test_embeddings_are_replaced_and_keep_their_names(preset: str) -> None:
    precision = build_precision(PrecisionConfig.model_validate({"preset": preset}), torch.device("cpu"))
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(precision.compute_dtype)
    names = set(model.state_dict())
    assert use_cpu_embedding(model, precision) == 1
    assert set(model.state_dict()) == names


def test_a_dense_gradient_holds_the_rows_of_the_sparse_one() -> None:
    ids = torch.tensor([[1, 4, 1], [2, 1, 0]])
    upstream = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    gradients = []
    for sparse in (True, False):
        layer = CpuEmbedding(nn.Embedding(6, 3, padding_idx=2, _weight=torch.ones(6, 3).half()))
        layer.sparse = sparse
        (layer(ids) * upstream).sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.is_sparse == sparse
        gradients.append(layer.weight.grad.to_dense())
    assert torch.equal(*gradients) and not gradients[1][[2, 3, 5]].any()
