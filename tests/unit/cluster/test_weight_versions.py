"""Weights in parts: bits, order and digests survive the object store, for which a dictionary stands here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.thread_processes import stand_in_store

from betterhalf.cluster.weight_versions import Sent, SentWeights, StoredWeights, read_parts, store_parts
from betterhalf.errors import TrainerDiedError
from betterhalf.precision.contract import tensor_digest


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    return stand_in_store(monkeypatch)


def weights(dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    draws = torch.Generator().manual_seed(3)
    shapes = {"wide": (5, 3), "transposed": (4, 2), "number": ()}
    tensors = {name: torch.randn(shape, generator=draws).to(dtype) for name, shape in shapes.items()}
    tensors["transposed"] = tensors["transposed"].t()
    return list(tensors.items())


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_weights_come_back_with_the_same_bits_in_the_same_order(store: dict[int, Any], name: Any) -> None:
    from betterhalf.precision.formats import torch_dtype

    sent = weights(torch_dtype(name))
    stored = StoredWeights(store_parts(sent, name), 7, "settled")
    assert (stored.policy_version, stored.model_config, len(stored.parts)) == (7, "settled", 1)
    assert stored.num_bytes == sum(tensor.nbytes for _, tensor in sent)
    for (sent_name, expected), (found_name, found) in zip(sent, stored, strict=True):
        assert found_name == sent_name and found.dtype == expected.dtype
        assert found.shape == expected.shape and torch.equal(found, expected)
        found.add_(1)  # a copy: the store itself is read-only
    assert stored.digests() == {one: tensor_digest(tensor) for one, tensor in sent}
    assert [one for one, _ in stored] == [one for one, _ in sent]


def test_a_part_is_complete_once_it_has_its_size(store: dict[int, Any]) -> None:
    sent = [(f"w{index}", torch.zeros(10)) for index in range(5)]
    parts = store_parts(iter(sent), "fp32", part_bytes=80)
    assert [part.names for part in parts] == [("w0", "w1"), ("w2", "w3"), ("w4",)]
    assert [part.num_bytes for part in parts] == [80, 80, 40]
    assert [name for name, _ in read_parts(parts)] == [name for name, _ in sent]


def test_weights_that_never_change_have_parts_of_their_own(store: dict[int, Any]) -> None:
    sent = [(f"w{index}", torch.full((10,), float(index))) for index in range(5)]
    digests = {name: tensor_digest(tensor) for name, tensor in sent}
    parts = store_parts(iter(sent), "fp32", part_bytes=80, unchanging={"w0", "w2", "w4"})
    assert {part.names: part.unchanging for part in parts} == {
        ("w0", "w2"): True,
        ("w1", "w3"): False,
        ("w4",): True,
    }
    whole = StoredWeights(parts, 7, "settled")
    changed = whole.changed()
    assert changed is not None and [name for name, _ in changed] == ["w1", "w3"] and changed.num_bytes == 80
    assert changed.digests() == whole.digests() == digests and changed.policy_version == 7
    assert changed.whole() is whole is whole.whole()
    assert StoredWeights(store_parts(sent, "fp32"), 7, "settled").changed() is None


def test_digests_are_those_in_the_format_of_the_engine(store: dict[int, Any]) -> None:
    sent = weights(torch.float32)
    (part,) = store_parts(sent, "bf16")
    assert part.digests["wide"] == tensor_digest(sent[0][1].bfloat16()) != tensor_digest(sent[0][1])


def test_weights_that_were_lost_with_rank_0_are_an_error_of_the_trainer(store: dict[int, Any]) -> None:
    parts = store_parts(weights(torch.float32), "fp32")
    store.clear()
    with pytest.raises(TrainerDiedError, match="lost with rank 0"):
        list(read_parts(parts))


def test_weights_that_were_sent_are_stored_only_when_they_are_needed(store: dict[int, Any]) -> None:
    sent = weights(torch.float16)
    digests = {name: tensor_digest(tensor) for name, tensor in sent}
    stream = SentWeights(3, "settled", 46, lambda: store_parts(sent, "fp16"))
    stream.note(Sent(policy_version=3, digests=digests))
    assert stream.digests() == digests and stream.num_bytes == 46 and not store
    assert [name for name, _ in stream] == list(digests) and len(store) == 1
    assert stream.parts and list(stream) and len(store) == 1, "stored once"


def test_weights_that_were_not_sent_have_the_digests_of_the_store(store: dict[int, Any]) -> None:
    sent = weights(torch.float16)
    stream = SentWeights(3, "settled", 46, lambda: store_parts(sent, "fp16"))
    assert stream.digests() == {name: tensor_digest(tensor) for name, tensor in sent}
    with pytest.raises(AssertionError, match="updated during a weight sync"):
        stream.note(Sent(policy_version=4, digests={}))
