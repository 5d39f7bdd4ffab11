"""`betterhalf doctor`: determine without training which precision is safe for a model and an engine.

1. Sample a few completions in every precision.
2. Take a census: the magnitudes of values, forward and backward, and what each precision does with them.
3. Measure the mismatch of every matched pair on the same completions.
4. Give a verdict for each precision, propose FP32 islands if FP16 lacks range, and write a configuration.

Where the engine does not know the model, the census reads greedy completions, and the mismatch is not measured.

`doctor.json` is rewritten after each census and each later step, so that a failure loses nothing that was measured.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from betterhalf.algorithms.presets import resolve_algorithm
from betterhalf.config.load import resolved_json
from betterhalf.config.schema import RunConfig
from betterhalf.diagnostics.numerics import Census
from betterhalf.diagnostics.pair_report import PairReport, failed_pair
from betterhalf.diagnostics.verdict import (
    PREFERENCE,
    Agreement,
    PairFinding,
    Verdict,
    cramped,
    engine_agreement,
    judge,
    overflowing,
    recommend,
)
from betterhalf.environment import environment
from betterhalf.errors import BetterhalfError, ConfigError, InputError, MissingExtraError
from betterhalf.examine.census import CensusBatch, Reference, census_batch, reference, take_census
from betterhalf.examine.greedy import greedy_completions
from betterhalf.examine.islands import Islands, find_islands
from betterhalf.examine.pairs import Recorder, Sample, sample_dtypes, score_pairs, write_rollouts
from betterhalf.examine.recommendation import config_text
from betterhalf.examine.subject import Subject, open_subject
from betterhalf.metrics.console import PhaseProgress, show_note
from betterhalf.metrics.console import progress as show_progress
from betterhalf.precision.formats import HARDWARE, is_emulated
from betterhalf.report.page import write_report
from betterhalf.rollout.build import check_engine
from betterhalf.run_dir import RunDir, write_json_atomic
from betterhalf.setup.folder import run_folder
from betterhalf.types import DtypeName, Prompt

_PAIRS: tuple[tuple[DtypeName, DtypeName], ...] = (("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"))
"""Matched pairs. FP32 is first: the census uses its completions, and its mismatch shows bugs rather than rounding."""

Samples = Mapping[str, Sample | BetterhalfError]
"""Rollout dtype -> what was sampled, or the error that prevented it."""


def doctor(target: str, config: RunConfig, run_dir: str | None) -> dict[str, Any]:
    """Examine a model, or the newest checkpoint of a run.

    Args:
        target: name or folder of a model, or the folder of a run (then `config` should be the run's own).
        config: task, engine, sizes of a train batch, and `doctor` settings; overrides of individual precision roles are
            ignored, FP32 islands are kept.
        run_dir: folder for `doctor.json`, `summary.json`, the rollouts and `report.html`; None for
            `runs/doctor-<name>-<time>`.

    Returns:
        The content of `doctor.json`. Its `passed` is true if the engine agrees with the trainer and `precision.preset`
        is not unsafe.

    Raises:
        InputError: the model, its prompts or the configuration cannot be used. An engine that does not know the model
            is not an error: the mismatch is then not measured.
        MissingExtraError: a package is not installed.
    """
    started = time.perf_counter()
    check_engine(config)
    _require_hardware_format(target, config)
    resolve_algorithm(config.algorithm)  # refuses a loss that is missing, before the census needs it
    with run_folder(run_dir, "doctor", Path(target).name) as run, _opened(target, config) as subject:
        with show_progress("doctor", _phases(subject), mode=config.logging.console) as bar:
            result = _examine(_Examination(run=run, subject=subject, bar=bar, started=started))
        write_json_atomic(
            run.summary, {key: value for key, value in result.items() if key not in ("census", "mismatch")}
        )
        write_report([run], run.report)
        return result


def _phases(subject: Subject) -> int:
    """Return the number of steps of the progress bar: texts, the FP32 reference, the censuses, and the pairs."""
    sampled = 2 * len(_PAIRS) if subject.unsampled is None else subject.config.doctor.prompts
    return sampled + 1 + len(PREFERENCE)


def _require_hardware_format(target: str, config: RunConfig) -> None:
    """Refuse an emulated format: the doctor recommends one that a processor computes in."""
    name, is_run = config.precision.preset, RunDir(Path(target)).configured
    if is_emulated(name):
        subject = f"{target} is set to {name}, an" if is_run else f"{name} is an"
        pairs = "--localize" if is_run else f"precision.pairs={name}/{name}"
        raise ConfigError(
            f"{subject} emulated format, and doctor examines {', '.join(HARDWARE)}. Examine the model in these with "
            f"precision=bf16, or measure the mismatch in {name} with `betterhalf probe {target} {pairs}`"
        )
    roles = config.precision.roles()
    if unseen := [role for role in (roles.compute_dtype, roles.rollout_dtype) if is_emulated(role)]:
        mode = config.logging.console
        show_note(f"doctor examines {', '.join(HARDWARE)}, not {' and '.join(unseen)} (emulated)", mode=mode)


def doctor_json(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a result that `--json` prints."""
    return {key: result[key] for key in ("verdicts", "recommended", "run_dir")}


@dataclass(slots=True)
class _Examination:
    """Results so far; each phase adds its own."""

    run: RunDir
    subject: Subject
    bar: PhaseProgress
    started: float
    """Start of the examination, in seconds of `time.perf_counter`."""
    not_measured: str | None = None
    """Reason why the mismatch is not measured; None if it is."""
    censuses: dict[DtypeName, Census] = field(default_factory=dict)
    reports: list[PairReport] = field(default_factory=list)
    """Mismatch of the matched pairs."""
    verdicts: dict[DtypeName, Verdict] = field(default_factory=dict)
    agreement: Agreement | None = None
    islands: Islands | None = None
    recommended: DtypeName | None = None

    def finding(self, dtype: DtypeName) -> PairFinding | None:
        """Return the finding on the matched pair of a precision; None before it is measured."""
        for report in self.reports:
            if report.train == dtype:
                return _finding(report, self.subject.config.sampling.max_tokens)
        return None

    def result(self) -> dict[str, Any]:
        """Return the content of `doctor.json` so far."""
        verdicts, recommended = self.verdicts, self.recommended
        asked = verdicts.get(self.subject.config.precision.preset)
        agrees = self.agreement is None or self.agreement.agrees
        return {
            "verb": "doctor",
            "target": self.subject.target,
            "verdicts": {name: verdict.to_json() for name, verdict in verdicts.items()},
            "recommended": recommended,
            "not_trained": self.subject.model.unpackable,
            "config": config_text(self.subject, recommended, verdicts, self.censuses, self.islands),
            "census": {name: census.to_json() for name, census in self.censuses.items()},
            "islands": self.islands.to_json() if self.islands else None,
            "mismatch": [report.to_json() for report in self.reports],
            "mismatch_not_measured": self.not_measured,
            "engine_agrees": self.agreement.to_json() if self.agreement else None,
            "passed": agrees and asked is not None and asked.verdict != "unsafe",
            "seconds": time.perf_counter() - self.started,
            "run_dir": str(self.run.path),
        }

    def write_head(self) -> None:
        """Write the configuration and the environment."""
        if not self.run.config.exists():
            write_json_atomic(self.run.environment, environment())
            write_json_atomic(self.run.config, resolved_json(self.subject.config))

    def write(self) -> None:
        """Write `doctor.json` with the results so far."""
        self.write_head()
        write_json_atomic(self.run.path / "doctor.json", self.result())


class _Record(Recorder):
    """Recorder that writes rollouts and advances the progress bar.

    The folder stays empty until the first rollout: bad input is often found only when the engine starts.
    """

    def __init__(self, examination: _Examination) -> None:
        self._examination = examination

    def sampled(self, sample: Sample) -> None:
        self._examination.write_head()
        write_rollouts(self._examination.run, sample, self._examination.subject.config.sampling.temperature)

    def advance(self, label: str) -> None:
        self._examination.bar.advance()


def _examine(known: _Examination) -> dict[str, Any]:
    prompts = known.subject.prompts(known.subject.config.doctor.prompts)
    samples = _sample(known, prompts)
    batch = _census_batch(known, prompts, samples)
    truth = reference(known.subject, batch)
    known.bar.advance()
    for dtype in PREFERENCE:
        known.censuses[dtype] = take_census(known.subject, dtype, batch, truth)
        known.bar.advance()
        known.write()
    if known.not_measured is None:
        known.reports = score_pairs(_sampling(known.subject), _PAIRS, samples, _Record(known))
        known.write()
        known.agreement = engine_agreement(known.finding("fp32"))
    known.verdicts = {dtype: judge(known.censuses[dtype], known.finding(dtype)) for dtype in PREFERENCE}
    known.recommended = _recommended(known)
    known.write()
    half = known.censuses["fp16"]
    if half.predicted is None and (overflowing(half) or cramped(half)):
        known.islands = _islands(known, batch, truth, prompts)
        known.recommended = _recommended_with_islands(known)
        known.write()
    return known.result()


def _sample(known: _Examination, prompts: Sequence[Prompt]) -> Samples:
    """Return rollouts by dtype, or the error that prevented them; none if the engine refuses the model.

    Raises:
        MissingExtraError: the engine's package is not installed.
    """
    known.not_measured = known.subject.unsampled
    if known.not_measured is not None:
        return {}
    try:
        return sample_dtypes(
            _sampling(known.subject), _PAIRS, prompts, known.subject.config.doctor.group_size, _Record(known)
        )
    except MissingExtraError:
        raise
    except InputError as error:
        # Some engines tell only at their start that they cannot run a model.
        known.not_measured = str(error)
        return {}
    except BetterhalfError as error:
        return {rollout: error.with_traceback(None) for _, rollout in _PAIRS}


def _census_batch(known: _Examination, prompts: Sequence[Prompt], samples: Samples) -> CensusBatch:
    """Pack the completions of the first precision that could sample; without any, greedy ones."""
    subject = known.subject
    first = next((sample for sample in samples.values() if isinstance(sample, Sample)), None)
    if first is not None:
        return census_batch(subject, prompts, [group for _, group in first.groups])
    advance = known.bar.advance if subject.unsampled is not None else lambda: None
    return census_batch(subject, prompts, [(one,) for one in greedy_completions(_sampling(subject), prompts, advance)])


def _islands(known: _Examination, batch: CensusBatch, truth: Reference, prompts: Sequence[Prompt]) -> Islands:
    def judged(subject: Subject, census: Census) -> Verdict:
        """Judge by the same rules as without islands; measure the pair only if the census alone is not unsafe."""
        alone = judge(census, None)
        if alone.verdict == "unsafe":
            return alone
        if known.not_measured is not None:
            return alone
        report = _pair_of(_sampling(subject), census.dtype, prompts)
        return judge(census, _finding(report, subject.config.sampling.max_tokens))

    return find_islands(known.subject, batch, truth, known.censuses["fp16"], judged)


def _pair_of(subject: Subject, dtype: DtypeName, prompts: Sequence[Prompt]) -> PairReport:
    """Sample and measure one matched pair again; the report holds the error if, say, the engine refuses islands."""
    pairs = ((dtype, dtype),)
    try:
        samples = sample_dtypes(subject, pairs, prompts, subject.config.doctor.group_size, Recorder())
        return score_pairs(subject, pairs, samples, Recorder())[0]
    except BetterhalfError as error:
        return failed_pair(dtype, dtype, str(error))


def _recommended(known: _Examination) -> DtypeName | None:
    """Return the recommendation among the formats that the trainer computes the model in; None if there is none."""
    if known.subject.model.unpackable:
        return None
    return recommend({dtype: known.verdicts[dtype] for dtype in PREFERENCE if not known.censuses[dtype].predicted})


def _recommended_with_islands(known: _Examination) -> DtypeName | None:
    """Return FP16 if its verdict with islands is ok; else the recommendation without islands."""
    islands = known.islands
    return "fp16" if islands and islands.cures and islands.verdict.verdict == "ok" else known.recommended


def _finding(report: PairReport, response_length: int) -> PairFinding:
    return PairFinding(
        values={name: estimate.value for name, estimate in report.metrics.items()},
        budget=report.budget,
        response_length=response_length,
        failure=report.error,
    )


def _plain(config: RunConfig) -> RunConfig:
    """Drop overrides of individual roles: a precision must be the same in every role."""
    roles = ("compute_dtype", "rollout_dtype", "wire_dtype", "kv_dtype")
    precision = config.precision.model_copy(update=dict.fromkeys(roles))
    return config.model_copy(update={"precision": precision})


def _shortened(config: RunConfig) -> RunConfig:
    """Apply the doctor's length limit if it is shorter than training's."""
    limit = min(config.doctor.max_tokens, config.sampling.max_tokens)
    return config.model_copy(update={"sampling": config.sampling.model_copy(update={"max_tokens": limit})})


def _sampling(subject: Subject) -> Subject:
    """Return the subject with the length limit for sampling."""
    return dataclasses.replace(subject, config=_shortened(subject.config))


@contextmanager
def _opened(target: str, config: RunConfig) -> Iterator[Subject]:
    """Open the subject with training's length limit, but require context only for the doctor's shorter completions."""
    with open_subject(target, _shortened(_plain(config)), prompts=config.doctor.prompts, any_decoder=True) as opened:
        restored = opened.config.model_copy(update={"sampling": config.sampling})
        yield dataclasses.replace(opened, config=restored)
