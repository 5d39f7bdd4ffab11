"""Gradients of the demo model in every precision, with and without importance weights."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from betterhalf.config.schema import RunConfig
from betterhalf.errors import InputError
from betterhalf.examine.gradient import measure_gradients
from betterhalf.examine.subject import Subject, engine_in, open_subject, sample_groups_of, trainer_in
from betterhalf.training.pack import by_rollout, pack_step
from betterhalf.types import Completion, DtypeName, Prompt, Rollout

Groups = list[tuple[Prompt, tuple[Completion, ...]]]


def config(**overrides: Any) -> RunConfig:
    data = {
        "device": "cpu",
        "sampling": {"max_tokens": 64},
        "training": {"tokens_per_micro_batch": 200, "optimizer_steps": 1},
        "probe": {"gradient_completions": 8},
    }
    return RunConfig.model_validate(data | overrides)


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    with open_subject("demo", config()) as opened:
        yield opened


@pytest.fixture(scope="module")
def groups(subject: Subject) -> dict[DtypeName, Groups]:
    return {dtype: sampled(subject, dtype) for dtype in ("fp16", "bf16", "fp32")}


@pytest.fixture(scope="module")
def measured(subject: Subject, groups: dict[DtypeName, Groups]) -> dict[str, Any]:
    return measure_gradients(subject, groups)


def sampled(subject: Subject, dtype: DtypeName) -> Groups:
    prompts = subject.prompts(2)
    with engine_in(subject, dtype) as engine:
        return list(zip(prompts, sample_groups_of(subject, engine, prompts, 4), strict=True))


def with_config(subject: Subject, **overrides: Any) -> Subject:
    return dataclasses.replace(subject, config=config(**overrides))


def row(result: dict[str, Any], train: str, initial: float) -> dict[str, Any]:
    (found,) = [r for r in result["rows"] if r["train"] == train and r["initial_loss_scale"] == initial]
    return dict(found)


def with_trainer_logprobs(subject: Subject, dtype: DtypeName, groups: Groups, weight: float = 1.0) -> Groups:
    """Return the completions with behavior logprobs that make every sequence's pi / mu equal `weight`."""
    flat = [Rollout(prompt=prompt, completion=c, text="", reward=0.0) for prompt, siblings in groups for c in siblings]
    trainer = trainer_in(subject, dtype)
    logprobs: dict[int, list[float]] = {}
    for pack in pack_step(flat, [1.0] * len(flat), subject.config, 0).packs:
        logprobs |= by_rollout(pack, trainer.measure([pack])[0].logprobs_C)
    scored = iter([(first - math.log(weight), *rest) for _, (first, *rest) in sorted(logprobs.items())])
    return [
        (prompt, tuple(dataclasses.replace(completion, behavior_logprobs=next(scored)) for completion in siblings))
        for prompt, siblings in groups
    ]


def test_fp32_against_itself_is_exact(measured: dict[str, Any]) -> None:
    own = row(measured, "fp32", 1.0)
    assert (own["relative_error"], own["cosine"], own["zeroed_fraction"]) == (0.0, 1.0, 0.0)
    assert own["overflow"] is False


def test_bf16_is_several_times_further_from_fp32_than_fp16(measured: dict[str, Any]) -> None:
    fp16, bf16 = row(measured, "fp16", 65536.0), row(measured, "bf16", 1.0)
    assert 0 < 4 * fp16["relative_error"] < bf16["relative_error"] < 0.1
    assert 0.99 < bf16["cosine"] < fp16["cosine"] <= 1.0


def test_fp16_loses_more_entries_without_a_loss_scale(measured: dict[str, Any]) -> None:
    scaled, unscaled = row(measured, "fp16", 65536.0), row(measured, "fp16", 1.0)
    assert unscaled["zeroed_fraction"] > scaled["zeroed_fraction"] + 0.001
    assert unscaled["relative_error"] > 2 * scaled["relative_error"]


def test_bf16_weights_rotate_the_gradient_further_than_fp16_weights(measured: dict[str, Any]) -> None:
    change = {entry["rollout"]: entry["relative_change"] for entry in measured["weights"]}
    assert [entry["rollout"] for entry in measured["weights"]] == ["fp16", "bf16", "fp32"]
    assert change["fp32"] < 1e-4 < 3 * change["fp16"] < change["bf16"] < 1.0


def test_the_batch_is_described(measured: dict[str, Any], groups: dict[DtypeName, Groups]) -> None:
    assert measured["completions"] == 8 and measured["micro_batches"] > 1
    assert measured["tokens"] == sum(len(c.token_ids) for _, siblings in groups["fp32"] for c in siblings)


@pytest.mark.parametrize("weight", [1.0, 2.25])
def test_equal_weights_stretch_the_gradient_without_rotating_it(
    subject: Subject, groups: dict[DtypeName, Groups], weight: float
) -> None:
    (entry,) = measure_gradients(subject, {"fp32": with_trainer_logprobs(subject, "fp32", groups["fp32"], weight)})[
        "weights"
    ]
    assert entry["relative_change"] == pytest.approx(weight - 1, abs=1e-5)
    assert entry["cosine"] == pytest.approx(1.0, abs=1e-9) and entry["max_weight"] == pytest.approx(weight, rel=1e-5)
    assert entry["ess_fraction"] == pytest.approx(1.0, abs=1e-9)


def test_groups_of_equal_rewards_get_seeded_signs(subject: Subject, groups: dict[DtypeName, Groups]) -> None:
    """A group of one has no baseline, so its advantage would be zero."""
    alone = {"fp16": [(prompt, siblings[:1]) for prompt, siblings in groups["fp16"]]}
    first, second = measure_gradients(subject, alone), measure_gradients(subject, alone)
    assert first["advantages"] == "signs" and first["trained_completions"] == 2
    assert first == second


def test_rewards_are_used_when_they_differ(subject: Subject, groups: dict[DtypeName, Groups]) -> None:
    class Judge:
        """Task that rewards only the first sibling of each prompt."""

        def rewards(self, prompts: list[Prompt], texts: list[str], reasons: list[str]) -> list[float]:
            return [float(index % 4 == 0) for index in range(len(prompts))]

    judged = dataclasses.replace(subject, task=Judge())  # type: ignore[arg-type]
    result = measure_gradients(judged, {"fp32": groups["fp32"]})
    assert result["advantages"] == "rewards" and result["trained_completions"] == 8


def test_a_loss_scale_that_overflows_is_halved_until_the_gradient_is_finite(
    subject: Subject, groups: dict[DtypeName, Groups]
) -> None:
    start = 2.0**30
    huge = with_config(subject, precision={"loss_scale": {"initial": start}})
    result = measure_gradients(huge, {"fp16": groups["fp16"]})
    found = row(result, "fp16", start)
    assert found["overflow"] is True and found["halvings"] > 0
    assert found["loss_scale"] == start / 2 ** found["halvings"]
    assert found["relative_error"] < 0.01 and math.isfinite(result["weights"][0]["relative_change"])


def test_a_forward_pass_that_overflows_is_reported_and_not_repeated(
    subject: Subject, groups: dict[DtypeName, Groups]
) -> None:
    module = copy.deepcopy(subject.model.module)
    with torch.no_grad():
        module.get_decoder().layers[0].mlp.down_proj.weight.mul_(1e7)
    broken = dataclasses.replace(subject, model=dataclasses.replace(subject.model, module=module))
    result = measure_gradients(broken, {"fp32": groups["fp32"]})
    found = row(result, "fp16", 65536.0)
    assert found["overflow"] is True and found["halvings"] == 0 and math.isnan(found["relative_error"])
    assert math.isfinite(row(result, "bf16", 1.0)["relative_error"])


def test_only_the_wanted_number_of_completions_is_used(subject: Subject, groups: dict[DtypeName, Groups]) -> None:
    few = with_config(subject, probe={"gradient_completions": 3})
    assert measure_gradients(few, {"bf16": groups["bf16"]})["completions"] == 3


def test_truncated_completions_count_whatever_training_does_with_them(
    subject: Subject, groups: dict[DtypeName, Groups]
) -> None:
    cut = [
        (prompt, tuple(dataclasses.replace(one, finish_reason="length") for one in each))
        for prompt, each in groups["bf16"]
    ]
    masking = with_config(subject, algorithm={"mask_truncated": True})
    found = measure_gradients(masking, {"bf16": cut})
    assert found["trained_completions"] == measure_gradients(subject, {"bf16": cut})["trained_completions"] > 0


def test_without_completions_there_is_no_gradient(subject: Subject) -> None:
    with pytest.raises(InputError, match="no completions"):
        measure_gradients(subject, {"fp32": []})
