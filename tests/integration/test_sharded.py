"""A trainer sharded over ranks in processes of their own computes what a trainer in one process computes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from tests import tiny_models
from tests.ranks import run_ranks
from torch import Tensor

from betterhalf.algorithms.presets import PRESETS
from betterhalf.batches import MicroBatch, StepBatch
from betterhalf.config.schema import ClusterConfig, RunConfig
from betterhalf.distributed.group import GroupCollective
from betterhalf.distributed.world import ONE_RANK
from betterhalf.models.adapter_start import AdaptedSource, starting_values
from betterhalf.models.adapters import add_adapters
from betterhalf.models.row_source import RowSource
from betterhalf.precision.contract import weights_digests
from betterhalf.precision.cpu_linear import CpuLinear
from betterhalf.precision.roles import build_precision
from betterhalf.training.pack import pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.training.split import empty_pack, split_packs
from betterhalf.training.trainer import OptimReport, TokenScores, TrainerState
from betterhalf.training.weights.replicated import ReplicatedWeights
from betterhalf.training.weights.sharded import sharded_over
from betterhalf.types import Completion, Prompt, Rollout

ALGORITHM = PRESETS["pg_seq_is"]
STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One trainer and its batches."""

    precision: str
    ranks: int
    family: str = "llama"
    model: tuple[tuple[str, Any], ...] = ()
    islands: tuple[str, ...] = ()
    checkpointing: bool = False
    compiled: bool = False
    rollouts: int = 6
    lora: bool = False

    @property
    def config(self) -> RunConfig:
        return RunConfig.model_validate(
            {
                "precision": {"preset": self.precision, "fp32_modules": self.islands},
                "lora": {"rank": 3 if self.lora else 0},
                "sampling": {"max_tokens": 16},
                "training": {
                    "optimizer_steps": 1,
                    "tokens_per_micro_batch": 24,
                    "activation_checkpointing": self.checkpointing,
                    "compile_layers": self.compiled,
                },
                # With the usual epsilon, Adam would turn gradients that are rounding noise into whole steps.
                "optimizer": {"learning_rate": 3e-4, "max_grad_norm": 0.5, "eps": 1e-5},
            }
        ).model_copy(update={"cluster": ClusterConfig(backend="ray", trainers=self.ranks)})


class Ranked:
    """A trainer of one rank, or of one process, that is given the packs of all ranks."""

    def __init__(self, case: Case, ranks: GroupCollective | None) -> None:
        self.config = case.config
        self.place = (0, 1) if ranks is None else (ranks.membership.rank, ranks.membership.world_size)
        changes = {"tie_word_embeddings": True, **dict(case.model)}
        model = tiny_models.tiny_model(case.family, seed=0, **changes)
        parts = tiny_models.skeleton_model(model)
        source: RowSource = parts.weights
        if case.lora:
            add_adapters(parts.module if ranks else model.module, self.config.lora, seed=1)
            source = AdaptedSource(parts.weights, starting_values(self.config.lora, seed=1))
        self.trainer = PolicyTrainer(
            parts if ranks else model,
            config=self.config,
            precision=build_precision(self.config.precision, torch.device("cpu")),
            collective=ranks or ONE_RANK,
            store=sharded_over(ranks, source) if ranks else ReplicatedWeights,
            keep_reference=True,
        )

    def mine(self, packs: list[MicroBatch]) -> tuple[tuple[int, ...], list[MicroBatch]]:
        """Return this rank's indices, and its packs filled up with empty ones."""
        rank, world_size = self.place
        split = split_packs(packs, world_size)
        own = split.ranks[rank]
        return own, [*(packs[k] for k in own), *(empty_pack() for _ in range(split.passes - len(own)))]

    def measure(self, packs: list[MicroBatch], method: str = "measure") -> dict[int, Tensor]:
        """Return index of the pack -> logprobs, for this rank's packs."""
        own, padded = self.mine(packs)
        scores: list[TokenScores] = getattr(self.trainer, method)(padded)
        assert all(score.logprobs_C.shape == score.entropies_C.shape == (0,) for score in scores[len(own) :])
        return {index: score.logprobs_C for index, score in zip(own, scores, strict=False)}

    def learn(self, batch: StepBatch) -> float:
        """Add the gradients of a batch, and return the loss of this rank's packs."""
        (train,) = batch.train_batches
        _, padded = self.mine([batch.packs[k] for k in train.micro_batches])
        return float(self.trainer.forward_backward(padded, ALGORITHM, train.denominators).loss)


@dataclass
class Found:
    """Results of one rank."""

    losses: list[float] = field(default_factory=list)
    reports: list[OptimReport] = field(default_factory=list)
    scores: list[dict[int, Tensor]] = field(default_factory=list)
    wire: dict[str, Tensor] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    state: TrainerState | None = None
    reference: list[dict[int, Tensor]] = field(default_factory=list)
    kept: list[dict[int, Tensor]] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    repeated: bool = False
    overflow: OptimReport | None = None


def batch_of(case: Case, step: int) -> StepBatch:
    generator = torch.Generator().manual_seed(step)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 31, (length,), generator=generator).tolist())

    rollouts = [
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
        for k in range(case.rollouts)
    ]
    # Of one sign, so that the loss is no small difference of large sums.
    advantages = [0.5 if k % 2 else 0.75 for k in range(case.rollouts)]
    return pack_step(rollouts, advantages, case.config, step=step)


def _watch(trainer: PolicyTrainer, found: Found) -> None:
    """Note every `CpuLinear` that computes with another weight than it holds."""

    def check(layer: CpuLinear, _: object) -> None:
        if not torch.equal(layer.weight_wide(), layer.weight.detach().float()):
            found.stale.append(str(layer))

    for part in trainer.module.modules():
        if isinstance(part, CpuLinear):
            part.register_forward_pre_hook(check)


def run(ranks: GroupCollective | None, case: Case) -> Found:
    """Train for some steps; then measure at the reference and at a kept version, report, and go back to a state."""
    one, found = Ranked(case, ranks), Found()
    trainer = one.trainer
    if not case.config.training.compile_layers:
        _watch(trainer, found)
    first = list(batch_of(case, 0).packs)
    before = one.measure(first)
    same = one.measure(first, "measure_reference")
    assert all(torch.equal(before[k], same[k]) for k in before), "the policy is its own reference"
    for step in range(STEPS):
        batch = batch_of(case, step)
        found.scores.append(one.measure(list(batch.packs)))
        if step == STEPS - 1:
            trainer.keep_version()
            last = found.scores[-1]
            state = trainer.state()
            state = TrainerState(
                model={name: value.clone() for name, value in state.model.items()},
                optimizer={name: value.clone() for name, value in state.optimizer.items()},
                loss_scaler=state.loss_scaler,
                policy_version=state.policy_version,
                reference=state.reference,
                reference_digest=state.reference_digest,
                base_digest=state.base_digest,
            )
        found.losses.append(one.learn(batch))
        found.reports.append(trainer.optim_step(3e-4))
    found.state = state
    found.kept = [last, one.measure(list(batch.packs), "measure_kept")]
    now = one.measure(first)
    found.reference = [before, one.measure(first, "measure_reference"), now, one.measure(first)]
    found.wire = dict(trainer.weight_stream())
    report = trainer.report()
    found.digests, found.facts, found.dtypes = report.digests, report.facts, dict(report.dtypes)
    stream = trainer.weight_stream()
    assert stream.digests() == weights_digests(trainer.outgoing.computing()), "the wire is not what computes"
    # the last step once more, from its state
    trainer.load(state)
    again = one.learn(batch)
    repeated = trainer.optim_step(3e-4)
    after = weights_digests(trainer.outgoing.computing())
    found.repeated = again == found.losses[-1] and repeated == found.reports[-1] and after == found.digests
    found.overflow = _overflown(one, batch)
    assert weights_digests(trainer.outgoing.computing()) == after, "a skipped step changed weights"
    return found


def _overflown(one: Ranked, batch: StepBatch) -> OptimReport:
    """Take an optimizer step after the last entry of one gradient, which the last rank holds, has overflown."""
    one.learn(batch)
    rank, world_size = one.place
    # the gradient of an FSDP2 parameter: the same memory in every call
    gradients = dict(one.trainer.weights.gradients())
    if rank == world_size - 1:
        gradients.get("model.norm.weight", list(gradients.values())[-1])[-1] = math.inf
    return one.trainer.optim_step(1e-3)


@cache
def alone(case: Case) -> Found:
    return run(None, case)


def run_all(ranks: GroupCollective, cases: list[Case]) -> list[Found]:
    return [run(ranks, case) for case in cases]


@cache
def _of_ranks(count: int) -> dict[Case, list[Found]] | AssertionError:
    """Run all cases of a number of ranks in the same processes, whose start takes longer than the cases.

    An error is returned, so that it is kept too: each test would run all cases again.
    """
    cases = [case for case in CASES if case.ranks == count]
    try:
        found = run_ranks(run_all, count, cases)
    except AssertionError as error:
        return error
    return {case: [results[place] for results in found] for place, case in enumerate(cases)}


def together(case: Case) -> list[Found]:
    found = _of_ranks(case.ranks)
    if isinstance(found, AssertionError):
        raise found
    return found[case]


def joined(parts: list[dict[int, Tensor]]) -> Tensor:
    """Return the logprobs of all ranks in the order of the packs."""
    every = {index: value for part in parts for index, value in part.items()}
    return torch.cat([every[index] for index in sorted(every)])


TIED = Case(precision="fp32", ranks=2)
# 3 ranks: 4 rows of each q_norm leave none for the third; a rank has one pack less than the others
UNTIED = Case(
    precision="fp32",
    ranks=3,
    family="qwen3",
    model=(("tie_word_embeddings", False), ("head_dim", 4)),
)
HALF = Case(precision="fp16", ranks=2)
UNTIED_HALF = Case(precision="fp16", ranks=2, model=(("tie_word_embeddings", False),), checkpointing=True)
ISLANDS = Case(precision="fp16", ranks=2, islands=("model.layers.1", "model.layers.0.mlp.down_proj"))
BRAIN = Case(precision="bf16", ranks=2, family="qwen2", islands=("model.layers.0.self_attn",), checkpointing=True)
ADAPTED = Case(precision="fp32", ranks=2, model=(("tie_word_embeddings", False),), lora=True)
ADAPTED_HALF = Case(precision="fp16", ranks=2, islands=("model.layers.0.mlp.down_proj",), lora=True)
MIXED = Case(precision="fp32", ranks=2, family="qwen3_moe", model=tuple(tiny_models.EXPERTS.items()))
# 5 experts: the first rank holds 3 of each layer, the second 2
MIXED_HALF = Case(
    precision="fp16",
    ranks=2,
    family="qwen3_moe",
    model=(*tiny_models.EXPERTS.items(), ("num_experts", 5)),
    checkpointing=True,
)
ADAPTED_EXPERTS = Case(
    precision="fp32",
    ranks=2,
    family="qwen3_moe",
    model=tuple({"head_dim": 8, **tiny_models.EXPERTS}.items()),
    lora=True,
)
CASES = [
    ADAPTED,
    ADAPTED_EXPERTS,
    ADAPTED_HALF,
    TIED,
    UNTIED,
    HALF,
    UNTIED_HALF,
    ISLANDS,
    BRAIN,
    MIXED,
    MIXED_HALF,
]


def name_of(case: Case) -> str:
    parts = {"untied": not dict(case.model).get("tie_word_embeddings", True), "islands": bool(case.islands)}
    parts |= {"checkpointing": case.checkpointing, "compiled": case.compiled, "lora": case.lora}
    return "-".join([case.precision, case.family, *(name for name, present in parts.items() if present)])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_losses_norms_and_logprobs_are_those_of_one_process(case: Case) -> None:
    one, ranks = alone(case), together(case)
    # half weights may round to the neighbouring number after sums in another order
    tolerance = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 1e-2}[case.precision]
    for step in range(STEPS):
        loss = sum(found.losses[step] for found in ranks)
        assert loss == pytest.approx(one.losses[step], rel=tolerance, abs=1e-9)
        reports = [found.reports[step] for found in ranks]
        assert all(report == reports[0] for report in reports), "ranks differ"
        assert reports[0].grad_norm == pytest.approx(one.reports[step].grad_norm, rel=10 * tolerance)
        assert (reports[0].skipped, reports[0].loss_scale, reports[0].policy_version) == (
            one.reports[step].skipped,
            one.reports[step].loss_scale,
            one.reports[step].policy_version,
        )
        torch.testing.assert_close(
            joined([found.scores[step] for found in ranks]),
            joined([one.scores[step]]),
            rtol=tolerance,
            atol=tolerance,
        )


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_first_pass_has_the_bits_of_one_process(case: Case) -> None:
    # the same weights, and the pack is the unit: nothing is added over ranks yet
    assert torch.equal(joined([found.scores[0] for found in together(case)]), joined([alone(case).scores[0]]))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_all_ranks_hold_the_weights_on_the_wire(case: Case) -> None:
    one, ranks = alone(case), together(case)
    assert list(ranks[0].wire) == list(one.wire)
    for found in ranks:
        assert found.digests == ranks[0].digests
        for name, weight in found.wire.items():
            assert weight.dtype == one.wire[name].dtype and weight.shape == one.wire[name].shape
            assert torch.equal(weight, ranks[0].wire[name])
            torch.testing.assert_close(weight.float(), one.wire[name].float(), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reports_of_all_ranks_are_those_of_one_process(case: Case) -> None:
    for found in together(case):
        assert (found.facts, found.dtypes) == (alone(case).facts, alone(case).dtypes)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_no_layer_computes_with_the_weights_of_an_earlier_update(case: Case) -> None:
    assert [found.stale for found in together(case)] == [[]] * case.ranks


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference_and_kept_weights_trade_places_without_a_trace(case: Case) -> None:
    for found in [alone(case), *together(case)]:
        before, reference, now, again = found.reference
        for index, logprobs in before.items():
            assert torch.equal(reference[index], logprobs)
            assert torch.equal(again[index], now[index]) and not torch.equal(now[index], logprobs)
        last, kept = found.kept
        assert all(torch.equal(last[index], kept[index]) for index in last)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_loaded_state_repeats_the_step_bit_for_bit(case: Case) -> None:
    assert alone(case).repeated
    assert [found.repeated for found in together(case)] == [True] * case.ranks


@pytest.mark.parametrize("case", [TIED, UNTIED], ids=name_of)
def test_rows_of_all_ranks_make_up_the_state_of_one_process(case: Case) -> None:
    one, parts = alone(case).state, [found.state for found in together(case)]
    assert one is not None
    for part in parts:
        assert part is not None and part.model.keys() == one.model.keys()
        assert part.optimizer.keys() == one.optimizer.keys() and part.loss_scaler == one.loss_scaler
        assert part.reference_digest == one.reference_digest
        assert not any(isinstance(value, torch.distributed.tensor.DTensor) for value in part.model.values())
    for kind in ("model", "optimizer"):
        for name, value in getattr(one, kind).items():
            rows = [getattr(part, kind)[name] for part in parts]
            whole = torch.cat(rows) if value.dim() else rows[0]
            torch.testing.assert_close(whole, value, rtol=1e-4, atol=1e-5)
    if case is UNTIED:
        assert parts[2] is not None
        assert parts[2].model["model.layers.0.self_attn.q_norm.weight"].shape == (0,)


@pytest.mark.parametrize(("case", "counts"), [(MIXED, (4, 4)), (MIXED_HALF, (3, 2))], ids=["even", "uneven"])
def test_each_rank_holds_whole_experts(case: Case, counts: tuple[int, int]) -> None:
    one, parts = alone(case).state, [found.state for found in together(case)]
    assert one is not None
    for name, whole in one.model.items():
        if ".experts." in name:
            held = [part.model[name] for part in parts if part is not None]
            assert tuple(len(rows) for rows in held) == counts
            assert all(rows.shape[1:] == whole.shape[1:] for rows in held)
            torch.testing.assert_close(torch.cat(held), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_an_overflow_in_the_shard_of_one_rank_skips_the_step_on_all(case: Case) -> None:
    one = alone(case).overflow
    experts = case.family == "qwen3_moe"
    last_adapter = f"model.layers.1.{'self_attn.o_proj' if experts else 'mlp.down_proj'}.lora_B.default.weight"
    assert one is not None and one.skipped
    assert one.first_offender == (last_adapter if case.lora else "model.norm.weight")
    for found in together(case):
        assert found.overflow is not None and found.overflow.skipped
        for name in ("first_offender", "loss_scale", "policy_version", "overflow_fraction"):
            assert getattr(found.overflow, name) == getattr(one, name), name


def test_fp16_halves_the_scale_after_the_overflow_of_one_rank() -> None:
    for found in together(HALF):
        assert found.overflow is not None
        assert found.overflow.loss_scale == found.reports[-1].loss_scale / 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own parts
def test_compiled_layers_are_sharded_like_plain_ones() -> None:
    compiled = replace(HALF, compiled=True)
    one, ranks = alone(compiled), run_ranks(run, 2, compiled)
    assert [sum(losses) for losses in zip(*(found.losses for found in ranks), strict=True)] == pytest.approx(
        one.losses, rel=1e-3
    )
    for found in ranks:
        assert found.repeated and found.facts == one.facts and not found.stale
    assert torch.equal(joined([found.scores[0] for found in ranks]), joined([one.scores[0]]))
