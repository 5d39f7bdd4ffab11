"""Digests of weights, and the comparison of the reports of trainer and engine."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from betterhalf.errors import ContractError, WeightSyncError
from betterhalf.precision import contract as subject
from betterhalf.precision.contract import (
    NotedWeights,
    SideReport,
    compare,
    enforce,
    tensor_digest,
    verify_sync,
    weights_digests,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def random_tensor(size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(st.integers(1, 70), st.sampled_from(DTYPES), st.data())
@settings(max_examples=150, deadline=None)
def test_any_flipped_bit_changes_the_digest(size: int, dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = random_tensor(size, dtype)
    before = tensor_digest(tensor)
    width = torch.finfo(dtype).bits
    place, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, width - 1))
    mask = 1 << bit if bit < width - 1 else -(1 << bit)
    tensor.view(BITS[dtype])[place] ^= mask
    assert tensor_digest(tensor) != before


@given(st.integers(2, 70), st.sampled_from(DTYPES), st.data())
@settings(max_examples=150, deadline=None)
def test_any_swap_of_two_different_elements_changes_the_digest(
    size: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    tensor = torch.arange(size).to(dtype)
    before = tensor_digest(tensor)
    first, second = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2, unique=True))
    tensor[[first, second]] = tensor[[second, first]]
    assert tensor_digest(tensor) != before


@given(st.lists(st.integers(0, 63), min_size=2, max_size=2, unique=True), st.integers(0, 15))
@settings(max_examples=150, deadline=None)
def test_the_same_bit_flipped_in_two_places_changes_the_digest(places: list[int], bit: int) -> None:
    tensor = torch.zeros(64, dtype=torch.int16)
    before = tensor_digest(tensor)
    tensor[places] ^= 1 << bit if bit < 15 else -(1 << 15)
    assert tensor_digest(tensor) != before


def test_dtype_and_shape_are_part_of_the_digest() -> None:
    zeros = [torch.zeros(4, dtype=dtype) for dtype in DTYPES]
    shapes = [torch.zeros(shape, dtype=torch.float16) for shape in [(2, 2), (1, 4), (4, 1), (5,), (0,), (0, 3), ()]]
    digests = [tensor_digest(tensor) for tensor in zeros + shapes]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_sign_of_a_zero_is_left_out(dtype: torch.dtype) -> None:
    """A product with a packed weight does not show the sign of a zero, but it shows any other sign."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = torch.tensor([0.0, 1.0, 0.0, smallest, 2.0], dtype=dtype)
    digest = tensor_digest(values)
    for place in range(5):
        flipped = values.clone()
        flipped[place] = -flipped[place]
        assert (tensor_digest(flipped) == digest) == (place in (0, 2))


def test_strides_and_alignment_do_not_matter() -> None:
    base = random_tensor(48, torch.float16).view(6, 8)
    assert tensor_digest(base.t()) == tensor_digest(base.t().contiguous())
    for start in range(1, 8):
        part = base.view(-1)[start : start + 21]
        assert tensor_digest(part) == tensor_digest(part.clone())


def test_the_digest_does_not_depend_on_how_much_is_mixed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_tensor(4099, torch.float16)
    digests = set()
    for words in (1024, 7, 100):
        monkeypatch.setattr(subject, "_WORDS_AT_ONCE", words)
        digests.add(tensor_digest(tensor))
    assert len(digests) == 1


def test_the_digest_is_splitmix64_computed_with_python_integers() -> None:
    tensor = random_tensor(11, torch.float16)
    raw = tensor.view(torch.uint8).numpy().tobytes()
    raw += bytes(-len(raw) % 8)
    total = 0
    for position in range(len(raw) // 8):
        word = int.from_bytes(raw[8 * position : 8 * position + 8], "little")
        z = (word + position * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        total += (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    empty_header = int(tensor_digest(torch.zeros(11, dtype=torch.float16)), 16) - mixed_zero_words(3)
    assert int(tensor_digest(tensor), 16) == (total + empty_header) % 2**64


def mixed_zero_words(count: int) -> int:
    total = 0
    for position in range(count):
        z = position * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        total += (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return total


def test_ten_thousand_similar_tensors_have_different_digests() -> None:
    tensors = (torch.tensor([float(i % 100), float(i // 100)], dtype=torch.float16) for i in range(10_000))
    assert len({tensor_digest(tensor) for tensor in tensors}) == 10_000


def test_weights_digests_keep_names_and_order() -> None:
    pairs = [("b", torch.ones(2)), ("a", torch.zeros(2))]
    assert list(weights_digests(pairs).items()) == [(name, tensor_digest(tensor)) for name, tensor in pairs]


def sides(**changes: Any) -> tuple[SideReport, SideReport]:
    """Return the reports of an FP16 pair; `engine_kv="bf16"` or `trainer_wire=...` changes one region."""
    trainer = {"weights": "fp16", "compute": "fp16", "wire": "fp16", "lm_head": "fp32", "rope": "fp32", "norm": "fp32"}
    trainer |= {"master": "fp32", "gradients": "fp32", "optimizer": "fp32"}
    engine = {"weights": "fp16", "compute": "fp16", "wire": "fp16", "kv": "fp16"}
    engine |= {"lm_head": "fp32", "rope": "fp32", "norm": "fp16"}
    for key, value in changes.items():
        side, region = key.split("_", 1)
        (trainer if side == "trainer" else engine)[region] = value
    digests = {"model.embed_tokens.weight": "00aa", "model.norm.weight": "00bb"}
    return (
        SideReport(side="trainer", dtypes=trainer, facts={"attention": "sdpa", "torch": "2.13"}, digests=digests),
        SideReport(side="engine", dtypes=engine, facts={"attention": "own", "torch": "2.13"}, digests=dict(digests)),
    )


def statuses(contract: subject.Contract) -> dict[str, str]:
    return {row.region: row.status for row in contract.rows}


def test_equal_sides_pass() -> None:
    contract = compare(*sides(), allow_difference=False)
    enforce(contract)
    assert contract.ok and contract.first_difference is None
    assert [row.region for row in contract.rows[:4]] == ["compute", "wire", "kv", "weights"]
    assert {row.status for row in contract.rows[:4]} == {"equal"}


@pytest.mark.parametrize(
    ("change", "region"),
    [
        ({"engine_compute": "bf16"}, "compute"),
        ({"trainer_compute": "fp32"}, "compute"),
        ({"trainer_wire": "bf16"}, "wire"),
        ({"engine_wire": "fp32"}, "wire"),
        ({"trainer_wire": "bf16", "engine_wire": "bf16"}, "wire"),
        ({"engine_kv": "bf16"}, "kv"),
    ],
)
def test_a_difference_in_a_required_region_is_refused(change: dict[str, str], region: str) -> None:
    contract = compare(*sides(**change), allow_difference=False)
    assert not contract.ok and statuses(contract)[region] == "differs"
    with pytest.raises(ContractError) as caught:
        enforce(contract)
    message = str(caught.value)
    assert contract.table() in message and "precision.allow_difference=true" in message
    assert f"first difference: {region} is" in message


@pytest.mark.parametrize(
    "held",
    [
        {"model.embed_tokens.weight": "00aa", "model.norm.weight": "beef"},
        {"model.embed_tokens.weight": "00aa"},
        {"model.embed_tokens.weight": "00aa", "model.norm.weight": "00bb", "lm_head.weight": "00cc"},
    ],
)
def test_different_missing_and_unknown_weights_are_refused(held: dict[str, str]) -> None:
    trainer, engine = sides()
    contract = compare(
        trainer,
        SideReport(side="engine", dtypes=engine.dtypes, facts=engine.facts, digests=held),
        allow_difference=False,
    )
    assert statuses(contract)["weights"] == "differs"
    assert contract.first_difference is not None
    assert ("lm_head.weight" if len(held) == 3 else "model.norm.weight") in contract.first_difference


def with_islands(trainer: str | None, engine: str | None) -> subject.Contract:
    pair = sides()
    for side, names in zip(pair, (trainer, engine), strict=True):
        side.facts.update({} if names is None else {"fp32_modules": names})
    return compare(*pair, allow_difference=False)


@pytest.mark.parametrize(("trainer", "engine"), [("none", "none"), ("none", None), (None, None)])
def test_sides_without_islands_have_no_row_for_them(trainer: str | None, engine: str | None) -> None:
    contract = with_islands(trainer, engine)
    assert contract.ok and not {"islands", "fp32_modules"} & set(statuses(contract))


def test_equal_islands_are_a_required_row_that_passes() -> None:
    contract = with_islands("model.layers.1.mlp", "model.layers.1.mlp")
    assert contract.ok and statuses(contract)["islands"] == "equal" and "fp32_modules" not in statuses(contract)


@pytest.mark.parametrize("engine", [None, "none", "model.layers.2.mlp"])
def test_islands_of_the_trainer_alone_or_elsewhere_in_the_engine_are_refused(engine: str | None) -> None:
    contract = with_islands("model.layers.1.mlp", engine)
    assert not contract.ok and statuses(contract)["islands"] == "differs"
    held = engine or "none"
    assert contract.first_difference == f"islands are model.layers.1.mlp in the trainer and {held} in the engine"


def test_other_regions_are_reported_and_never_refused() -> None:
    contract = compare(*sides(engine_lm_head="fp16", engine_rope="fp16", engine_weights="fp32"), allow_difference=False)
    assert contract.ok
    reported = {region for region, status in statuses(contract).items() if status == "reported"}
    assert {
        "lm_head",
        "rope",
        "norm",
        "held weights",
        "attention",
        "torch",
        "master",
        "gradients",
        "optimizer",
    } == reported


def test_an_allowed_difference_passes_and_says_so() -> None:
    contract = compare(*sides(engine_compute="bf16", engine_kv="bf16"), allow_difference=True)
    enforce(contract)
    assert contract.ok and contract.first_difference is not None
    assert contract.table().count("differs, allowed") == 2


def test_the_table_is_at_most_100_columns_wide_and_shows_every_row() -> None:
    trainer, engine = sides(trainer_wire="bf16")
    trainer.facts["matrix products"] = "operands on the half grid, sums in FP32, one rounding of each result"
    engine.facts["libraries"] = (
        "torch 2.13.0+cpu, transformers 5.19.0, and a_very_long_name_without_any_blank_in_it_at_all"
    )
    table = compare(trainer, engine, allow_difference=False).table()
    assert max(len(line) for line in table.splitlines()) <= 100
    squeezed = " ".join(table.split())
    for word in (
        "compute",
        "held weights",
        "bf16 (computes in fp16)",
        "reported, other",
        "reported, same",
        "2.13.0+cpu",
    ):
        assert word in squeezed


def test_the_table_aligns_its_columns() -> None:
    lines = compare(*sides(), allow_difference=False).table().splitlines()
    assert {line[14] + line[47] for line in lines} == {"  "}
    assert lines[2].split() == ["compute", "fp16", "fp16", "equal"]


def test_the_contract_survives_json() -> None:
    contract = compare(*sides(engine_kv="fp32"), allow_difference=False)
    saved = json.loads(json.dumps(contract.to_json()))
    assert saved["ok"] is False and saved["first_difference"] == contract.first_difference
    assert saved["rows"][2] == {"region": "kv", "trainer": "fp16", "engine": "fp32", "status": "differs"}
    assert len(saved["rows"]) == len(contract.rows)


def test_a_faithful_sync_passes() -> None:
    sent, held = {"a": "1", "b": "2"}, {"b": "2", "a": "1"}
    assert verify_sync(sent, held) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("held", "name"),
    [
        ({"a": "1", "b": "3", "c": "4"}, "b"),
        ({"a": "1", "c": "3"}, "b"),
        ({"a": "1", "b": "2", "c": "3", "d": "4"}, "d"),
    ],
)
def test_an_unfaithful_sync_names_the_first_parameter(held: dict[str, str], name: str) -> None:
    with pytest.raises(WeightSyncError, match=f"the first is {name} "):
        verify_sync({"a": "1", "b": "2", "c": "3"}, held)


def test_a_stream_notes_what_passes_and_reads_itself_if_nobody_does() -> None:
    weights = {"a": random_tensor(3, torch.float32), "b": random_tensor(5, torch.float32)}
    reads: list[int] = []

    def read(leave_out: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        reads.append(1)
        yield from weights.items()

    stream = NotedWeights(read, policy_version=4, rollout_dtype="fp16")
    assert stream.policy_version == 4 and not reads
    first = next(iter(stream))
    assert first[0] == "a"
    # a stream that was abandoned is not whole
    assert stream.digests() == {name: tensor_digest(weight.half()) for name, weight in weights.items()}
    assert len(reads) == 2 and stream.num_bytes == 4 * (3 + 5) and len(reads) == 2
    assert [name for name, _ in stream] == ["a", "b"] and len(reads) == 3
