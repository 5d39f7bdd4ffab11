"""A loss of the user's own: its mistakes are found before a run, and its metrics are means over tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.unit.algorithms.test_loss_stats import INDEX

from betterhalf.algorithms.loss_stats import LossStats, policy_metrics
from betterhalf.algorithms.own_loss import try_own_loss
from betterhalf.algorithms.policy_loss import policy_loss
from betterhalf.algorithms.presets import Algorithm, resolve_algorithm
from betterhalf.batches import Denominators, LossInputs
from betterhalf.config.schema import AlgorithmConfig
from betterhalf.errors import ConfigError, RunError
from betterhalf.metrics.names import check_known

HEAD = "import torch\n\ndef loss(inputs, denominators, algorithm):\n    x = inputs.current_logprobs_C\n"
OF = Denominators(sequences=2.0, tokens=8.0, max_tokens=8)


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Algorithm]:
    """Write a module whose function `loss` has these lines, and resolve an algorithm with it."""
    count = iter(range(99))

    def resolve(body: str, head: str = HEAD, **choices: object) -> Algorithm:
        file = tmp_path / f"loss{next(count)}.py"
        file.write_text(f"{head}    {body}\n")
        return resolve_algorithm(AlgorithmConfig.model_validate({"loss": f"{file}:loss", **choices}))

    return resolve


def inputs(tokens: int = 8) -> LossInputs:
    current = torch.linspace(-3, -1, 8)[:tokens].requires_grad_()
    return LossInputs(
        current_logprobs_C=current,
        proximal_logprobs_C=current.detach() - torch.tensor(2.0).log(),
        behavior_logprobs_C=current.detach(),
        advantages_S=torch.tensor([1.0, -1.0]),
        sequence_index_C=INDEX[:tokens],
    )


MISTAKES = {
    "return 1 / 0": r"raised ZeroDivisionError at .*loss0.py:5: division by zero",
    "raise SystemExit(0)": r"raised SystemExit at .*loss0.py:5: 0",
    "return torch.nn.functional.softmax(x, dim=5)": r"raised IndexError at .*loss0.py:5: Dimension out of range",
    "return inputs.logprobs": r"raised AttributeError.*no attribute 'logprobs'",
    "return 0.5": "returned float; return a tensor",
    "return None": "returned NoneType; return a tensor",
    "return x": r"returned a tensor of shape \[5\]; reduce it to one number",
    "return x.sum().double()": r"returned a loss in torch.float64; convert it with .float\(\)",
    "return x.detach().sum()": "returned a loss without a graph",
    "return torch.zeros((), requires_grad=True)": "does not depend on inputs.current_logprobs_C",
    "return x.sum() / 0": "has a value that is not finite on two sequences",
    "return (x + 0.5).clamp(min=0).sqrt().sum()": "has a gradient that is not finite on two sequences",
    "return x.sum(), [1.0]": "returned metrics of type list",
    "return x.sum(), {'a b': 1.0}": "returned a metric named 'a b'",
    "return x.sum(), {'a': 'b'}": "returned str as metric 'a'",
    "return x.sum(), {'a': torch.zeros(3)}": r"returned metric 'a' of shape \[3\]",
}


@pytest.mark.parametrize("body", MISTAKES)
def test_a_mistake_is_found_by_trying_the_loss(own: Callable[..., Algorithm], body: str) -> None:
    algorithm = own(body)
    assert algorithm.loss is not None
    with pytest.raises(ConfigError, match=f"algorithm.loss=.*loss0.py:loss {MISTAKES[body]}"):
        try_own_loss(algorithm.loss, algorithm)


def test_a_missing_function_and_other_arguments_are_found_when_it_is_loaded(own: Callable[..., Algorithm]) -> None:
    with pytest.raises(ConfigError, match="no attribute 'loss'. Did you mean los"):
        own("return 0", head="def los(inputs, denominators, algorithm):\n")
    with pytest.raises(ConfigError, match=r"has the signature loss\(inputs\).*Expected: def loss\(inputs: LossInputs"):
        own("return 0", head="def loss(inputs):\n")


def test_trying_a_loss_draws_nothing_from_the_global_generator(own: Callable[..., Algorithm]) -> None:
    algorithm = own("return (x * torch.rand(())).sum()")
    assert algorithm.loss is not None
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    try_own_loss(algorithm.loss, algorithm)
    assert torch.equal(torch.rand(3), expected)


def test_a_mistake_that_shows_later_ends_the_run_with_its_place(own: Callable[..., Algorithm]) -> None:
    algorithm = own("return x.sum() if len(x) < 8 else x")
    assert algorithm.loss is not None
    try_own_loss(algorithm.loss, algorithm)
    with pytest.raises(RunError, match=r"loss0.py:loss returned a tensor of shape \[8\]"):
        policy_loss(algorithm, inputs(), OF)


def test_it_reads_the_choices_of_the_preset(own: Callable[..., Algorithm]) -> None:
    algorithm = own("return x.sum() * algorithm.surrogate.upper", preset="grpo")
    one = inputs()
    assert policy_loss(algorithm, one, OF).loss.item() == pytest.approx(one.current_logprobs_C.sum().item() * 1.28)
    assert algorithm.needs_proximal


def test_a_number_counts_once_for_each_token_and_a_tensor_by_its_values(own: Callable[..., Algorithm]) -> None:
    algorithm = own("return x.sum(), {'size': len(x), 'part/first': x < -2.9}")
    stats = policy_loss(algorithm, inputs(8), OF).stats + policy_loss(algorithm, inputs(2), OF).stats
    metrics = policy_metrics(LossStats.empty() + stats)
    assert metrics["loss/size"] == pytest.approx((8 * 8 + 2 * 2) / 10)
    assert metrics["loss/part/first"] == pytest.approx(2 / 10)
    check_known(metrics)


def test_what_the_loss_does_to_its_ratios_is_unknown_and_the_drift_is_not(own: Callable[..., Algorithm]) -> None:
    found = policy_metrics(policy_loss(own("return x.sum()"), inputs(), OF).stats)
    unknown = {name for name, value in found.items() if value is None}
    assert unknown == {
        *("policy/clip_fraction", "policy/mask_fraction", "policy/truncate_fraction"),
        *("policy/rejected_share/short", "policy/rejected_share/long", "policy/ess_before", "policy/ess_after"),
    }
    assert found["policy/ratio/mean"] == found["policy/ratio/max_negative"] == pytest.approx(2.0)


def test_without_tokens_the_function_is_not_called(own: Callable[..., Algorithm]) -> None:
    output = policy_loss(own("raise ValueError"), inputs(0), OF)
    assert output.loss.item() == 0 and output.loss.requires_grad
    assert policy_metrics(output.stats)["policy/clip_fraction"] == 0.0


def test_metrics_outside_the_catalogue_are_free_in_the_users_areas_only() -> None:
    check_known(["loss/anything", "task/anything"])
    with pytest.raises(ValueError, match="'losses/anything' is not in the catalogue"):
        check_known(["losses/anything"])
