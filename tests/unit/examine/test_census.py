"""The census on the demo model: its hooks change nothing, its magnitudes are exact, and it names overflows."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from betterhalf.algorithms.presets import PRESETS
from betterhalf.batches import MicroBatch
from betterhalf.config.schema import RunConfig
from betterhalf.diagnostics.numerics import BACKWARD_KINDS, Kind, Spot
from betterhalf.examine import census as census_module
from betterhalf.examine.census import (
    CENSUS_TOKENS,
    CensusBatch,
    Reference,
    census_batch,
    reference,
    take_census,
)
from betterhalf.examine.module_hooks import observe_module
from betterhalf.examine.subject import Subject, open_subject, trainer_in
from betterhalf.models.attention import PackLayout
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion

CONFIG = {"task": {"type": "arithmetic", "num_prompts": 8}}
LAYER = "model.layers.1"
Mlp = torch.nn.Module


@pytest.fixture(scope="module")
def subject() -> Subject:
    with open_subject("demo", RunConfig.model_validate(CONFIG)) as opened:
        return opened


@pytest.fixture(scope="module")
def batch(subject: Subject) -> CensusBatch:
    return batch_of(subject)


@pytest.fixture(scope="module")
def truth(subject: Subject, batch: CensusBatch) -> Reference:
    return reference(subject, batch)


def batch_of(subject: Subject, prompts: int = 4, group_size: int = 2, length: int = 20) -> CensusBatch:
    """Return a batch of prompts followed by seeded random tokens."""
    generator = torch.Generator().manual_seed(0)
    groups = [
        [
            Completion(
                token_ids=tuple(torch.randint(1, 15, (length,), generator=generator).tolist()),
                behavior_logprobs=(0.0,) * length,
                finish_reason="length",
                policy_version=0,
            )
            for _ in range(group_size)
        ]
        for _ in range(prompts)
    ]
    return census_batch(subject, subject.prompts(prompts), groups)


@pytest.fixture
def broken() -> Callable[[Callable[[Mlp], None]], tuple[Subject, CensusBatch, Reference]]:
    """Return the demo model with the MLP of its second block changed, its batch, and its FP32 reference."""

    def make(change: Callable[[Mlp], None]) -> tuple[Subject, CensusBatch, Reference]:
        with open_subject("demo", RunConfig.model_validate(CONFIG)) as opened, torch.no_grad():
            change(opened.model.module.get_submodule(f"{LAYER}.mlp"))
        batch = batch_of(opened)
        return opened, batch, reference(opened, batch)

    return make


def gradients_and_loss(trainer: PolicyTrainer, batch: CensusBatch) -> dict[str, torch.Tensor]:
    (micro,) = batch.micro_batches
    anchored = replace(micro, proximal_logprobs_C=trainer.measure([micro])[0].logprobs_C)
    stats = trainer.forward_backward([anchored], PRESETS["grpo"], batch.denominators)
    return {"loss": stats.loss, **{name: gradient.clone() for name, gradient in trainer.weights.gradients()}}


# -- hooks


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_hooks_change_no_bit(subject: Subject, batch: CensusBatch, dtype: str) -> None:
    plain = gradients_and_loss(trainer_in(subject, dtype), batch)  # type: ignore[arg-type]
    trainer = trainer_in(subject, dtype)  # type: ignore[arg-type]
    with observe_module(trainer.module, lambda name, kind, x: None):
        seen = gradients_and_loss(trainer, batch)
    assert plain.keys() == seen.keys()
    assert all(torch.equal(plain[name], seen[name]) for name in plain)


def test_hooks_are_removed_afterwards_and_keep_nothing_alive(subject: Subject, batch: CensusBatch) -> None:
    trainer = trainer_in(subject, "fp16")
    places: list[Spot] = []
    weight = weakref.ref(trainer.module.get_submodule(f"{LAYER}.mlp.down_proj").weight)
    with observe_module(trainer.module, lambda name, kind, x: places.append(Spot(module=name, kind=kind))):
        gradients_and_loss(trainer, batch)
    count = len(places)
    gradients_and_loss(trainer, batch)
    assert len(places) == count > 0
    del trainer
    gc.collect()
    assert weight() is None


def test_values_are_seen_in_the_order_of_computation(subject: Subject, batch: CensusBatch) -> None:
    trainer = trainer_in(subject, "fp32")
    places: list[tuple[str, Kind]] = []
    with observe_module(trainer.module, lambda name, kind, x: places.append((name, kind))):
        trainer.measure(batch.micro_batches)
        trainer.forward_backward(batch.micro_batches, PRESETS["pg_seq_is"], batch.denominators)
    first = places.index
    mlp = f"{LAYER}.mlp"
    assert first((f"{mlp}.gate_proj", "forward")) < first((f"{mlp}.down_proj", "input"))
    assert first((f"{mlp}.down_proj", "input")) < first((f"{mlp}.down_proj", "forward")) < first((LAYER, "forward"))
    assert first((LAYER, "forward")) < first((LAYER, "backward"))
    assert first((f"{mlp}.down_proj", "backward")) < first((f"{mlp}.up_proj", "backward"))
    assert first(("lm_head", "gradient")) < first(("model.layers.0", "backward"))


def test_an_input_is_shown_only_if_it_is_not_the_output_of_a_module(truth: Reference) -> None:
    inputs = {spot.module for spot in truth.sizes if spot.kind == "input" and spot.module.startswith(LAYER)}
    assert inputs == {
        f"{LAYER}.self_attn.o_proj",
        f"{LAYER}.post_attention_layernorm",
        f"{LAYER}.mlp.down_proj",
    }


# -- the FP32 reference


def test_magnitudes_are_those_of_the_model(subject: Subject, batch: CensusBatch, truth: Reference) -> None:
    (micro,) = batch.micro_batches
    module = trainer_in(subject, "fp32").module
    down = module.get_submodule(f"{LAYER}.mlp.down_proj")
    caught: list[torch.Tensor] = []
    down.register_forward_hook(lambda _, inputs, output: caught.extend((inputs[0].detach(), output.detach())))
    module.get_decoder()(
        input_ids=micro.token_ids_T.unsqueeze(0),
        position_ids=micro.position_ids_T.unsqueeze(0),
        layout=PackLayout(micro.segments),
        use_cache=False,
    )
    for kind, value in zip(("input", "forward"), caught, strict=True):
        sizes = truth.sizes[Spot(module=f"{LAYER}.mlp.down_proj", kind=kind)]  # type: ignore[arg-type]
        assert sizes.max_abs == pytest.approx(float(value.abs().max()), rel=1e-6)
        assert sizes.nonzero == int(value.count_nonzero())
    assert truth.sizes[Spot(module=f"{LAYER}.mlp.down_proj", kind="weight")].max_abs == float(
        down.weight.detach().abs().max()
    )


def test_gradient_magnitudes_are_those_that_training_sums(
    subject: Subject, batch: CensusBatch, truth: Reference
) -> None:
    gradients = gradients_and_loss(trainer_in(subject, "fp32"), batch)
    for name in (f"{LAYER}.mlp.down_proj", "lm_head", "model.embed_tokens", "model.norm"):
        largest = float(gradients[f"{name}.weight"].abs().max())
        assert truth.sizes[Spot(module=name, kind="gradient")].max_abs == pytest.approx(largest, rel=1e-5)
        assert torch.equal(truth.nonzero[f"{name}.weight"], gradients[f"{name}.weight"] != 0)


def test_every_layer_and_leaf_is_there_in_model_order(subject: Subject, truth: Reference) -> None:
    modules = list(dict.fromkeys(spot.module for spot in truth.sizes))
    names = [name for name, _ in subject.model.module.named_modules()]
    assert modules == [name for name in names if name in modules]
    leaves = {name for name, part in subject.model.module.named_modules() if name and not any(part.children())}
    assert set(modules) == (leaves | {f"model.layers.{n}" for n in range(3)}) - {"model.rotary_emb"}


# -- the batch


def test_the_batch_alternates_advantages_and_has_the_denominators_of_training(subject: Subject) -> None:
    batch = batch_of(subject, prompts=3, group_size=2)
    (micro,) = batch.micro_batches
    by_rollout = dict(zip(micro.rollout_index_S, micro.advantages_S.tolist(), strict=True))
    assert [by_rollout[index] for index in range(6)] == [1.0, -1.0] * 3
    # By default 32 prompts with 8 siblings each make four optimizer steps.
    assert batch.denominators.sequences == 64
    assert batch.denominators.tokens == 64 * 20
    assert batch.denominators.max_tokens == subject.config.sampling.max_tokens


@pytest.mark.parametrize(
    "algorithm", [{"mask_truncated": True}, {"preset": "rloo", "score_centering": 4}], ids=["masked", "centred"]
)
def test_the_batch_needs_nothing_of_the_engine_that_sampled_it(algorithm: dict[str, Any]) -> None:
    """Every completion is truncated here, and comes without the engine's most likely tokens."""
    settings = RunConfig.model_validate({**CONFIG, "algorithm": algorithm})
    with open_subject("demo", settings) as opened:
        batch = batch_of(opened)
        found = reference(opened, batch)
    assert sum(micro.num_sequences for micro in batch.micro_batches) == 8
    assert any(mask.any() for mask in found.nonzero.values())


def test_the_batch_ends_at_its_tokens_but_has_two_completions(subject: Subject) -> None:
    apart = sum(map(sequence_tokens, batch_of(subject, prompts=8, group_size=8).micro_batches))
    assert CENSUS_TOKENS - 40 < apart <= CENSUS_TOKENS
    long = batch_of(subject, prompts=2, group_size=3, length=CENSUS_TOKENS)
    assert sum(micro.num_sequences for micro in long.micro_batches) == 2


def sequence_tokens(micro: MicroBatch) -> int:
    """Return the number of tokens of all sequences, prompt and completion, without sharing prompts."""
    counts = torch.bincount(micro.sequence_index_C, minlength=micro.num_sequences).tolist()
    prompts = [int(micro.position_ids_T[rows[0]]) + 1 for rows in micro.loss_rows_C.split(counts)]
    return sum(prompts) + sum(counts)


# -- passes in the precision under test


def test_the_largest_safe_scale_is_finite_and_the_next_is_not(
    subject: Subject, batch: CensusBatch, truth: Reference
) -> None:
    census = take_census(subject, "fp16", batch, truth)
    assert census.first_forward is None and census.first_backward is None
    safe = census.largest_safe_loss_scale
    assert safe is not None and census.loss_scale == safe / 4
    for scale, finite in ((safe, True), (2 * safe, False)):
        trainer = trainer_in(subject, "fp16")
        trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": scale})
        places = []
        with observe_module(trainer.module, lambda name, kind, x, found=places: found.append(bool(x.isfinite().all()))):
            gradients_and_loss(trainer, batch)
        assert all(places) == finite


def test_no_scale_is_searched_for_a_census_that_another_follows(
    subject: Subject, batch: CensusBatch, truth: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, scales = census_module._real_pass, []
    monkeypatch.setattr(census_module, "_real_pass", lambda *given: (scales.append(given[-1]), real(*given))[1])
    first = take_census(subject, "fp16", batch, truth, lambda found: found.first_backward is None)
    assert scales == [1.0] and first.largest_safe_loss_scale == 1.0
    last = take_census(subject, "fp16", batch, truth, lambda _: False)
    assert len(scales) > 2 and last.ranges == first.ranges
    assert last.zeroed_fraction_unscaled == first.zeroed_fraction_unscaled == first.zeroed_fraction


def test_a_loss_scale_saves_gradients_from_underflow(subject: Subject, batch: CensusBatch, truth: Reference) -> None:
    census = take_census(subject, "fp16", batch, truth)
    gradients = gradients_and_loss(trainer_in_scale_one(subject), batch)
    lost = sum(int((truth.nonzero[name] & (gradients[name] == 0)).sum()) for name in truth.nonzero)
    total = sum(int(mask.sum()) for mask in truth.nonzero.values())
    assert census.zeroed_fraction_unscaled == lost / total > 0
    assert census.zeroed_fraction is not None and census.zeroed_fraction < census.zeroed_fraction_unscaled / 10


def trainer_in_scale_one(subject: Subject) -> PolicyTrainer:
    trainer = trainer_in(subject, "fp16")
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 1.0})
    return trainer


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_formats_with_the_range_of_fp32_need_no_scale(
    subject: Subject, batch: CensusBatch, truth: Reference, dtype: str
) -> None:
    census = take_census(subject, dtype, batch, truth)  # type: ignore[arg-type]
    assert census.loss_scale == 1.0
    assert census.largest_safe_loss_scale is not None and census.largest_safe_loss_scale > 2.0**20
    assert min(row.headroom_bits for row in census.ranges) > 100
    assert all(row.finite for row in census.ranges)


Broken = Callable[[Callable[[Mlp], None]], tuple[Subject, CensusBatch, Reference]]


def test_an_overflowing_output_is_named_and_not_the_values_after_it(broken: Broken) -> None:
    subject, batch, truth = broken(lambda mlp: mlp.get_submodule("down_proj").weight.mul_(2e4))  # type: ignore[operator, union-attr]
    census = take_census(subject, "fp16", batch, truth)
    assert census.first_forward == Spot(module=f"{LAYER}.mlp.down_proj", kind="forward")
    assert census.largest_safe_loss_scale is None and census.zeroed_fraction is None
    bad = {row.spot for row in census.ranges if not row.finite}
    assert census.first_forward in bad and Spot(module="model.layers.0", kind="forward") not in bad


def test_an_overflowing_product_is_the_input_of_the_down_projection(broken: Broken) -> None:
    def change(mlp: Mlp) -> None:
        for name, factor in (("gate_proj", 300.0), ("up_proj", 300.0), ("down_proj", 1e-4)):
            mlp.get_submodule(name).weight.mul_(factor)  # type: ignore[operator, union-attr]

    subject, batch, truth = broken(change)
    census = take_census(subject, "fp16", batch, truth)
    assert census.first_forward == Spot(module=f"{LAYER}.mlp.down_proj", kind="input")
    assert truth.sizes[Spot(module=f"{LAYER}.mlp.down_proj", kind="forward")].max_abs < 65504


def dead_unit(mlp: Mlp) -> None:
    """Make unit 7 contribute nothing, by a zero row of the up projection, but give that row a large gradient."""
    mlp.get_submodule("up_proj").weight[7] = 0.0  # type: ignore[index, operator]
    mlp.get_submodule("gate_proj").weight[7].mul_(1e4)  # type: ignore[index, union-attr]
    down = mlp.get_submodule("down_proj").weight
    down[:, 7] = down[:, 7].sign() * 5e4  # type: ignore[index, operator]


def test_a_backward_overflow_is_found_where_the_forward_pass_is_small(broken: Broken) -> None:
    subject, batch, truth = broken(dead_unit)
    census = take_census(subject, "fp16", batch, truth)
    assert census.first_forward is None
    assert census.first_backward is not None and census.first_backward.module == f"{LAYER}.mlp.up_proj"
    assert census.first_backward.kind in BACKWARD_KINDS
    assert census.largest_safe_loss_scale is not None and census.largest_safe_loss_scale < 1
    assert all(row.finite for row in census.ranges if row.spot.kind not in BACKWARD_KINDS)
    assert max(sizes.max_abs for sizes in truth.sizes.values()) < float("inf")


def test_a_weight_that_fp16_cannot_hold_is_named(broken: Broken) -> None:
    def change(mlp: Mlp) -> None:
        mlp.get_submodule("up_proj").weight[0, 0] = 1e5  # type: ignore[index, operator]

    subject, batch, truth = broken(change)
    census = take_census(subject, "fp16", batch, truth)
    assert census.first_forward == Spot(module=f"{LAYER}.mlp.up_proj", kind="weight")


def test_a_damaged_model_is_not_finite_in_fp32_either(broken: Broken) -> None:
    def change(mlp: Mlp) -> None:
        mlp.get_submodule("up_proj").weight[0, 0] = float("nan")  # type: ignore[index, operator]

    subject, batch, truth = broken(change)
    census = take_census(subject, "fp32", batch, truth)
    assert census.first_forward == Spot(module=f"{LAYER}.mlp.up_proj", kind="weight")
    assert census.largest_safe_loss_scale is None
