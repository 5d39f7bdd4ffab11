"""The trainer: packing changes nothing, micro-batches are summed in FP32, overflow skips, state is restored."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests import tiny_models
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

from betterhalf.algorithms.loss_stats import largest_token_share
from betterhalf.algorithms.presets import PRESETS
from betterhalf.batches import MicroBatch
from betterhalf.config.schema import RunConfig
from betterhalf.distributed.world import SingleProcess
from betterhalf.errors import InputError, LossScaleError
from betterhalf.models.loading import LoadedModel
from betterhalf.precision.roles import build_precision
from betterhalf.training.pack import by_rollout, pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, Prompt, Rollout

ALGORITHM = PRESETS["pg_seq_is"]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def tiny_model(family: str = "llama", **changes: Any) -> LoadedModel:
    return tiny_models.tiny_model(family, seed=0, **{"tie_word_embeddings": True, **changes})


def settings(preset: str, /, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "precision": {"preset": preset, **changes.pop("precision", {})},
            "sampling": {"max_tokens": 16},
            "training": {"optimizer_steps": 1, "tokens_per_micro_batch": changes.pop("budget", 4096)},
            "optimizer": {"learning_rate": 1e-2},
            **changes,
        }
    )


def trainer_for(config: RunConfig, family: str = "llama", **changes: Any) -> PolicyTrainer:
    precision = build_precision(config.precision, torch.device("cpu"))
    return PolicyTrainer(tiny_model(family, **changes), config=config, precision=precision)


def rollouts(count: int = 6) -> list[Rollout]:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 31, (length,), generator=generator).tolist())

    return [
        Rollout(
            prompt=Prompt(prompt_id=str(k), text="", token_ids=ids(3 + k % 3), answer=""),
            completion=Completion(
                token_ids=(tokens := ids(2 + 3 * (k % 4))),
                behavior_logprobs=(-3.4,) * len(tokens),
                finish_reason="stop",
                policy_version=0,
            ),
            text="",
            reward=float(k % 2),
        )
        for k in range(count)
    ]


def packs(config: RunConfig) -> tuple[MicroBatch, ...]:
    advantages = [0.5 if k % 2 else -0.5 for k in range(6)]
    return pack_step(rollouts(), advantages, config, step=1).packs


def gradients(trainer: PolicyTrainer, config: RunConfig) -> dict[str, torch.Tensor]:
    advantages = [0.5 if k % 2 else -0.5 for k in range(6)]
    step = pack_step(rollouts(), advantages, config, step=1)
    trainer.forward_backward(step.packs, ALGORITHM, step.train_batches[0].denominators)
    return {name: gradient / trainer.scaler.scale for name, gradient in trainer.weights.gradients()}


def alone(module: Any, rollout: Rollout) -> torch.Tensor:
    """Return the float64 logprobs of a completion, from a pass over its sequence alone."""
    prompt, completion = rollout.prompt.token_ids, rollout.completion.token_ids
    logits = module(torch.tensor([(*prompt, *completion)])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logprobs_equal_the_module_run_on_each_sequence_alone(family: str) -> None:
    config = settings("fp32")
    changes = {"sliding_window": 4} if family == "mistral" else {}
    plain = tiny_model(family, attn_implementation="eager", **changes).module
    trainer = trainer_for(config, family, **changes)
    for pack in packs(config):
        logprobs = trainer.measure([pack])[0].logprobs_C
        expected = torch.cat([alone(plain, rollouts()[index]) for index in pack.rollout_index_S])
        torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_measured_logprobs_are_those_of_training_bit_for_bit(precision: str) -> None:
    config = settings(precision)
    trainer = trainer_for(config)
    for pack in packs(config):
        assert torch.equal(trainer.measure([pack])[0].logprobs_C, trainer.score(pack).detach())


def test_gradients_do_not_depend_on_the_micro_batches() -> None:
    whole, cut = settings("fp32"), settings("fp32", budget=12)
    assert len(packs(cut)) > len(packs(whole)) == 1
    expected = gradients(trainer_for(whole), whole)
    for name, gradient in gradients(trainer_for(cut), cut).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def share_by_hand() -> float:
    """Return the largest token's share under REINFORCE: one sequence, one token at a time, in float64."""
    module: Any = tiny_model().module.double()
    weight_VH = module.get_output_embeddings().weight.detach()
    norms = []
    for index, rollout in enumerate(rollouts()):
        prompt, completion = rollout.prompt.token_ids, rollout.completion.token_ids
        hidden_TH = module.model(torch.tensor([(*prompt, *completion)])).last_hidden_state[0].detach()
        for position, token in enumerate(completion, len(prompt) - 1):
            pi_V = (weight_VH @ hidden_TH[position]).softmax(0)
            norms.append(abs(SHARES[index]) * float((weight_VH[token] - pi_V @ weight_VH).norm()))
    return max(norms) / sum(norm**2 for norm in norms) ** 0.5


SHARES = [0.5, -1.0, 0.25, 3.0, -0.5, 0.75]
"""Advantages of different sizes, so that one token stands out."""


@pytest.mark.parametrize("budget", [4096, 12])
@pytest.mark.parametrize(("precision", "rel"), [("fp32", 1e-5), ("fp16", 5e-3), ("bf16", 3e-2)])
def test_the_share_of_the_largest_token_is_that_of_float64_in_one_pack_and_in_many(
    precision: str, rel: float, budget: int
) -> None:
    config = settings(precision, budget=budget)
    step = pack_step(rollouts(), SHARES, config, step=1)
    stats = trainer_for(config).forward_backward(step.packs, PRESETS["reinforce"], step.train_batches[0].denominators)
    share = largest_token_share(stats)
    assert 0.1 < share < 0.9 and share == pytest.approx(share_by_hand(), rel=rel)


def siblings() -> list[Rollout]:
    """Return three siblings of one prompt, three of another, and one rollout without siblings."""
    prompts = [rollouts()[k].prompt for k in (1, 1, 2, 2, 1, 2)]
    shared = [replace(rollout, prompt=prompt) for rollout, prompt in zip(rollouts(), prompts, strict=True)]
    return [*shared, *rollouts(7)[6:]]


def of_siblings(
    budget: int, family: str, precision: str = "fp32", islands: tuple[str, ...] = (), **changes: Any
) -> tuple[int, dict[int, list[float]], dict[str, torch.Tensor], float]:
    """Return tokens, logprobs by rollout, unscaled gradients and loss; with a budget of 1 each sequence is one pack."""
    config = settings(precision, budget=budget, precision={"fp32_modules": islands})
    trainer = trainer_for(config, family, **changes)
    advantages = [0.5, -1.0, 0.25, 1.0, -0.5, 0.75, -0.25]
    step = pack_step(siblings(), advantages, config, step=1)
    logprobs: dict[int, list[float]] = {}
    for pack in step.packs:
        measured = trainer.measure([pack])[0].logprobs_C
        assert torch.equal(measured, trainer.score(pack).detach())
        logprobs |= by_rollout(pack, measured)
    stats = trainer.forward_backward(step.packs, ALGORITHM, step.train_batches[0].denominators)
    found = {name: gradient / trainer.scaler.scale for name, gradient in trainer.weights.gradients()}
    return sum(pack.num_tokens for pack in step.packs), logprobs, found, float(stats.loss)


SHARING: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("mistral", {"sliding_window": 4}),
    ("mistral", {"sliding_window": 7}),
]


@pytest.mark.parametrize(("family", "changes"), SHARING)
def test_a_shared_prompt_gives_the_logprobs_loss_and_gradients_of_sequences_apart(
    family: str, changes: dict[str, Any]
) -> None:
    apart, logprobs_apart, expected, loss_apart = of_siblings(1, family, **changes)
    shared, logprobs, gradients, loss = of_siblings(4096, family, **changes)
    prompts = [len(rollout.prompt.token_ids) for rollout in siblings()]
    assert apart - shared == 2 * prompts[0] + 2 * prompts[2]
    assert loss == pytest.approx(loss_apart, rel=1e-6)
    for index, values in logprobs.items():
        assert values == pytest.approx(logprobs_apart[index], abs=2e-6)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 2e-6 * expected[name].norm(), name


@pytest.mark.parametrize("island", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn", "model.layers.0"])
def test_a_shared_prompt_passes_through_fp32_islands(island: str) -> None:
    _, _, exact, _ = of_siblings(1, "qwen3")
    _, _, apart, _ = of_siblings(1, "qwen3", "fp16", (island,))
    _, _, shared, _ = of_siblings(4096, "qwen3", "fp16", (island,))
    for name, gradient in shared.items():
        error, error_apart = ((x - exact[name]).norm() / exact[name].norm() for x in (gradient, apart[name]))
        assert error < 2e-2 and error < 2 * error_apart, name


def test_half_gradients_are_close_to_fp32_ones_and_accumulate_in_fp32() -> None:
    expected = gradients(trainer_for(settings("fp32")), settings("fp32"))
    config = settings("fp16", budget=12)
    for name, gradient in gradients(trainer_for(config), config).items():
        assert gradient.dtype == torch.float32
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert 1e-6 < error < 2e-2, name  # rounding to half is visible, and small


def test_a_tied_head_and_embedding_are_summed_in_fp32() -> None:
    config = settings("fp16")
    trainer = trainer_for(config)
    gradient = gradients(trainer, config)["model.embed_tokens.weight"] * trainer.scaler.scale
    # two half gradients, each rounded once, added in FP32: the sum is no longer on the half grid
    assert not torch.equal(gradient, gradient.half().float())
    assert trainer.weights.masters.keys() == dict(trainer.module.named_parameters()).keys()


def test_activation_checkpointing_changes_no_bit() -> None:
    config = settings("fp16")
    expected = gradients(trainer_for(config), config)
    saving = config.model_copy(
        update={"training": config.training.model_copy(update={"activation_checkpointing": True})}
    )
    for name, gradient in gradients(trainer_for(saving), saving).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.fixture
def compiler() -> Iterator[None]:
    """Start the test like a new process: with nothing compiled."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiling(config: RunConfig, **changes: Any) -> RunConfig:
    training = config.training.model_copy(update={"compile_layers": True, **changes})
    return config.model_copy(update={"training": training})


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own parts
def test_compiled_layers_keep_every_rounding_and_are_not_recompiled_for_every_pack() -> None:
    config = settings("fp16", budget=12)
    trainer, plain = trainer_for(compiling(config)), trainer_for(config)
    compiled_graphs = []
    for pack in packs(config):
        scored, expected = trainer.score(pack), plain.score(pack)
        # Measuring before an update must give what training computes, or the first ratio would not be 1.
        assert torch.equal(trainer.measure([pack])[0].logprobs_C, scored.detach())
        torch.testing.assert_close(scored, expected, rtol=0, atol=1e-6)
        scored.sum().backward(), expected.sum().backward()
        compiled_graphs.append(counters["stats"]["unique_graphs"])
    # The second pack may recompile, with dynamic sizes.
    assert len(compiled_graphs) > 3 and compiled_graphs[1] == compiled_graphs[-1] > 0
    for (name, found), (_, wanted) in zip(trainer.weights.gradients(), plain.weights.gradients(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()), msg=name)
    assert trainer.report().facts["rounding"] == "transformers, compiled"


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own parts
def test_compiled_layers_and_activation_checkpointing_go_together() -> None:
    config = settings("fp16")
    expected = gradients(trainer_for(config), config)
    for name, gradient in gradients(trainer_for(compiling(config, activation_checkpointing=True)), config).items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-2, atol=1e-2 * float(expected[name].abs().max()))


def test_without_a_compiler_compiled_layers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(InputError, match=r"install g\+\+ or clang\+\+, or set training.compile_layers=false"):
        trainer_for(compiling(settings("fp16")))


def test_an_overflow_skips_the_step_halves_the_scale_keeps_the_version_and_names_the_parameter() -> None:
    config = settings("fp16", precision={"loss_scale": {"initial": 2.0**40}})
    trainer = trainer_for(config)
    before = {name: value.clone() for name, value in trainer.weights.computing()}
    gradients(trainer, config)
    report = trainer.optim_step(1e-2)
    assert report.skipped
    assert report.first_offender in before
    assert report.overflow_fraction > 0
    assert trainer.scaler.scale == 2.0**39
    assert trainer.policy_version == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.weights.computing())
    assert all(float(gradient.abs().max()) == 0 for _, gradient in trainer.weights.gradients())


class WithAnotherShard(SingleProcess):
    """Reductions beside another rank, whose squares sum to `square` and whose counts are all zero."""

    def __init__(self, square: float) -> None:
        self.square = square

    def sum_(self, values: torch.Tensor) -> None:
        assert values.dtype == torch.float64
        values[0] += self.square


def test_the_norm_that_clips_is_that_of_all_ranks() -> None:
    config = settings("fp32", optimizer={"max_grad_norm": 1e-3})
    alone, beside = trainer_for(config), trainer_for(config)
    for trainer in (alone, beside):
        gradients(trainer, config)
    norm = sum(float(gradient.double().square().sum()) for _, gradient in alone.weights.gradients()) ** 0.5
    beside.collective = WithAnotherShard(3 * norm**2)
    seen = {name: gradient.clone() for name, gradient in beside.weights.gradients()}
    beside.weights.zero_grad = lambda: None  # type: ignore[method-assign]
    report = beside.optim_step(1e-2)
    assert report.grad_norm == pytest.approx(2 * norm) and alone.optim_step(1e-2).grad_norm == pytest.approx(norm)
    clipped = min(1.0, config.optimizer.max_grad_norm / report.grad_norm)
    assert clipped < 0.5
    for name, gradient in beside.weights.gradients():
        torch.testing.assert_close(gradient, seen[name] * clipped, rtol=1e-5, atol=1e-12)


def test_the_scale_comes_down_until_a_step_is_applied() -> None:
    config = settings("fp16", precision={"loss_scale": {"initial": 2.0**30}})
    trainer = trainer_for(config)
    reports = []
    while not reports or reports[-1].skipped:
        gradients(trainer, config)
        reports.append(trainer.optim_step(1e-2))
    assert len(reports) > 1
    assert trainer.policy_version == 1
    assert trainer.scaler.scale == 2.0 ** (30 - (len(reports) - 1))


def test_overflow_at_the_floor_stops_the_run_with_a_reason() -> None:
    scale = {"initial": 2.0**40, "floor": 2.0**39, "max_skips_at_floor": 2}
    config = settings("fp16", precision={"loss_scale": scale})
    trainer = trainer_for(config)
    with pytest.raises(LossScaleError, match="floor"):
        for _ in range(5):
            gradients(trainer, config)
            trainer.optim_step(1e-2)


def test_an_update_moves_masters_and_publishes_their_rounding() -> None:
    config = settings("fp16")
    trainer = trainer_for(config)
    gradients(trainer, config)
    report = trainer.optim_step(1e-2)
    assert not report.skipped and report.grad_norm > 0
    for name, value in trainer.weights.computing():
        assert torch.equal(value, trainer.weights.masters[name].detach().half())


def test_state_comes_back_bit_for_bit_and_goes_on_alike() -> None:
    config = settings("fp16")
    first, second = trainer_for(config), trainer_for(config)
    gradients(first, config)
    first.optim_step(1e-2)
    second.load(copy.deepcopy(first.state()))
    for trainer in (first, second):
        gradients(trainer, config)
        trainer.optim_step(1e-2)
    assert second.policy_version == first.policy_version == 2
    for name, master in first.weights.masters.items():
        assert torch.equal(master, second.weights.masters[name]), name


def test_a_trainer_goes_back_to_an_earlier_state_and_takes_the_same_steps_again() -> None:
    """Neither optimizer states nor gradients of the steps taken meanwhile are left."""
    config = settings("fp16")
    trainer = trainer_for(config)
    start, ends = copy.deepcopy(trainer.state()), []
    for _ in range(2):
        gradients(trainer, config)
        trainer.optim_step(1e-2)
        ends.append(copy.deepcopy(trainer.state().model))
        gradients(trainer, config)
        trainer.load(start)
    assert trainer.policy_version == 0
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


def test_rope_frequencies_stay_fp32_when_parameters_are_cast() -> None:
    trainer = trainer_for(settings("bf16"))
    report = trainer.report()
    assert report.dtypes["rope"] == "fp32"
    assert report.dtypes["weights"] == report.dtypes["compute"] == report.dtypes["wire"] == "bf16"
    assert report.dtypes["lm_head"] == report.dtypes["master"] == report.dtypes["gradients"] == "fp32"
    frequencies = trainer.module.model.rotary_emb.inv_freq
    assert torch.equal(frequencies, tiny_model().module.model.rotary_emb.inv_freq)


def test_dropout_is_refused() -> None:
    with pytest.raises(InputError, match="attention_dropout=0.1"):
        trainer_for(settings("fp32"), attention_dropout=0.1)


def test_the_tiny_model_is_what_the_tests_think_it_is() -> None:
    assert isinstance(tiny_model().module, LlamaForCausalLM)
