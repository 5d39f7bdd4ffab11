"""`betterhalf probe`: measure the mismatch between rollout engine and trainer for pairs of precisions, offline."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from betterhalf.config.schema import RunConfig
from betterhalf.errors import InputError
from betterhalf.examine.dump import UNKNOWN, Dump, DumpLine, fits_model, lacks_trainer_logprobs, read_dump
from betterhalf.examine.pairs import Sample, compare, measure_pairs, sample_dtypes, score_pairs
from betterhalf.examine.probe_record import ProbeRecord, keep_rejected
from betterhalf.examine.subject import Subject, open_subject
from betterhalf.metrics.console import progress
from betterhalf.precision.formats import is_emulated
from betterhalf.rollout.build import check_engine
from betterhalf.run_dir import RunDir
from betterhalf.setup.folder import run_folder
from betterhalf.setup.model_checks import check_emulation
from betterhalf.types import DtypeName, HardwareDtype, PairSelection, Prompt

__all__ = ["measure_pairs", "probe", "probe_json", "wanted_pairs"]

DTYPES: tuple[DtypeName, ...] = get_args(HardwareDtype)
"""Formats of `full` and `matched`, in the order of rows and columns."""

Key = TypeVar("Key")

_SHOWN_REJECTIONS = 10

_PAIR_KEYS = (
    *("train", "rollout", "k3", "k3_ci", "mean_abs", "max_abs", "sequence_kl", "slope_per_1k", "tokens"),
    "temperature",
)


def probe(
    target: str | None,
    config: RunConfig,
    run_dir: str | None,
    *,
    from_dump: str | None = None,
    gradient: bool = False,
    localize: bool = False,
) -> dict[str, Any]:
    """Measure the mismatch of a model, or of rollouts that another framework sampled.

    Args:
        target: model or run folder; may be None for a dump that includes trainer logprobs.
        config: model, task, sampling, engine and `probe` settings; `precision.pairs` selects the pairs.
        run_dir: folder for all results; None for `runs/probe-<name>-<time>`.
        from_dump: file in a format that `examine.dump` reads, which is analysed instead of new rollouts.
        gradient: also measure the effect of the mismatch on the policy gradient.
        localize: also find the first operation where trainer and engine diverge.

    Returns:
        The content of `probe.json`.

    Raises:
        InputError: model, dump or settings cannot be used; results so far are on disk.
        RunError: a pair could not be measured; all others are on disk.
    """
    if from_dump is None and target is None:
        raise InputError("probe has no model to examine. Name a model or a run, or give --from-dump FILE.")
    if from_dump is None:
        return _probe_model(cast(str, target), config, run_dir, gradient=gradient, localize=localize)
    if gradient or localize:
        raise InputError(
            "--gradient and --localize need rollouts that the probe samples itself; leave them out with --from-dump."
        )
    return _probe_dump(target, config, run_dir, Path(from_dump))


def probe_json(result: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a result that `--json` prints: a few numbers of each pair, the ratio, and the run folder."""
    keys = (*_PAIR_KEYS, "seconds")
    pairs = [{key: pair.get(key) for key in keys} for pair in result["pairs"]]
    return {"pairs": pairs, "bf16_over_fp16": result["bf16_over_fp16"], "run_dir": result["run_dir"]}


def wanted_pairs(config: RunConfig) -> list[tuple[DtypeName, DtypeName]]:
    """Return (trainer dtype, rollout dtype) of each pair that `precision.pairs` selects.

    `full` and `matched` include the configured pair if one of its formats is emulated.
    """
    pairs = config.precision.pairs
    if pairs not in get_args(PairSelection):
        named = [tuple(pair.split("/")) for pair in dict.fromkeys(pairs)]
        return cast(list[tuple[DtypeName, DtypeName]], named)
    found = [(train, rollout) for train in DTYPES for rollout in DTYPES if pairs == "full" or train == rollout]
    own = _own_pair(config)
    return [*found, own] if any(map(is_emulated, own)) else found


def _own_pair(config: RunConfig) -> tuple[DtypeName, DtypeName]:
    """Return the (trainer dtype, rollout dtype) that the settings configure for a run."""
    roles = config.precision.roles()
    return roles.compute_dtype, roles.rollout_dtype


# -- a model's own rollouts


def _probe_model(
    target: str, config: RunConfig, run_dir: str | None, *, gradient: bool, localize: bool
) -> dict[str, Any]:
    started = time.perf_counter()
    pairs = wanted_pairs(config)
    check_engine(config)
    check_emulation(config, [name for pair in pairs for name in pair])
    with (
        run_folder(run_dir, "probe", Path(target).name) as run,
        _open_short(target, config, grades=gradient) as subject,
    ):
        load_seconds = time.perf_counter() - started
        if localize:
            # Imported here, as below: it loads the native engine.
            from betterhalf.examine.localize import require_traced

            require_traced(subject.model.hf_config)
        prompts = subject.prompts(config.probe.prompts)
        subject = _with_room(subject, prompts, config.sampling.max_tokens)
        total = len({rollout for _, rollout in pairs}) + len(pairs) + gradient + localize
        with progress("probe", total, mode=config.logging.console) as bar:
            record = ProbeRecord(
                run,
                subject.config,
                target=target,
                engine=config.engine.type,
                completions=len(prompts) * config.probe.group_size,
                pairs=pairs,
                advance=bar.advance,
            )
            record.result["seconds"]["load"] = load_seconds
            samples = sample_dtypes(subject, pairs, prompts, config.probe.group_size, record)
            score_pairs(subject, pairs, samples, record)
            good = {rollout: sample for rollout, sample in samples.items() if isinstance(sample, Sample)}
            if gradient:
                record.add_part("gradient", lambda: _gradient(subject, good))
            if localize:
                record.add_part("localize", lambda: _localize(subject, good))
        return record.finish()


def _open_short(
    target: str, config: RunConfig, *, samples: bool = True, grades: bool = False
) -> AbstractContextManager[Subject]:
    """Open the subject without checking that completions of maximum length fit the context; `_with_room` does so."""
    short, prompts = _sampling(config, max_tokens=1), config.probe.prompts
    return open_subject(target, short, prompts=prompts, samples=samples, grades=grades)


def _with_room(subject: Subject, prompts: Sequence[Prompt], max_tokens: int) -> Subject:
    """Return the subject with the configured length limit, lowered to what fits the model's context."""
    room = subject.model.context_length - max(len(prompt.token_ids) for prompt in prompts)
    if room < max_tokens:
        print(f"completions are limited to {room} tokens: more do not fit the model's context", file=sys.stderr)
    return replace(subject, config=_sampling(subject.config, max_tokens=min(max_tokens, room)))


def _sampling(config: RunConfig, **changes: float) -> RunConfig:
    return config.model_copy(update={"sampling": config.sampling.model_copy(update=changes)})


def _gradient(subject: Subject, samples: dict[str, Sample]) -> dict[str, Any]:
    from betterhalf.examine.gradient import measure_gradients

    return measure_gradients(subject, {cast(DtypeName, name): sample.groups for name, sample in samples.items()})


def _localize(subject: Subject, samples: dict[str, Sample]) -> dict[str, Any]:
    """Replay the longest completion of the configured precision; if that was not sampled, of the first that was.

    If a side of the configured pair is emulated, its format is localized, on completions in the engine's format.
    """
    from betterhalf.examine.localize import localize

    preset, (train, rollout) = subject.config.precision.preset, _own_pair(subject.config)
    dtype = sampled = preset if preset in samples else cast(DtypeName, next(iter(samples)))
    if rollout in samples and (emulated := next(filter(is_emulated, (train, rollout)), None)):
        dtype, sampled = emulated, rollout
    prompt, completion = max(samples[sampled].items, key=lambda item: len(item[1].token_ids))
    return localize(subject, [*prompt, *completion.token_ids], len(prompt), dtype=dtype)


# -- a dump


def _probe_dump(target: str | None, config: RunConfig, run_dir: str | None, path: Path) -> dict[str, Any]:
    """Analyse a file; lines with trainer logprobs form a separate pair, beside those that MODEL scores."""
    dump = read_dump(path)
    if target is None:
        dump = dump.keep(lacks_trainer_logprobs)
        with run_folder(run_dir, "probe", path.stem) as run:
            return _record_dump(run, None, config, str(path), dump)
    config = _at_temperature(config, dump)
    with run_folder(run_dir, "probe", Path(target).name) as run, _open_short(target, config, samples=False) as subject:
        vocabulary = subject.model.module.get_input_embeddings().weight.shape[0]
        dump = dump.keep(fits_model(vocabulary, subject.model.context_length, config.sampling.temperature))
        return _record_dump(run, subject, config, target, dump)


def _at_temperature(config: RunConfig, dump: Dump) -> RunConfig:
    """Set the sampling temperature to the first that the file states; lines with another are rejected later."""
    stated = next((line.temperature for line in dump.lines if line.temperature is not None), None)
    if stated is None:
        return config
    return _sampling(config, temperature=stated)


def _record_dump(run: RunDir, subject: Subject | None, config: RunConfig, target: str, dump: Dump) -> dict[str, Any]:
    _show_rejected(dump)
    given = _given_pairs(dump.lines, named=subject is None)
    samples = {rollout: _sample(rollout, lines) for rollout, lines in _by(dump.lines, lambda line: line.rollout)}
    scored = [(train, rollout) for rollout in samples for train in _scoring_dtypes(config, rollout)] if subject else []
    with progress("probe", len(given) + len(scored), mode=config.logging.console) as bar:
        record = ProbeRecord(
            run,
            config,
            target=target,
            engine=UNKNOWN,
            completions=len(dump.lines),
            pairs=[*given, *scored],
            advance=bar.advance,
            keep_rollouts=False,
        )
        record.result["max_tokens"] = max(sum(line.scored) for line in dump.lines)
        record.save()
        if dump.rejected:
            keep_rejected(run.path / "rejected.jsonl", dump.rejected)
        for (train, rollout), lines in given.items():
            _measure_given(record, train, _sample(rollout, lines), lines, config)
        if subject is not None:
            score_pairs(subject, scored, samples, record)
    return record.finish()


def _given_pairs(lines: Sequence[DumpLine], *, named: bool) -> dict[tuple[str, str], list[DumpLine]]:
    """Group lines with trainer logprobs by (trainer dtype, rollout dtype).

    Without `named` the trainer dtype is `UNKNOWN`, so that the pair differs from those that MODEL scores.
    """
    with_trainer = [line for line in lines if line.trainer_logprobs is not None]
    return dict(_by(with_trainer, lambda line: (line.train if named else UNKNOWN, line.rollout)))


def _by(lines: Sequence[DumpLine], key: Callable[[DumpLine], Key]) -> list[tuple[Key, list[DumpLine]]]:
    """Group lines by a key, in the order of its first appearance."""
    groups: dict[Key, list[DumpLine]] = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return list(groups.items())


def _sample(rollout: str, lines: Sequence[DumpLine]) -> Sample:
    return Sample(
        rollout=rollout,
        items=tuple((line.prompt_token_ids, line.completion) for line in lines),
        prompt_ids=tuple(line.prompt_id for line in lines),
        scored=tuple(line.scored for line in lines),
    )


def _measure_given(
    record: ProbeRecord, train: str, sample: Sample, lines: Sequence[DumpLine], config: RunConfig
) -> None:
    scores = [line.trainer_logprobs or () for line in lines]
    record.measured(compare(train, sample, scores, config, seconds=0.0), sample, scores)
    record.advance(f"{train}/{sample.rollout}")


def _scoring_dtypes(config: RunConfig, rollout: str) -> tuple[DtypeName, ...]:
    """Return the trainer dtypes in which MODEL scores a dump.

    For `matched` that is the dtype of the rollouts, or the preset if the file does not give it.
    """
    pairs = config.precision.pairs
    if pairs == "full":
        return DTYPES
    if pairs == "matched":
        return (config.precision.preset if rollout == UNKNOWN else cast(DtypeName, rollout),)
    return tuple(dict.fromkeys(train for train, _ in wanted_pairs(config)))


def _show_rejected(dump: Dump) -> None:
    for rejection in dump.rejected[:_SHOWN_REJECTIONS]:
        print(f"line {rejection.line} is not used: {rejection.reason}", file=sys.stderr)
    if (more := len(dump.rejected) - _SHOWN_REJECTIONS) > 0:
        print(f"and {more} more; rejected.jsonl in the run folder has them all", file=sys.stderr)
