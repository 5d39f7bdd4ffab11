"""Calls of a loss of the user's own, `algorithm.loss = "module:function"`, and a trial of it on a few tokens.

    def loss(inputs: LossInputs, denominators: Denominators, algorithm: Algorithm) -> Tensor
    def loss(inputs: LossInputs, denominators: Denominators, algorithm: Algorithm) -> tuple[Tensor, dict]

The tensor is the micro-batch's share of the train batch's loss, an FP32 scalar with a graph. The dictionary holds
metrics, which appear as `loss/NAME`.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from betterhalf.algorithms.loss_path import EXAMPLE, KEY, OwnLoss
from betterhalf.batches import Denominators, LossInputs
from betterhalf.errors import ConfigError, RunError

if TYPE_CHECKING:
    from betterhalf.algorithms.presets import Algorithm


_METRIC_NAME = re.compile(r"[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnValue:
    """Result of a call."""

    loss: Tensor
    """FP32 scalar with a graph."""
    metrics: Mapping[str, Tensor]
    """Name -> float64 [2]: sum over the tokens of the micro-batch, and number of tokens."""


class _Unusable(Exception):
    """The function raised, or returned something that is not a loss; the text says what."""


def own_value(own: OwnLoss, inputs: LossInputs, denominators: Denominators, algorithm: object) -> OwnValue:
    """Compute the loss of one micro-batch. Without tokens it is 0, with a graph, and the function is not called.

    Raises:
        RunError: the function raised, or returned something that is not a loss.
    """
    if not inputs.current_logprobs_C.numel():
        return OwnValue(loss=inputs.current_logprobs_C.sum() * 0, metrics={})
    try:
        return _called(own, inputs, denominators, algorithm)
    except _Unusable as problem:
        raise RunError(f"{KEY}={own.path} {problem}") from problem.__cause__


def try_own_loss(own: OwnLoss, algorithm: Algorithm) -> None:
    """Call the function on two short sequences, and compute its gradient.

    Raises:
        ConfigError: it raises, or its result is not a loss with a finite value and gradient.
    """
    inputs, denominators = _few_tokens(algorithm)
    try:
        # The user's function may draw numbers; a run must not depend on whether it was tried.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            loss = _called(own, inputs, denominators, algorithm).loss
            (gradient_C,) = torch.autograd.grad(loss, inputs.current_logprobs_C, allow_unused=True)
    except _Unusable as problem:
        raise ConfigError(f"{KEY}={own.path} {problem} Expected: {EXAMPLE}") from problem.__cause__
    tried = "two sequences of 2 and 3 tokens with logprobs between -3 and -0.5 and advantages of 1 and -0.5"
    if gradient_C is None:
        raise ConfigError(f"{KEY}={own.path} does not depend on inputs.current_logprobs_C: nothing would be learned.")
    for name, value in (("value", loss), ("gradient", gradient_C)):
        if not bool(value.isfinite().all()):
            raise ConfigError(f"{KEY}={own.path} has a {name} that is not finite on {tried}.")


def _few_tokens(algorithm: Algorithm) -> tuple[LossInputs, Denominators]:
    reference_C = torch.tensor([-0.6, -1.0, -1.9, -2.9, -0.8]) if algorithm.reads_reference else None
    entropies_C = torch.tensor([0.5, 1.0, 1.5, 0.1, 0.7]) if algorithm.entropy_coefficient else None
    current_C = torch.tensor([-0.5, -1.0, -2.0, -3.0, -0.7], requires_grad=True)
    inputs = LossInputs(
        current_logprobs_C=current_C,
        proximal_logprobs_C=torch.tensor([-0.6, -1.1, -1.8, -2.9, -0.7]),
        behavior_logprobs_C=torch.tensor([-0.61, -1.09, -1.8, -3.0, -0.71]),
        reference_logprobs_C=reference_C,
        current_entropies_C=entropies_C,
        advantages_S=torch.tensor([1.0, -0.5]),
        sequence_index_C=torch.tensor([0, 0, 1, 1, 1]),
    )
    return inputs, Denominators(sequences=2.0, tokens=5.0, max_tokens=4)


def _called(own: OwnLoss, inputs: LossInputs, denominators: Denominators, algorithm: object) -> OwnValue:
    try:
        found = own.function(inputs, denominators, algorithm)
    except (Exception, SystemExit) as error:  # the user's function may raise anything
        raise _Unusable(f"raised {type(error).__name__}{_place(error, own.function)}: {error}.") from error
    loss, metrics = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
    _require_scalar(loss)
    if not isinstance(metrics, Mapping):
        raise _Unusable(f"returned metrics of type {type(metrics).__name__}; return a dictionary of names and numbers.")
    return OwnValue(loss=loss, metrics={name: _metric(name, value, inputs) for name, value in metrics.items()})


def _require_scalar(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise _Unusable(f"returned {type(loss).__name__}; return a tensor, or a tensor and a dictionary of metrics.")
    if loss.dim():
        raise _Unusable(f"returned a tensor of shape {list(loss.shape)}; reduce it to one number, as aggregate() does.")
    if loss.dtype != torch.float32:
        raise _Unusable(f"returned a loss in {loss.dtype}; convert it with .float(): it is scaled in FP32.")
    if not loss.requires_grad:
        raise _Unusable("returned a loss without a graph; compute it from inputs.current_logprobs_C without detach().")


def _metric(name: Any, value: Any, inputs: LossInputs) -> Tensor:
    """Return (sum, tokens) of a metric: a number counts once for each token, a tensor [C] has one value for each."""
    if not isinstance(name, str) or not _METRIC_NAME.fullmatch(name):
        raise _Unusable(f"returned a metric named {name!r}; use letters, digits, _ . - and / between them.")
    device, tokens = inputs.current_logprobs_C.device, inputs.current_logprobs_C.numel()
    try:
        values = torch.as_tensor(value, device=device).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise _Unusable(f"returned {type(value).__name__} as metric {name!r}; return a number or a tensor.") from error
    if values.shape not in ((), (tokens,)):
        shape = list(values.shape)
        raise _Unusable(f"returned metric {name!r} of shape {shape}; return one number, or one for each token.")
    total = values * tokens if values.dim() == 0 else values.sum()
    return torch.stack((total, total.new_tensor(float(tokens))))


def _place(error: BaseException, function: Callable[..., Any]) -> str:
    """Return the last line of the function's own file that the error passed, or the line that raised it.

    Empty if it was the call itself, as with wrong arguments.
    """
    frames = traceback.extract_tb(error.__traceback__)[1:]
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    frames = [frame for frame in frames if frame.filename == file] or frames
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
