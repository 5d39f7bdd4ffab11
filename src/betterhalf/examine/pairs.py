"""Measure (trainer dtype, rollout dtype) pairs: sample once for each rollout dtype, score with one trainer at a time.

A failure is recorded with its reason, and the other pairs are still measured. A recorder receives every result at once.
"""

from __future__ import annotations

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
from betterhalf.process import collect_garbage
from betterhalf.run_dir import RunDir
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, DtypeName, Prompt

Group = tuple[Prompt, tuple[Completion, ...]]
"""(prompt, its siblings)."""

Scores = Sequence[Sequence[float]]
"""Trainer logprob of each token of each completion."""

Value = TypeVar("Value")

_FIT_TOKENS = 4096
"""Number of completion tokens that decide whether logprobs are raw or of the stated temperature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Completions that one policy mu sampled."""

    rollout: str
    """Rollout dtype; `dump` if a file does not give it."""
    items: tuple[Item, ...]
    """[S] prompt and completion; siblings are adjacent."""
    prompt_ids: tuple[str, ...]
    """[S] id of each completion's prompt."""
    groups: tuple[Group, ...] = ()
    """Same completions grouped by prompt, with whole prompts; empty for a file."""
    scored: tuple[tuple[bool, ...], ...] = ()
    """[S] for each token of a completion from a file, True if the engine sampled it; empty if it sampled all tokens."""

    def only_scored(self, rows: Sequence[Sequence[Value]]) -> list[list[Value]]:
        """Keep the values of tokens that the engine sampled, from one value for each completion token."""
        if not self.scored:
            return [list(row) for row in rows]
        return [list(compress(row, scored)) for row, scored in zip(rows, self.scored, strict=True)]


class Recorder:
    """Receiver of results as they arrive. This base class ignores them."""

    def sampled(self, sample: Sample) -> None:
        """Record the completed rollouts of one dtype."""

    def measured(self, report: PairReport, sample: Sample, trainer_logprobs: Scores) -> None:
        """Record a measured pair."""

    def failed(self, report: PairReport, error: BetterhalfError) -> None:
        """Record a pair that cannot be measured."""

    def spent(self, phase: Literal["generate", "score"], dtype: str, seconds: float) -> None:
        """Record the time spent on the rollouts of one dtype, or on everything that one trainer did."""

    def advance(self, label: str) -> None:
        """Count one more finished rollout dtype or pair, successful or not."""


class _RolloutFiles(Recorder):
    """Recorder that writes rollouts to a run folder."""

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
    """Sample once for each rollout dtype, and score in each requested trainer dtype.

    Args:
        subject: model and settings; `probe` has those of the confidence intervals.
        pairs: (trainer dtype, rollout dtype) of each pair.
        prompts: prompts to complete.
        group_size: completions of each prompt.
        run: folder for `rollouts-<dtype>.jsonl`, in the schema of docs/probe.md; None to write no files.
        advance: called with a label after each rollout dtype and each pair.

    Returns:
        One report for each pair, in the order of `pairs`; a pair that failed has `error` set, and NaN for numbers.

    Raises:
        InputError, RunError: nothing could be sampled in any of the rollout dtypes.
        MissingExtraError: the engine's package is not installed.
    """
    recorder = _RolloutFiles(run, subject.config.sampling.temperature, advance)
    samples = sample_dtypes(subject, pairs, prompts, group_size, recorder)
    return score_pairs(subject, pairs, samples, recorder)


def write_rollouts(run: RunDir, sample: Sample, temperature: float) -> None:
    """Write the completions of one rollout dtype to `rollouts-<dtype>.jsonl`, which `--from-dump` reads.

    Raises:
        RunError: the file cannot be written, for example because the disk is full.
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
    """Sample in every rollout dtype of the pairs; return the completions of each, or the error that prevented them.

    Raises:
        InputError, RunError: all dtypes failed; this is the error of the first.
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
                # The traceback would keep the engine in memory.
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
        # Requests are seeded: a second engine samples what the first one would have sampled.
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
    """Score every sample in the requested trainer dtypes, with only one trainer in memory at a time."""
    reports: dict[tuple[str, str], PairReport] = {}
    for train in dict.fromkeys(train for train, _ in pairs):
        rollouts = list(dict.fromkeys(rollout for other, rollout in pairs if other == train))
        with _timed(recorder, "score", train):
            for report in _score_in(subject, train, [(rollout, samples[rollout]) for rollout in rollouts], recorder):
                reports[report.train, report.rollout] = report
        # Parameters and their hooks refer to each other; the next trainer needs this one's memory.
        collect_garbage()
    return [reports[pair] for pair in pairs]


def _score_in(
    subject: Subject,
    train: DtypeName,
    samples: Sequence[tuple[str, Sample | BetterhalfError]],
    recorder: Recorder,
) -> Iterator[PairReport]:
    """Yield the reports of the pairs of one trainer."""
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
    """Determine from the first completions whether a file's logprobs are of the stated temperature or raw."""
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
    """Return the report on the pair of a sample and its trainer logprobs.

    Raises:
        EngineNumericsError, NumericsError: logprobs of the engine, or of the trainer, are not finite.
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
