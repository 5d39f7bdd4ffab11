"""Localisation of a divergence: run one sequence through trainer and engine, and find the first operation that differs.

Three comparisons. Trainer against engine: first with every operation of the engine reading the trainer's results
(`forced`), so that a difference belongs to that operation alone; then with both running freely, which shows the growth
from layer to layer. And twice the engine against itself: the prompt pass against decoding through the cache, and
decoding alone against decoding in a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from betterhalf.config.schema import NativeEngineConfig
from betterhalf.diagnostics.divergence import (
    HINTS,
    Difference,
    Side,
    Sizes,
    Trace,
    Yardstick,
    compare,
    compare_traces,
    first_beyond,
    first_unequal,
    growth,
)
from betterhalf.errors import InputError
from betterhalf.examine.engine_trace import decoded_trace, whole_trace
from betterhalf.examine.subject import Subject, config_in, precision_in, rounded_weights, trainer_in
from betterhalf.examine.trainer_trace import trainer_logits, trainer_trace
from betterhalf.rollout.build import build_traced_engine, capabilities
from betterhalf.rollout.native.config import decoder_config
from betterhalf.rollout.native.decoder import Decoder
from betterhalf.rollout.native.families import LayerNorms
from betterhalf.rollout.tracing import TracedEngine
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import DtypeName

BATCH = 8
"""Number of sequences in the batch that is compared with decoding alone."""

_MAX_DECODED = 64
"""Maximum number of completion tokens replayed; more would find nothing new and cost four decode steps each."""
_MAX_TRACED = 2**28
"""Maximum number of values in one trace (1 GiB in FP32); a longer sequence is cut."""
_MAX_LOGITS = 2**23
"""Maximum number of logits compared (64 MiB in FP64 on each side)."""

_OVERFLOW = "a value left the range of the format: `betterhalf doctor` names the modules and the fix"


def require_traced(hf_config: Any) -> None:
    """Refuse a model whose operations are not those of Llama's layer, which the traces of both sides name.

    Raises:
        InputError: the native engine does not know the architecture, or its layers have other norms, fused projections,
            scaled branches or experts.
    """
    config = decoder_config(hf_config)
    other_norms = config.norms != LayerNorms() or config.head_norm == "row"
    if other_norms or config.fused_names or config.residual_scale != 1.0 or config.mixture is not None:
        raise InputError(
            f"--localize compares the operations of a layer like Llama's, and architecture {config.architecture!r} has "
            "others; leave --localize out, or use a model such as llama, qwen3 or smollm3"
        )


def localize(subject: Subject, token_ids: Sequence[int], prompt_length: int, *, dtype: DtypeName) -> dict[str, Any]:
    """Replay one sequence through trainer and engine of a subject in one precision.

    An engine whose operations cannot be traced is replaced by the native engine.

    Args:
        subject: model and settings of trainer and engine.
        token_ids: prompt and completion; a long completion is cut.
        prompt_length: tokens of the prompt, at least one, followed by at least one token.
        dtype: precision of both sides.

    Returns:
        The entry `localize` of probe.json; see docs/localize.md.

    Raises:
        InputError: the engine does not compute the architecture, or the sequence lacks a prompt or a completion.
    """
    subject = _with_traced_engine(subject)
    engine, trainer = _engine_unchecked(subject, dtype), trainer_in(subject, dtype, hooked=True)
    return localize_pair(trainer, engine.decoder, token_ids, prompt_length, dtype=dtype)


def localize_pair(
    trainer: PolicyTrainer, decoder: Decoder, token_ids: Sequence[int], prompt_length: int, *, dtype: DtypeName
) -> dict[str, Any]:
    """Run `localize` on a trainer and a decoder that hold their weights.

    Raises:
        InputError: the sequence lacks a prompt or a completion.
    """
    tokens = _replayed(decoder, token_ids, prompt_length)
    against_trainer = _yardstick(decoder, dtype, len(tokens), trainer=True)
    against_itself = _yardstick(decoder, dtype, len(tokens), trainer=False)
    theirs = trainer_trace(trainer, tokens)
    whole, alone = whole_trace(decoder, tokens), decoded_trace(decoder, tokens, prompt_length)
    beside = decoded_trace(decoder, tokens, prompt_length, batch=BATCH)
    forced = whole_trace(decoder, tokens, forced=theirs)
    comparisons = {"trainer_engine": _comparison(("engine", "trainer"), theirs, forced, whole, against_trainer)}
    comparisons["trainer_engine"].forced.append(
        _compare_logits(trainer, decoder, theirs, prompt_length, against_trainer)
    )
    forced = decoded_trace(decoder, tokens, prompt_length, forced=whole)
    comparisons["prefill_decode"] = _comparison(("decode", "prefill"), whole, forced, alone, against_itself)
    forced = decoded_trace(decoder, tokens, prompt_length, batch=BATCH, forced=alone)
    sides = (f"batch of {BATCH}", "batch of 1")
    comparisons["batch"] = _comparison(sides, alone, forced, beside, against_itself)
    head = {"dtype": dtype, "rounding": decoder.rounding.mode, "tokens": len(tokens), "prompt_length": prompt_length}
    return head | _as_json(comparisons)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Comparison:
    """Comparison of two computations of one sequence."""

    sides: tuple[str, str]
    """Names of the result and of the reference."""
    forced: list[Difference]
    """Difference of each operation, computed from the reference's inputs."""
    growth: list[float | None]
    """Difference of the residual stream after each layer, with both sides running freely."""


def _comparison(
    sides: tuple[str, str], reference: Trace, forced: Trace, freely: Trace, yardstick: Yardstick
) -> _Comparison:
    return _Comparison(
        sides=sides,
        forced=compare_traces(forced, reference, yardstick),
        growth=growth(compare_traces(freely, reference, yardstick)),
    )


def _with_traced_engine(subject: Subject) -> Subject:
    """Return the subject with an engine whose operations can be traced: the configured one, else the native engine."""
    if capabilities(subject.config).traces:
        return subject
    config = subject.config.model_copy(update={"engine": NativeEngineConfig()})
    return dataclasses.replace(subject, config=config)


def _engine_unchecked(subject: Subject, dtype: DtypeName) -> TracedEngine:
    """Return an engine with the subject's weights on which nothing has run: overflow is what the caller looks for."""
    model, precision = subject.model, precision_in(subject, dtype)
    engine = build_traced_engine(config_in(subject, dtype), model.hf_config, model.stop_token_ids, precision)
    engine.load_weights(rounded_weights(model, precision.roles.wire_dtype, subject.config.lora.merge), policy_version=0)
    return engine


def _replayed(decoder: Decoder, token_ids: Sequence[int], prompt_length: int) -> tuple[int, ...]:
    """Return the prompt and the part of the completion within the limits on time and memory."""
    if not 0 < prompt_length < len(token_ids):
        raise InputError(
            f"a sequence of {len(token_ids)} tokens with a prompt of {prompt_length} cannot be replayed through "
            "prefill and decoding; give a prompt and a completion of at least one token each"
        )
    config = decoder.config
    widths = 8 * config.hidden_size + 3 * config.query_size + 3 * config.kv_size + 3 * config.intermediate_size
    room = max(_MAX_TRACED // (widths * config.num_layers), prompt_length + 1)
    return tuple(token_ids[: min(room, prompt_length + _MAX_DECODED)])


def _yardstick(decoder: Decoder, dtype: DtypeName, tokens: int, *, trainer: bool) -> Yardstick:
    config = decoder.config
    mode: Side = "engine" if decoder.rounding.mode == "engine" else "aligned"
    sizes = Sizes(
        hidden=config.hidden_size,
        heads=config.query_size,
        intermediate=config.intermediate_size,
        attended=tokens + config.head_dim,
    )
    sides = (mode, "trainer" if trainer else mode)
    return Yardstick(dtype=dtype, sides=sides, sizes=sizes, head_norms=config.head_norm is not None)


@torch.no_grad()
def _compare_logits(
    trainer: PolicyTrainer, decoder: Decoder, theirs: Trace, prompt_length: int, yardstick: Yardstick
) -> Difference:
    """Compare the heads of both sides on the trainer's final hidden states that predict completion tokens."""
    first, rows = prompt_length - 1, max(1, _MAX_LOGITS // decoder.config.vocab_size)
    hidden = theirs["final_norm", None][first : first + rows]
    ours = decoder.logits(hidden.to(decoder.rounding.container))
    return compare(("logits", None), ours, trainer_logits(trainer, hidden), yardstick, first_token=first)


def _as_json(comparisons: dict[str, _Comparison]) -> dict[str, Any]:
    forced = comparisons["trainer_engine"].forced
    summaries = {name: _summary(comparison) for name, comparison in comparisons.items()}
    summaries["batch"]["sizes"] = [1, BATCH]
    layers = range(len(comparisons["trainer_engine"].growth))
    return {
        "first": summaries["trainer_engine"]["first"],
        "operations": [
            {"layer": one.layer, "operation": one.operation, "local": one.local, "bound": one.bound} for one in forced
        ],
        "growth": [{"layer": n, **{name: one.growth[n] for name, one in comparisons.items()}} for n in layers],
        "comparisons": summaries,
    }


def _summary(comparison: _Comparison) -> dict[str, Any]:
    """Select the first difference beyond rounding, the first that is not zero, and the nearest to its bound."""
    finite = [one for one in comparison.forced if one.local is not None]
    found = {
        "first": first_beyond(comparison.forced),
        "first_unequal": first_unequal(comparison.forced),
        "nearest": max(finite, key=lambda one: (one.local or 0.0) / one.bound, default=None),
    }
    return {name: None if one is None else _record(one, comparison.sides) for name, one in found.items()}


def _record(one: Difference, sides: tuple[str, str]) -> dict[str, Any]:
    """Return a difference as written to probe.json; `not_finite` names the sides that hold NaN or infinity."""
    finite = (one.result_finite, one.reference_finite)
    not_finite = [side for side, is_finite in zip(sides, finite, strict=True) if not is_finite]
    return {
        "layer": one.layer,
        "operation": one.operation,
        "difference": one.local,
        "bound": one.bound,
        "token": one.token,
        "not_finite": not_finite,
        "hint": _OVERFLOW if not_finite else HINTS[one.operation],
    }
