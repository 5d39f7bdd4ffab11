"""The range census: magnitudes of a model's values and gradients on real tokens, and what a precision does to them.

One pass of an FP32 trainer gives the reference magnitudes of every module. Real passes in the precision under test then
show where the first value overflows, which loss scales keep the gradients finite, and which gradients become zero.
For a model that the trainer refuses, the FP32 pass is that of the transformers module, and the rest is predicted from
its magnitudes.

The batch stands for training: it has the loss of the configured algorithm with the denominators of a train batch of the
configured size. Advantages are +1 and -1, since the rewards of one batch say little about those of the next.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from betterhalf.algorithms.presets import resolve_algorithm
from betterhalf.batches import Denominators, MicroBatch
from betterhalf.config.kl import NO_KL
from betterhalf.diagnostics.numerics import (
    BACKWARD_KINDS,
    KINDS,
    Census,
    Kind,
    Magnitudes,
    Spot,
    Zeroed,
    all_finite,
    magnitudes,
    module_range,
    predicted_loss_scale,
    starting_loss_scale,
    together,
    zeroed_gradients,
)
from betterhalf.errors import InputError
from betterhalf.examine.module_hooks import See, observe_module
from betterhalf.examine.plain_model import PlainModel
from betterhalf.examine.scoring import in_one_batch
from betterhalf.examine.subject import Subject, trainer_in
from betterhalf.precision.formats import FORMATS, dtype_name
from betterhalf.precision.loss_scaler import build_loss_scaler
from betterhalf.process import collect_garbage
from betterhalf.training.pack import pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, DtypeName, Prompt, Rollout

CENSUS_TOKENS = 512
"""Maximum number of tokens in a census batch, counting the prompt of every completion; two completions always fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CensusBatch:
    """Packed tokens of a census."""

    micro_batches: tuple[MicroBatch, ...]
    """Micro-batches, packed as in training."""
    denominators: Denominators
    """Denominators of a whole train batch of the configured size."""

    @property
    def tokens(self) -> int:
        """Number of tokens that pass through the model, where siblings share their prompt."""
        return sum(micro.num_tokens for micro in self.micro_batches)


def census_batch(subject: Subject, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]]) -> CensusBatch:
    """Pack siblings, one of each prompt in turn, up to `CENSUS_TOKENS`; advantages alternate between +1 and -1.

    Every sequence of a model that cannot be packed gets a pack of its own.

    Args:
        subject: model and settings; these have the sizes of a train batch.
        prompts: [P].
        groups: [P], completions of each prompt.
    """
    rollouts: list[Rollout] = []
    room = CENSUS_TOKENS
    for sibling in range(max(map(len, groups))):
        for prompt, group in zip(prompts, groups, strict=True):
            length = len(prompt.token_ids) + len(group[sibling].token_ids)
            if length <= room or len(rollouts) < 2:
                rollouts.append(Rollout(prompt=prompt, completion=group[sibling], text="", reward=0.0))
                room -= length
    advantages = [1.0 if index % 2 == 0 else -1.0 for index in range(len(rollouts))]
    config = in_one_batch(subject.config)
    if subject.model.unpackable:
        training = config.training.model_copy(update={"tokens_per_micro_batch": 1})
        config = config.model_copy(update={"training": training})
    step = pack_step(rollouts, advantages, config, 0)
    (batch,) = step.train_batches
    return CensusBatch(
        micro_batches=tuple(step.chosen(batch.micro_batches)),
        denominators=_train_batch(subject, batch.denominators.tokens / len(rollouts)),
    )


def _train_batch(subject: Subject, mean_length: float) -> Denominators:
    """Return the denominators of a train batch whose completions are as long as the sampled ones."""
    training = subject.config.training
    sequences = training.prompts_per_step * training.group_size / training.optimizer_steps
    max_tokens = subject.config.sampling.max_tokens
    return Denominators(sequences=sequences, tokens=sequences * mean_length, max_tokens=max_tokens)


# -- the FP32 reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Values of the FP32 trainer, with which a precision is compared."""

    sizes: dict[Spot, Magnitudes]
    """Magnitudes in model order, kinds in the order of `KINDS`."""
    order: tuple[Spot, ...]
    """Places of `sizes` in the order of computation."""
    nonzero: dict[str, Tensor]
    """Parameter name -> bool mask of the non-zero entries of its summed gradient."""
    first_forward: Spot | None
    """First place of the forward pass that is not finite even in FP32, which means a damaged model."""
    first_backward: Spot | None
    """First place of the backward pass that is not finite even in FP32."""


@dataclass(slots=True)
class _Sizes:
    """Collector of magnitudes by place."""

    rows: dict[Spot, Magnitudes] = field(default_factory=dict)

    def see(self, name: str, kind: Kind, x: Tensor) -> None:
        spot, sizes = Spot(module=name, kind=kind), magnitudes(x.float())
        self.rows[spot] = together(self.rows[spot], sizes) if spot in self.rows else sizes


def reference(subject: Subject, batch: CensusBatch) -> Reference:
    """Return the FP32 trainer's magnitudes of one forward and backward pass over the batch, without a loss scale.

    Raises:
        InputError: the model cannot be packed, and its own code in transformers fails.
    """
    trainer = PlainModel(subject) if subject.model.unpackable else _trainer(subject, "fp32")
    sizes, finite = _Sizes(), _Finiteness()

    def see(name: str, kind: Kind, x: Tensor) -> None:
        finite.see(name, kind, x)
        sizes.see(name, kind, x)

    def see_backward(name: str, kind: Kind, x: Tensor) -> None:
        if kind in BACKWARD_KINDS:
            see(name, kind, x)

    proximal = _forward(trainer, batch, see)
    _backward(trainer, batch, proximal, 1.0, see_backward)
    return Reference(
        sizes=_in_model_order(trainer.module, sizes.rows),
        order=tuple(sizes.rows),
        nonzero={name: gradient != 0 for name, gradient in trainer.weights.gradients()},
        first_forward=finite.first_forward,
        first_backward=finite.first_backward,
    )


def _trainer(subject: Subject, dtype: DtypeName) -> PolicyTrainer:
    # Parameters and their hooks refer to each other, so only the collector frees the last trainer's memory.
    collect_garbage()
    return trainer_in(subject, dtype, hooked=True)


def _in_model_order(module: nn.Module, rows: dict[Spot, Magnitudes]) -> dict[Spot, Magnitudes]:
    places = {name: place for place, (name, _) in enumerate(module.named_modules())}
    return dict(sorted(rows.items(), key=lambda row: (places[row[0].module], KINDS.index(row[0].kind))))


# -- passes in the precision under test


@dataclass(slots=True)
class _Finiteness:
    """Collector of the places that are not finite, the first of them, and those that are FP32 in a half model."""

    first_forward: Spot | None = None
    first_backward: Spot | None = None
    broken: set[Spot] = field(default_factory=set)
    wide: set[Spot] = field(default_factory=set)

    def see(self, name: str, kind: Kind, x: Tensor) -> None:
        spot = Spot(module=name, kind=kind)
        if dtype_name(x.dtype) == "fp32":
            self.wide.add(spot)
        if all_finite(x):
            return
        self.broken.add(spot)
        if kind in BACKWARD_KINDS:
            self.first_backward = self.first_backward or spot
        else:
            self.first_forward = self.first_forward or spot


def _forward(trainer: PolicyTrainer | PlainModel, batch: CensusBatch, see: See) -> list[Tensor]:
    """Show `see` the weights and the values of forward passes; return the logprobs of each micro-batch."""
    modules = {name for name, _ in trainer.module.named_modules()}
    for name, weight in trainer.outgoing.computing():
        see(_holder(name, modules), "weight", weight)
    with observe_module(trainer.module, see):
        return [scores.logprobs_C for scores in trainer.measure(batch.micro_batches)]


def _holder(parameter: str, modules: Collection[str]) -> str:
    """Return the module that holds a parameter of this Hugging Face name; experts have no modules of their own."""
    holder = parameter.rpartition(".")[0]
    while holder not in modules:
        holder = holder.rpartition(".")[0]
    return holder


def _backward(
    trainer: PolicyTrainer | PlainModel, batch: CensusBatch, proximal: Sequence[Tensor], scale: float, see: See
) -> None:
    """Run forward and backward passes with a loss scale, and show `see` their values.

    The gradients stay in the trainer, still scaled. The trainer's own logprobs replace the engine's, so that no token
    is masked for its mismatch, which is measured separately.
    """
    state = trainer.scaler.state_dict()
    if "scale" in state:
        trainer.scaler.load_state_dict({**state, "scale": scale})
    trainer.weights.zero_grad()
    # Without training the policy is its own reference, and without a mismatch there is nothing to centre.
    algorithm = dataclasses.replace(resolve_algorithm(trainer.config.algorithm), kl=NO_KL, score_centering=0)
    for micro, proximal_C in zip(batch.micro_batches, proximal, strict=True):
        matched = dataclasses.replace(
            micro, behavior_logprobs_C=proximal_C, proximal_logprobs_C=proximal_C, top_ids_CK=None
        )
        with observe_module(trainer.module, see):
            trainer.forward_backward([matched], algorithm, batch.denominators)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """Result of one backward pass in the precision under test."""

    seen: _Finiteness
    """Places that are not finite."""
    zeroed: Zeroed | None
    """Gradient entries that became zero; None if the pass was not finite."""


def _real_pass(
    trainer: PolicyTrainer, batch: CensusBatch, proximal: Sequence[Tensor], truth: Reference, scale: float
) -> _Pass:
    seen = _Finiteness()
    _backward(trainer, batch, proximal, scale, seen.see)
    gradients = dict(trainer.weights.gradients())
    for name, gradient in gradients.items():
        owner = Spot(module=name.rpartition(".")[0], kind="gradient")
        if owner not in seen.broken and not all_finite(gradient):
            # A head tied to the embedding adds its gradient, the first of the pass, where no parameter's hook sees it.
            seen.first_backward = Spot(module="lm_head", kind="gradient")
            seen.broken.add(owner)
    finite = seen.first_backward is None and seen.first_forward is None
    return _Pass(seen=seen, zeroed=zeroed_gradients(truth.nonzero, gradients.items()) if finite else None)


def take_census(
    subject: Subject,
    dtype: DtypeName,
    batch: CensusBatch,
    truth: Reference,
    superseded: Callable[[Census], bool] = lambda _: False,
) -> Census:
    """Run forward and backward passes of a trainer in `dtype`, and compare them with the FP32 reference.

    FP32 islands of the subject's configuration apply. For a format with a loss scale, the search for the largest safe
    one starts at the largest that the reference magnitudes allow, and halves it until the pass is finite. If the
    trainer cannot compute the model in this format, the census is predicted.

    Args:
        subject: model and settings.
        dtype: the precision under test.
        batch: tokens of the census.
        truth: FP32 magnitudes of the batch.
        superseded: given a census that is finite at loss scale 1, returns True if the caller will take another one
            instead. The search for a larger scale is then left out.
    """
    if dtype == "fp32":
        return _true_census(truth)
    try:
        trainer = _trainer(subject, dtype)
    except InputError as error:
        return _predicted_census(subject, dtype, truth, str(error))
    seen = _Finiteness()
    proximal = _forward(trainer, batch, seen.see)
    if seen.first_forward is not None:
        return _census(dtype, truth, seen)
    plain = _real_pass(trainer, batch, proximal, truth, 1.0)
    seen = _both(seen, plain.seen)
    allowed = _allowed_scale(dtype, truth, seen.wide)
    if plain.zeroed is None:
        # Training never uses a scale below 1, so none is tried.
        return _census(dtype, truth, seen, safe=min(allowed, 0.5))
    if "scale" not in trainer.scaler.state_dict():
        return _census(dtype, truth, seen, plain=plain, best=plain, safe=allowed)
    best, safe = plain, 1.0
    unsearched = _census(dtype, truth, seen, plain=plain, best=best, safe=safe)
    if superseded(unsearched):
        return unsearched
    while allowed > safe:
        tried = _real_pass(trainer, batch, proximal, truth, allowed)
        if tried.zeroed is not None:
            best, safe = tried, allowed
        allowed /= 2
    return _census(dtype, truth, seen, plain=plain, best=best, safe=safe, start=starting_loss_scale(safe))


def _true_census(truth: Reference) -> Census:
    """Return the census of FP32, from the reference itself."""
    seen = _Finiteness(
        first_forward=truth.first_forward,
        first_backward=truth.first_backward,
        broken={spot for spot, sizes in truth.sizes.items() if math.isinf(sizes.max_abs)},
    )
    if seen.broken:
        return _census("fp32", truth, seen)
    exact = _Pass(seen=seen, zeroed=Zeroed(fraction=0.0, worst=()))
    safe = _allowed_scale("fp32", truth, set())
    return _census("fp32", truth, seen, plain=exact, best=exact, safe=safe)


def _predicted_census(subject: Subject, dtype: DtypeName, truth: Reference, why: str) -> Census:
    """Return the census of a format in which no pass can run: values above its maximum would be infinite.

    Gradients that become zero are predicted at loss scale 1 alone.
    """
    beyond = [spot for spot in truth.order if truth.sizes[spot].max_abs > FORMATS[dtype].max]
    seen = _Finiteness(
        first_forward=next((spot for spot in beyond if spot.kind not in BACKWARD_KINDS), None),
        first_backward=next((spot for spot in beyond if spot.kind in BACKWARD_KINDS), None),
        broken=set(beyond),
    )
    scaled = "scale" in build_loss_scaler(subject.config.precision.loss_scale, dtype).state_dict()
    safe = None if seen.first_forward else _allowed_scale(dtype, truth, set())
    start = starting_loss_scale(safe) if scaled else 1.0
    return dataclasses.replace(_census(dtype, truth, seen, safe=safe, start=start), predicted=why)


def _allowed_scale(dtype: DtypeName, truth: Reference, wide: set[Spot]) -> float:
    """Return the largest loss scale that the reference magnitudes allow, for values that are held in `dtype`."""
    held = [s.max_abs for spot, s in truth.sizes.items() if spot.kind in BACKWARD_KINDS and spot not in wide]
    return predicted_loss_scale(max(held, default=0.0), FORMATS[dtype])


def _census(
    dtype: DtypeName,
    truth: Reference,
    seen: _Finiteness,
    *,
    plain: _Pass | None = None,
    best: _Pass | None = None,
    safe: float | None = None,
    start: float = 1.0,
) -> Census:
    unscaled, zeroed = plain.zeroed if plain else None, best.zeroed if best else None
    return Census(
        dtype=dtype,
        ranges=tuple(
            module_range(spot, sizes, "fp32" if spot in seen.wide else dtype, finite=spot not in seen.broken)
            for spot, sizes in truth.sizes.items()
        ),
        first_forward=seen.first_forward,
        first_backward=seen.first_backward,
        largest_safe_loss_scale=safe,
        loss_scale=start,
        zeroed_fraction=zeroed.fraction if zeroed else None,
        zeroed_fraction_unscaled=unscaled.fraction if unscaled else None,
        zeroed_modules=_owners(zeroed.worst) if zeroed else (),
    )


def _both(forward: _Finiteness, backward: _Finiteness) -> _Finiteness:
    return _Finiteness(
        first_forward=forward.first_forward,
        first_backward=backward.first_backward,
        broken=forward.broken | backward.broken,
        wide=forward.wide | backward.wide,
    )


def _owners(parameters: Sequence[str]) -> tuple[str, ...]:
    """Return the modules of the parameters, each once."""
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
