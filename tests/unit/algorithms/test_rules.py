"""Every combination of choices of a ratio is refused when the configuration is read, or gives a finite loss."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from betterhalf.algorithms.policy_loss import kept_mask, policy_loss
from betterhalf.algorithms.presets import Algorithm, resolve_algorithm
from betterhalf.batches import Denominators, LossInputs, TokenTensors
from betterhalf.config.load import load_config
from betterhalf.errors import ConfigError

BOUNDS = ("none", "0.5", "2.0", "-1.0", "nan")
CHOICES = tuple(itertools.product(("none", "token", "sequence", "geometric_mean"), ("raw", "truncate", "mask", "clip")))


def loss_and_gradient(algorithm: Algorithm) -> tuple[float, torch.Tensor]:
    """Return loss and gradient of two sequences, of three tokens and of one, with drift and mismatch."""
    current = torch.tensor([-1.0, -0.5, -2.0, -0.1], requires_grad=True)
    proximal, behavior = torch.tensor([-1.1, -0.5, -1.0, -0.2]), torch.tensor([-3.0, -0.6, -1.1, -0.1])
    tokens = TokenTensors(
        proximal_logprobs_C=proximal,
        behavior_logprobs_C=behavior,
        advantages_S=torch.tensor([1.0, -1.0]),
        sequence_index_C=torch.tensor([0, 0, 0, 1]),
    )
    kept_mask(algorithm, tokens)
    of = Denominators(sequences=2, tokens=4, max_tokens=4)
    output = policy_loss(algorithm, LossInputs.of(tokens, current), of)
    (gradient,) = torch.autograd.grad(output.loss, current)
    return float(output.loss.detach()), gradient


@pytest.mark.parametrize(("level", "treatment"), CHOICES)
@pytest.mark.parametrize("place", ["surrogate", "correction"])
def test_every_product_of_choices_is_refused_or_computes(place: str, level: str, treatment: str) -> None:
    ratio = "current/proximal" if place == "surrogate" else "proximal/behavior"
    resolved = []
    for lower, upper, keep, gradient in itertools.product(BOUNDS, BOUNDS, ("true", "false"), ("ratio", "logprob")):
        given = {"level": level, "ratio": ratio, "treatment": treatment, "lower": lower, "upper": upper}
        given |= {"keep_weight": keep, "gradient": gradient}
        overrides = [f"algorithm.{place}.{key}={value}" for key, value in given.items()]
        try:
            algorithm = resolve_algorithm(load_config(None, overrides).algorithm)
        except ConfigError as refusal:
            assert f"algorithm.{place}" in str(refusal)
            continue
        resolved.append((lower, upper))
        loss, grads = loss_and_gradient(algorithm)
        assert math.isfinite(loss) and bool(grads.isfinite().all())
        assert bool(grads.any()) or treatment in ("mask", "truncate")
    allowed = {
        "raw": {("none", "none")},
        "truncate": {("none", "0.5"), ("none", "2.0")},
        "mask": {("none", "0.5"), ("none", "2.0"), ("0.5", "none"), ("2.0", "none"), ("0.5", "0.5"), ("2.0", "2.0")}
        | {("0.5", "2.0")},
        "clip": {("0.5", "2.0")} if place == "surrogate" else set(),
    }
    expected = allowed[treatment] if level != "none" else allowed["raw"] if treatment == "raw" else set()
    assert set(resolved) == expected


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (
            ["correction.level=none", "correction.treatment=mask", "correction.lower=2.0"],
            "algorithm.correction.treatment and algorithm.correction.lower",
        ),
        (["correction.treatment=mask"], "algorithm.correction.treatment"),
        (["correction.upper=3"], "algorithm.correction.upper"),
        (["surrogate.level=none", "surrogate.treatment=truncate"], "algorithm.surrogate.treatment"),
        (["surrogate.level=none", "surrogate.keep_weight=false"], "algorithm.surrogate.keep_weight"),
        (["surrogate.level=none", "surrogate.dual_clip=3"], "algorithm.surrogate.dual_clip"),
        (["surrogate.level=none", "surrogate.probability_gap=0.2"], "algorithm.surrogate.probability_gap"),
    ],
)
def test_a_ratio_that_is_switched_off_takes_no_treatment(overrides: list[str], named: str) -> None:
    config = load_config(None, [f"algorithm.{override}" for override in overrides])
    with pytest.raises(ConfigError, match=f'\\.level is "none", so there is no ratio for {named} to treat; leave'):
        resolve_algorithm(config.algorithm)
