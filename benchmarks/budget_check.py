"""Compare the effective sample size that the budget predicts with the observed one: the tables of docs/mismatch.md.

    python benchmarks/budget_check.py [MODEL] [--prompts 512] [--samples 4] [--max-tokens 64] [--cells NAME ...]

The trainer scores completions that the native engine sampled at the model's own weights. The budget is fitted on every
second prompt; the other prompts test the prediction, with completions cut to several lengths. In cells with noise every
weight of the engine is multiplied by 1 + noise x a normal number, for a mismatch larger than rounding. Prompts are
running sums for `demo`, which knows nothing else, and open questions with long answers for other models.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from betterhalf.config.schema import RunConfig
from betterhalf.diagnostics.budget import Budget, fit_budget, predict_ess
from betterhalf.diagnostics.logprob_gap import k3
from betterhalf.examine.subject import (
    Subject,
    engine_in,
    open_subject,
    precision_in,
    rounded_weights,
    sample_groups_of,
    trainer_in,
)
from betterhalf.tasks.prompting import chat_draft, encode
from betterhalf.training.pack import by_rollout, pack_step
from betterhalf.types import DtypeName, Prompt, Rollout

LENGTHS = (8, 32, 128, 512)
"""Tokens that completions are cut to, beside their full length."""
RESAMPLES = 2000

FORMS = (
    "Explain to a child how {} works.",
    "Write a short story in which {} plays a part.",
    "What should one know about {} before buying something to do with it?",
    "Tell me the history of {} in one paragraph.",
    "Compare {0} today with {0} a hundred years ago.",
    "Write a letter to a friend about {}.",
    "Argue against {}.",
    "What is surprising about {}?",
)
TOPICS = (
    *("a bicycle", "the weather forecast", "bread", "a lighthouse", "chess", "the human eye", "a railway", "coffee"),
    *("the printing press", "a compass", "rain", "a violin", "money", "sleep", "a volcano", "the calendar"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One kind of mismatch."""

    train: DtypeName
    rollout: DtypeName
    rounding: str = "engine"
    noise: float = 0.0

    @property
    def name(self) -> str:
        extra = " aligned" * (self.rounding == "aligned") + f" noise {self.noise:g}" * (self.noise > 0)
        return f"{self.train}/{self.rollout}{extra}"


CELLS = (
    Cell(train="fp16", rollout="fp16"),
    Cell(train="bf16", rollout="bf16", rounding="aligned"),
    Cell(train="bf16", rollout="bf16"),
    Cell(train="fp32", rollout="bf16"),
    Cell(train="fp16", rollout="fp16", noise=0.01),
    Cell(train="fp16", rollout="fp16", noise=0.03),
    Cell(train="fp16", rollout="fp16", noise=0.1),
    Cell(train="fp16", rollout="fp16", noise=0.2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Token log-ratios of each completion, shape [tokens], and its prompt."""

    log_ratios: list[Tensor]
    prompts: list[int]

    def part(self, remainder: int) -> Sample:
        """Completions of every second prompt."""
        keep = [i for i, prompt in enumerate(self.prompts) if prompt % 2 == remainder]
        return Sample(log_ratios=[self.log_ratios[i] for i in keep], prompts=[self.prompts[i] for i in keep])

    def cut(self, length: int) -> Sample:
        """The first `length` tokens of each completion."""
        return dataclasses.replace(self, log_ratios=[d[:length] for d in self.log_ratios])

    @property
    def lengths(self) -> list[int]:
        return [len(d) for d in self.log_ratios]

    def fit(self) -> Budget:
        index = torch.repeat_interleave(torch.arange(len(self.log_ratios)), torch.tensor(self.lengths))
        return fit_budget(torch.cat(self.log_ratios), index, len(self.log_ratios))


# -- sampling


def sampled(subject: Subject, cell: Cell, prompts: int, group_size: int) -> list[list[Rollout]]:
    """Return completions of the cell's engine, by prompt; rewards are not used."""
    settings = subject.config.model_dump()
    settings["engine"] = {"type": "native", "rounding": cell.rounding}
    subject = dataclasses.replace(subject, config=RunConfig.model_validate(settings))
    chosen = subject.prompts(prompts) if subject.target == "demo" else questions(subject, prompts)
    with engine_in(subject, cell.rollout) as engine:
        if cell.noise:
            weights = rounded_weights(subject.model, precision_in(subject, cell.rollout).roles.wire_dtype)
            engine.load_weights(noisy(weights, cell.noise), policy_version=0)
        groups = sample_groups_of(subject, engine, chosen, group_size)
    return [
        [Rollout(prompt=prompt, completion=completion, text="", reward=0.0) for completion in siblings]
        for prompt, siblings in zip(chosen, groups, strict=True)
    ]


def questions(subject: Subject, count: int) -> list[Prompt]:
    """Return open questions in the model's chat template: each form of question with a topic."""
    texts = [form.format(topic) for form in FORMS for topic in TOPICS][:count]
    tokenizer = subject.model.tokenizer
    drafts = (chat_draft(tokenizer, f"open/{i}", text, answer="") for i, text in enumerate(texts))
    return [encode(tokenizer, draft) for draft in drafts]


def noisy(weights: Iterable[tuple[str, Tensor]], noise: float) -> Iterator[tuple[str, Tensor]]:
    """Multiply every entry by 1 + noise x a normal number, seeded."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights:
        factor = 1 + noise * torch.randn(weight.shape, generator=generator)
        yield name, (weight.cpu().float() * factor).to(weight)


def scored(subject: Subject, dtype: DtypeName, groups: Sequence[Sequence[Rollout]]) -> Sample:
    """Return log pi - log mu of each token, scored by the trainer in `dtype`."""
    flat = [rollout for group in groups for rollout in group]
    trainer = trainer_in(subject, dtype)
    by_index: dict[int, list[float]] = {}
    for pack in pack_step(flat, [1.0] * len(flat), subject.config, 0).packs:
        log_pi = trainer.measure([pack])[0].logprobs_C
        by_index |= by_rollout(pack, log_pi.double() - pack.behavior_logprobs_C.double())
    return Sample(
        log_ratios=[torch.tensor(by_index[i], dtype=torch.float64) for i in range(len(flat))],
        prompts=[number for number, group in enumerate(groups) for _ in group],
    )


# -- statistics of a cell


def shape(sample: Sample) -> dict[str, float]:
    """Return the assumptions of lognormal algebra about the tokens, and the measured values."""
    d = torch.cat(sample.log_ratios)
    variance = float(d.var(correction=0))
    budget = sample.fit()
    drift, error = slope_through_origin(sample)
    return {
        "tokens": d.numel(),
        "sigma2": variance,
        "correlation": budget.correlation,
        "max_length": budget.max_length,
        "excess_kurtosis": float((d - d.mean()).pow(4).mean()) / variance**2 - 3,
        "top_percent_share": float(d.square().sort(descending=True).values[: max(1, len(d) // 100)].sum())
        / float(d.square().sum()),
        "k3_over_variance": float(k3(d).mean()) / variance,
        "drift": drift / (-variance / 2),
        "drift_error": error / (variance / 2),
    }


def slope_through_origin(sample: Sample) -> tuple[float, float]:
    """Return the mean log-ratio per token, and its standard error over completions."""
    sums = torch.stack([d.sum() for d in sample.log_ratios])
    lengths = torch.tensor(sample.lengths, dtype=torch.float64)
    mean = float(sums.sum() / lengths.sum())
    return mean, float((sums - mean * lengths).square().sum().sqrt() / lengths.sum())


def at_length(rates: dict[str, float], held_out: Sample, length: int) -> dict[str, Any]:
    """Return the share of effective samples lost at `length` tokens, predicted and observed."""
    cut = held_out.cut(length)
    own = cut.fit()
    low, high = interval(cut)
    sums = torch.stack([d.sum() for d in cut.log_ratios])
    return {
        "length": length,
        "mean_length": sum(cut.lengths) / len(cut.lengths),
        "lost": 1 - own.observed_ess,
        "lost_low": 1 - high,
        "lost_high": 1 - low,
        "predicted": {name: 1 - predicted_ess(rate, cut.lengths) for name, rate in rates.items()},
        "mean_weight": float(sums.exp().mean()),
        "correlation": own.correlation,
    }


def rates(fitted: Sample, early: Sample) -> dict[str, float]:
    """Return -d log(ESS) / d length, by three estimates from the fitted completions."""
    tokens = torch.cat(fitted.log_ratios)
    return {
        "budget": -math.log(predict_ess(fitted.fit(), 1.0)),
        "budget, first tokens": -math.log(predict_ess(early.fit(), 1.0)),
        "chi2": math.log1p(float(torch.expm1(tokens).square().mean())),
    }


def predicted_ess(rate: float, lengths: Sequence[int]) -> float:
    """Return 1 / mean(exp(rate L)) over the completions' lengths."""
    return len(lengths) / sum(math.exp(min(700.0, rate * length)) for length in lengths)


def interval(sample: Sample) -> tuple[float, float]:
    """Return the 95% interval of the effective share over resamples of whole prompts."""
    log_weights = torch.stack([d.sum() for d in sample.log_ratios])
    weights = (log_weights - log_weights.max()).exp()
    prompts = torch.tensor(sample.prompts)
    totals = torch.zeros(3, int(prompts.max()) + 1, dtype=torch.float64)
    totals.index_add_(1, prompts, torch.stack([weights, weights.square(), torch.ones_like(weights)]))
    totals = totals[:, totals[2] > 0]
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(totals.shape[1], (RESAMPLES, totals.shape[1]), generator=generator)
    first, second, count = totals[:, draws].sum(-1)
    shares = (first.square() / (count * second)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(shares[0]), float(shares[1])


def examined(sample: Sample) -> dict[str, Any]:
    """Fit on the even prompts, test on the odd ones."""
    fitted, held_out = sample.part(0), sample.part(1)
    longest = max(sample.lengths)
    lengths = [length for length in LENGTHS if length < longest] + [longest]
    found = rates(fitted, fitted.cut(max(4, longest // 8)))
    return {**shape(sample), "lengths": [at_length(found, held_out, length) for length in lengths]}


# -- the command


def print_shapes(rows: dict[str, dict[str, Any]]) -> None:
    print("\n| cell | tokens | sigma^2 | tau | length at ESS 1/2 | excess kurtosis | top 1% | k3 / variance | drift |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['tokens']} | {row['sigma2']:.1e} | {row['correlation']:.2f} | {row['max_length']:.2g} "
            f"| {row['excess_kurtosis']:.0f} | {row['top_percent_share']:.0%} | {row['k3_over_variance']:.2f} "
            f"| {row['drift']:.1f} +- {1.96 * row['drift_error']:.1f} |"
        )


def print_lengths(rows: dict[str, dict[str, Any]]) -> None:
    print(
        "\n1 - ESS: share of the effective samples that the weights lose; fitted on one half, observed on the other\n"
    )
    print("| cell | cut to | budget | from the first tokens | by chi2 | observed (95%) | tau | mean weight |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        for at in row["lengths"]:
            guesses = " | ".join(f"{value:.2g}" for value in at["predicted"].values())
            print(
                f"| {name} | {at['length']} (mean {at['mean_length']:.0f}) | {guesses} "
                f"| {at['lost']:.2g} ({at['lost_low']:.2g} to {at['lost_high']:.2g}) | {at['correlation']:.2f} "
                f"| {at['mean_weight']:.3f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--cells", nargs="*", choices=[cell.name for cell in CELLS], default=None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    config = RunConfig.model_validate(
        {
            "task": {"type": "arithmetic", "style": "auto"},
            "sampling": {"max_tokens": arguments.max_tokens},
            "training": {"optimizer_steps": 1, "tokens_per_micro_batch": 1024},
        }
    )
    rows: dict[str, dict[str, Any]] = {}
    rollouts: dict[tuple[str, str, float], list[list[Rollout]]] = {}
    with open_subject(arguments.model, config) as subject:
        for cell in CELLS:
            if arguments.cells is not None and cell.name not in arguments.cells:
                continue
            engine = (cell.rollout, cell.rounding, cell.noise)
            if engine not in rollouts:
                rollouts[engine] = sampled(subject, cell, arguments.prompts, arguments.samples)
            rows[cell.name] = examined(scored(subject, cell.train, rollouts[engine]))
            print(f"{cell.name}: done", flush=True)
    print(f"\n{arguments.model}, {arguments.prompts} prompts x {arguments.samples} completions")
    print_shapes(rows)
    print_lengths(rows)
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
