"""The range census: how large a model's values get, forward and backward, on real tokens, and what a half precision
does with them.

One pass of an FP32 trainer gives the true magnitudes of every module. Real passes in the precision under test then show
where the first value leaves the format, which loss scales keep the gradients finite, and what they turn to zero.

The batch is a stand-in for training: the configured algorithm's loss, divided by what a train batch of the configured
size would be divided by; advantages of +1 and -1, as the rewards of one batch say little of the next one's.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from betterhalf.algorithms.presets import resolve_algorithm
from betterhalf.diagnostics.numerics import (
    BACKWARD_KINDS,
    KINDS,
    Census,
    Kind,
    Magnitudes,
    Spot,
    Zeroed,
    magnitudes,
    module_range,
    predicted_loss_scale,
    starting_loss_scale,
    together,
    zeroed_gradients,
)
from betterhalf.examine.module_hooks import See, watched
from betterhalf.examine.subject import Subject, trainer_in
from betterhalf.precision.formats import FORMATS, dtype_name
from betterhalf.training.pack import pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, Denominators, DtypeName, MicroBatch, Prompt, Rollout

CENSUS_TOKENS = 512
"""Tokens of a census batch, each completion's prompt included; at least two completions are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CensusBatch:
    """The tokens of a census, packed."""

    micro_batches: tuple[MicroBatch, ...]
    """As training would pack them."""
    denominators: Denominators
    """Those of a whole train batch of the configured size."""

    @property
    def tokens(self) -> int:
        """Those that pass through the model, where siblings share their prompt."""
        return sum(micro.num_tokens for micro in self.micro_batches)


def census_batch(subject: Subject, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]]) -> CensusBatch:
    """Pack siblings of every prompt in turn, up to `CENSUS_TOKENS`, with advantages of +1 and -1 in turn.

    Args:
        subject: its configuration has the sizes of a train batch.
        prompts: [P].
        groups: [P], the completions of each.
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
    training = subject.config.training.model_copy(update={"optimizer_steps": 1})
    config = subject.config.model_copy(update={"training": training})
    step = pack_step(rollouts, advantages, config, 0)
    (batch,) = step.train_batches
    return CensusBatch(
        micro_batches=tuple(step.chosen(batch.micro_batches)),
        denominators=_train_batch(subject, batch.denominators.tokens / len(rollouts)),
    )


def _train_batch(subject: Subject, mean_length: float) -> Denominators:
    """Denominators of a train batch whose completions are as long as the sampled ones."""
    training = subject.config.training
    sequences = training.prompts_per_step * training.group_size / training.optimizer_steps
    max_tokens = subject.config.sampling.max_tokens
    return Denominators(sequences=sequences, tokens=sequences * mean_length, max_tokens=max_tokens)


# -- the truth


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What the FP32 trainer computed."""

    sizes: dict[Spot, Magnitudes]
    """In model order, kinds in the order of `KINDS`."""
    nonzero: dict[str, Tensor]
    """By parameter, bool: entries of the summed gradient that are not zero."""
    first_forward: Spot | None
    """Where even FP32 is not finite: a damaged model."""
    first_backward: Spot | None


@dataclass(slots=True)
class _Sizes:
    """Adds up magnitudes by place."""

    rows: dict[Spot, Magnitudes] = field(default_factory=dict)

    def see(self, name: str, kind: Kind, x: Tensor) -> None:
        spot, sizes = Spot(module=name, kind=kind), magnitudes(x.float())
        self.rows[spot] = together(self.rows[spot], sizes) if spot in self.rows else sizes


def reference(subject: Subject, batch: CensusBatch) -> Reference:
    """The FP32 trainer's magnitudes of one forward and backward pass over the batch, without loss scale."""
    trainer = _trainer(subject, "fp32")
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
        nonzero={name: gradient != 0 for name, gradient in trainer.weights.gradients()},
        first_forward=finite.first_forward,
        first_backward=finite.first_backward,
    )


def _trainer(subject: Subject, dtype: DtypeName) -> PolicyTrainer:
    # Parameters and their hooks refer to each other: the last trainer's memory comes back only so.
    gc.collect()
    return trainer_in(subject, dtype, hooked=True)


def _in_model_order(module: nn.Module, rows: dict[Spot, Magnitudes]) -> dict[Spot, Magnitudes]:
    places = {name: place for place, (name, _) in enumerate(module.named_modules())}
    return dict(sorted(rows.items(), key=lambda row: (places[row[0].module], KINDS.index(row[0].kind))))


# -- the real thing


@dataclass(slots=True)
class _Finiteness:
    """Remembers what is not finite, what came first, and what is held in FP32 although the rest is half."""

    first_forward: Spot | None = None
    first_backward: Spot | None = None
    broken: set[Spot] = field(default_factory=set)
    wide: set[Spot] = field(default_factory=set)

    def see(self, name: str, kind: Kind, x: Tensor) -> None:
        spot = Spot(module=name, kind=kind)
        if dtype_name(x.dtype) == "fp32":
            self.wide.add(spot)
        if bool(x.isfinite().all()):
            return
        self.broken.add(spot)
        if kind in BACKWARD_KINDS:
            self.first_backward = self.first_backward or spot
        else:
            self.first_forward = self.first_forward or spot


def _forward(trainer: PolicyTrainer, batch: CensusBatch, see: See) -> list[Tensor]:
    """The watched weights and forward passes alone; returns the logprobs of each micro-batch."""
    for name, weight in trainer.weights.computing():
        see(name.rpartition(".")[0], "weight", weight)
    with watched(trainer.module, see):
        return [scores.logprobs_C for scores in trainer.measure(batch.micro_batches)]


def _backward(trainer: PolicyTrainer, batch: CensusBatch, proximal: Sequence[Tensor], scale: float, see: See) -> None:
    """Forward and watched backward passes, the loss multiplied by `scale`; gradients stay in the trainer, scaled.

    The trainer's own logprobs stand in for the engine's, so that no token is masked for a mismatch, which is measured
    apart.
    """
    state = trainer.scaler.state_dict()
    if "scale" in state:
        trainer.scaler.load_state_dict({**state, "scale": scale})
    trainer.weights.zero_grad()
    algorithm = resolve_algorithm(trainer.config.algorithm)
    for micro, proximal_C in zip(batch.micro_batches, proximal, strict=True):
        matched = dataclasses.replace(micro, behavior_logprobs_C=proximal_C, proximal_logprobs_C=proximal_C)
        with watched(trainer.module, see):
            trainer.forward_backward([matched], algorithm, batch.denominators)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """One real backward pass."""

    seen: _Finiteness
    zeroed: Zeroed | None
    """None when the pass was not finite."""


def _real_pass(
    trainer: PolicyTrainer, batch: CensusBatch, proximal: Sequence[Tensor], truth: Reference, scale: float
) -> _Pass:
    seen = _Finiteness()
    _backward(trainer, batch, proximal, scale, seen.see)
    gradients = dict(trainer.weights.gradients())
    for name, gradient in gradients.items():
        owner = Spot(module=name.rpartition(".")[0], kind="gradient")
        if owner not in seen.broken and not bool(gradient.isfinite().all()):
            # A head tied to the embedding has a gradient of its own, the first of all, that no parameter's hook sees.
            seen.first_backward = Spot(module="lm_head", kind="gradient")
            seen.broken.add(owner)
    finite = seen.first_backward is None and seen.first_forward is None
    return _Pass(seen=seen, zeroed=zeroed_gradients(truth.nonzero, gradients.items()) if finite else None)


def take_census(subject: Subject, dtype: DtypeName, batch: CensusBatch, truth: Reference) -> Census:
    """Real forward and backward passes of a trainer in `dtype`, beside the true magnitudes.

    FP32 islands of the subject's configuration apply. The loss scale is searched for in formats that have one: from
    the largest that the true magnitudes allow, halved until the real pass is finite.
    """
    if dtype == "fp32":
        return _true_census(truth)
    trainer = _trainer(subject, dtype)
    seen = _Finiteness()
    proximal = _forward(trainer, batch, seen.see)
    if seen.first_forward is not None:
        return _census(dtype, truth, seen)
    plain = _real_pass(trainer, batch, proximal, truth, 1.0)
    seen = _both(seen, plain.seen)
    allowed = _allowed_scale(dtype, truth, seen.wide)
    if plain.zeroed is None:
        # Training never scales below 1, so that a smaller scale is not tried.
        return _census(dtype, truth, seen, safe=min(allowed, 0.5))
    if "scale" not in trainer.scaler.state_dict():
        return _census(dtype, truth, seen, plain=plain, best=plain, safe=allowed)
    best, safe = plain, 1.0
    while allowed > safe:
        tried = _real_pass(trainer, batch, proximal, truth, allowed)
        if tried.zeroed is not None:
            best, safe = tried, allowed
        allowed /= 2
    return _census(dtype, truth, seen, plain=plain, best=best, safe=safe, start=starting_loss_scale(safe))


def _true_census(truth: Reference) -> Census:
    """The FP32 trainer's own."""
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


def _allowed_scale(dtype: DtypeName, truth: Reference, wide: set[Spot]) -> float:
    """The largest loss scale that the true magnitudes of what is held in `dtype` allow."""
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
    """Modules of the parameters, each once."""
    return tuple(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
