"""Measure (trainer dtype, rollout dtype) pairs: one rollout for each rollout dtype, scored by one trainer at a time.

What fails is recorded with its reason and the rest goes on; a recorder is told of everything as soon as it is there.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, compress
from typing import Literal, TypeVar

import torch
from torch import Tensor

from betterhalf.config.schema import RunConfig
from betterhalf.diagnostics.pair_report import PairReport, TemperatureFit, failed_pair, pair_report, temperature_fit
from betterhalf.errors import BetterhalfError, EngineDiedError, MissingExtraError
from betterhalf.examine.dump import write_dump
from betterhalf.examine.scoring import Item, score_completions
from betterhalf.examine.subject import Subject, engine_in, sample_groups_of, trainer_in
from betterhalf.run_dir import RunDir
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, DtypeName, Prompt

Group = tuple[Prompt, tuple[Completion, ...]]
"""A prompt and the siblings sampled for it."""

Scores = Sequence[Sequence[float]]
"""For each completion, the trainer's logprob of each of its tokens."""

Value = TypeVar("Value")

_FIT_TOKENS = 4096
"""Completion tokens that tell raw from processed logprobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one policy mu sampled."""

    rollout: str
    """Its rollout dtype; `dump` where a file does not say."""
    items: tuple[Item, ...]
    """[S] prompt and completion of each; siblings stand together."""
    prompt_ids: tuple[str, ...]
    """[S] names the prompt of each."""
    groups: tuple[Group, ...] = ()
    """The same with whole prompts, where they are known."""
    scored: tuple[tuple[bool, ...], ...] = ()
    """[S] of a file: which tokens of each completion the engine sampled; all of them if empty."""

    def only_scored(self, rows: Sequence[Sequence[Value]]) -> list[list[Value]]:
        """Reduce values of all completion tokens to those of the tokens that the engine sampled."""
        if not self.scored:
            return [list(row) for row in rows]
        return [list(compress(row, scored)) for row, scored in zip(rows, self.scored, strict=True)]


class Recorder:
    """Is told of everything when it happens. This one keeps nothing."""

    def sampled(self, sample: Sample) -> None:
        """A rollout is complete."""

    def measured(self, report: PairReport, sample: Sample, trainer_logprobs: Scores) -> None:
        """A pair is complete."""

    def failed(self, report: PairReport, error: BetterhalfError) -> None:
        """A pair cannot be measured."""

    def spent(self, phase: Literal["generate", "score"], dtype: str, seconds: float) -> None:
        """What a rollout, or everything that one trainer did, cost."""

    def advance(self, label: str) -> None:
        """One more rollout or pair is done with, for better or worse."""


class _RolloutFiles(Recorder):
    """Keeps rollouts in a run folder."""

    def __init__(self, run: RunDir | None, temperature: float, advance: Callable[[str], None]) -> None:
        self._run, self._temperature, self._advance = run, temperature, advance

    def sampled(self, sample: Sample) -> None:
        if self._run is not None:
            write_rollouts(self._run, sample, self._temperature)

    def advance(self, label: str) -> None:
        self._advance(label)


def measure_pairs(
    subject: Subject,
    pairs: Sequence[tuple[DtypeName, DtypeName]],
    *,
    prompts: Sequence[Prompt],
    group_size: int,
    run: RunDir | None = None,
    advance: Callable[[str], None] = lambda label: None,
) -> list[PairReport]:
    """Sample once for each rollout dtype and score in each trainer dtype asked for.

    Args:
        subject: what is examined; `probe` of its configuration says how intervals are made.
        pairs: (trainer dtype, rollout dtype).
        prompts: to complete.
        group_size: completions of each.
        run: folder that gets `rollouts-<dtype>.jsonl`, in the schema of docs/probe.md; none if absent.
        advance: told of each rollout and each pair that is done.

    Returns:
        One report for each pair, in their order; a pair that failed has `error` set and NaN for numbers.

    Raises:
        InputError, RunError: nothing could be sampled in any of the rollout dtypes.
        MissingExtraError: the engine's package is not installed.
    """
    recorder = _RolloutFiles(run, subject.config.sampling.temperature, advance)
    samples = sample_dtypes(subject, pairs, prompts, group_size, recorder)
    return score_pairs(subject, pairs, samples, recorder)


def write_rollouts(run: RunDir, sample: Sample, temperature: float) -> None:
    """Keep what was sampled in one dtype as `rollouts-<dtype>.jsonl`, which `--from-dump` reads.

    Raises:
        RunError: the disk is full or cannot be written.
    """
    path = run.path / f"rollouts-{sample.rollout}.jsonl"
    write_dump(path, sample.rollout, sample.prompt_ids, sample.items, temperature)


def sample_dtypes(
    subject: Subject,
    pairs: Sequence[tuple[DtypeName, DtypeName]],
    prompts: Sequence[Prompt],
    group_size: int,
    recorder: Recorder,
) -> dict[str, Sample | BetterhalfError]:
    """By rollout dtype: what was sampled, or why it could not be.

    Raises:
        InputError, RunError: all of them failed; this is the first one's error.
        MissingExtraError: the engine's package is not installed.
    """
    outcomes: dict[str, Sample | BetterhalfError] = {}
    for dtype in dict.fromkeys(rollout for _, rollout in pairs):
        with _timed(recorder, "generate", dtype):
            try:
                outcomes[dtype] = _sample(subject, dtype, prompts, group_size)
            except MissingExtraError:
                raise
            except BetterhalfError as error:
                # A kept traceback would keep the engine in memory.
                outcomes[dtype] = error.with_traceback(None)
        outcome = outcomes[dtype]
        if isinstance(outcome, Sample):
            recorder.sampled(outcome)
        recorder.advance(f"sampled in {dtype}")
    errors = [outcome for outcome in outcomes.values() if isinstance(outcome, BetterhalfError)]
    if len(errors) == len(outcomes):
        raise errors[0]
    return outcomes


def _sample(subject: Subject, dtype: DtypeName, prompts: Sequence[Prompt], group_size: int) -> Sample:
    try:
        with engine_in(subject, dtype) as engine:
            siblings = sample_groups_of(subject, engine, prompts, group_size)
    except EngineDiedError:
        # Requests are seeded: a second engine gives what the first one would have given.
        with engine_in(subject, dtype) as engine:
            siblings = sample_groups_of(subject, engine, prompts, group_size)
    groups = tuple(zip(prompts, siblings, strict=True))
    flat = [(prompt, completion) for prompt, group in groups for completion in group]
    return Sample(
        rollout=dtype,
        items=tuple((prompt.token_ids, completion) for prompt, completion in flat),
        prompt_ids=tuple(prompt.prompt_id for prompt, _ in flat),
        groups=groups,
    )


def score_pairs(
    subject: Subject,
    pairs: Sequence[tuple[DtypeName, str]],
    samples: Mapping[str, Sample | BetterhalfError],
    recorder: Recorder,
) -> list[PairReport]:
    """Score every sample in the trainer dtypes asked for; one trainer lives at a time."""
    reports: dict[tuple[str, str], PairReport] = {}
    for train in dict.fromkeys(train for train, _ in pairs):
        rollouts = list(dict.fromkeys(rollout for other, rollout in pairs if other == train))
        with _timed(recorder, "score", train):
            for report in _score_in(subject, train, [(rollout, samples[rollout]) for rollout in rollouts], recorder):
                reports[report.train, report.rollout] = report
        gc.collect()  # parameters and their hooks refer to each other; the next trainer needs this one's memory
    return [reports[pair] for pair in pairs]


def _score_in(
    subject: Subject,
    train: DtypeName,
    samples: Sequence[tuple[str, Sample | BetterhalfError]],
    recorder: Recorder,
) -> Iterator[PairReport]:
    """The pairs of one trainer."""
    trainer: PolicyTrainer | BetterhalfError
    try:
        trainer = trainer_in(subject, train)
    except BetterhalfError as error:
        trainer = error.with_traceback(None)
    for rollout, sample in samples:
        started = time.perf_counter()
        try:
            yield _measure(trainer, train, sample, subject.config, recorder)
        except BetterhalfError as error:
            report = failed_pair(train, rollout, str(error), seconds=time.perf_counter() - started)
            recorder.failed(report, error)
            yield report
        recorder.advance(f"{train}/{rollout}")


def _measure(
    trainer: PolicyTrainer | BetterhalfError,
    train: str,
    sample: Sample | BetterhalfError,
    config: RunConfig,
    recorder: Recorder,
) -> PairReport:
    for part in (sample, trainer):
        if isinstance(part, BetterhalfError):
            raise part
    assert isinstance(sample, Sample) and isinstance(trainer, PolicyTrainer)
    started = time.perf_counter()
    scores = score_completions(trainer, sample.items, config)
    report = compare(train, sample, scores, config, seconds=time.perf_counter() - started)
    if sample.scored and config.sampling.temperature != 1.0:
        report = replace(report, temperature=_temperature_fit(trainer, sample, scores, config))
    recorder.measured(report, sample, scores)
    return report


def _temperature_fit(trainer: PolicyTrainer, sample: Sample, scores: Scores, config: RunConfig) -> TemperatureFit:
    """Tell whether a file's logprobs are of the stated temperature or raw, by the first completions."""
    behavior = sample.only_scored([completion.behavior_logprobs for _, completion in sample.items])
    count = 1 + sum(total < _FIT_TOKENS for total in accumulate(map(len, behavior[:-1])))
    first = replace(sample, items=sample.items[:count], scored=sample.scored[:count])
    raw = score_completions(trainer, first.items, config, temperature=1.0)
    return temperature_fit(
        config.sampling.temperature,
        _flat(behavior[:count]),
        _flat(first.only_scored(scores[:count])),
        _flat(first.only_scored(raw)),
    )


def compare(train: str, sample: Sample, scores: Scores, config: RunConfig, *, seconds: float) -> PairReport:
    """The pair that a sample and its trainer logprobs make.

    Raises:
        EngineError, NumericsError: logprobs that are not finite.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(sample.prompt_ids))}
    behavior = sample.only_scored([completion.behavior_logprobs for _, completion in sample.items])
    lengths = torch.tensor(list(map(len, behavior)))
    return pair_report(
        train,
        sample.rollout,
        _flat(sample.only_scored(scores)),
        _flat(behavior),
        torch.arange(len(lengths)).repeat_interleave(lengths),
        len(lengths),
        seconds=seconds,
        bootstrap=config.probe.bootstrap,
        confidence=config.probe.confidence,
        seed=config.seed,
        cluster_index_S=torch.tensor([names[name] for name in sample.prompt_ids]),
    )


def _flat(values: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([value for row in values for value in row], dtype=torch.float64)


@contextmanager
def _timed(recorder: Recorder, phase: Literal["generate", "score"], dtype: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        recorder.spent(phase, dtype, time.perf_counter() - started)
