"""Files that a probe writes to its folder; they are complete after every rollout dtype and every pair."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from betterhalf.config.load import resolved_json
from betterhalf.config.schema import RunConfig
from betterhalf.diagnostics.pair_report import PairReport
from betterhalf.environment import environment
from betterhalf.errors import BetterhalfError, InputError, RunError
from betterhalf.examine.pairs import Recorder, Sample, Scores, write_rollouts
from betterhalf.examine.token_table import TokenTable
from betterhalf.report.page import write_report
from betterhalf.run_dir import RunDir, write_json_atomic, write_text_atomic


class ProbeRecord(Recorder):
    """Recorder that keeps `probe.json`, `tokens.parquet` and the rollout files up to date.

    The folder stays empty until the first result: bad input is often found only when the engine starts.
    """

    def __init__(
        self,
        run: RunDir,
        config: RunConfig,
        *,
        target: str,
        engine: str,
        completions: int,
        pairs: Sequence[tuple[str, str]],
        advance: Callable[[], None] = lambda: None,
        keep_rollouts: bool = True,
    ) -> None:
        """Write nothing yet.

        Args:
            run: folder of the probe.
            config: its configuration.
            target: model, run or file, as the user wrote it.
            engine: name of the engine, or `dump` for rollouts from a file.
            completions: number of completions in each rollout dtype, or in the file.
            pairs: (trainer dtype, rollout dtype) in the order of `probe.json`.
            advance: called after each rollout dtype, pair and further part.
            keep_rollouts: False for rollouts that are in a file already.
        """
        self.run, self._config = run, config
        self._order, self._advance = list(pairs), advance
        self._keep_rollouts = keep_rollouts
        self._started = time.perf_counter()
        self._tokens = TokenTable(run.path / "tokens.parquet")
        self._errors: dict[str, BetterhalfError] = {}
        self.result: dict[str, Any] = {
            "verb": "probe",
            "target": target,
            "engine": engine,
            "completions": completions,
            "max_tokens": config.sampling.max_tokens,
            "confidence": config.probe.confidence,
            "pairs": [],
            "bf16_over_fp16": None,
            "seconds": {"load": 0.0, "generate": {}, "score": {}},
            "gradient": None,
            "localize": None,
            "run_dir": str(run.path),
        }

    # -- called by the measurement

    def sampled(self, sample: Sample) -> None:
        """Write the rollouts of one dtype."""
        if self._keep_rollouts:
            write_rollouts(self.run, sample, self._config.sampling.temperature)
        self.save()

    def measured(self, report: PairReport, sample: Sample, trainer_logprobs: Scores) -> None:
        """Record a pair and its tokens."""
        self._tokens.add(report.train, sample, trainer_logprobs)
        self._add(report)

    def failed(self, report: PairReport, error: BetterhalfError) -> None:
        """Record the reason why a pair has no numbers."""
        self._errors[f"{report.train}/{report.rollout}"] = error
        self._add(report)

    def spent(self, phase: Literal["generate", "score"], dtype: str, seconds: float) -> None:
        """Record the time of one dtype's rollouts, or of one trainer."""
        self.result["seconds"][phase][dtype] = seconds

    def advance(self, label: str) -> None:
        """Advance the progress bar."""
        self._advance()

    # -- called by the verb

    def add_part(self, name: Literal["gradient", "localize"], measure: Callable[[], dict[str, Any]]) -> None:
        """Record the result of `measure`; if it fails, record the error and keep all other results."""
        started = time.perf_counter()
        try:
            self.result[name] = measure()
        except BetterhalfError as error:
            self._errors[name] = error
        self.result["seconds"][name] = time.perf_counter() - started
        self._advance()
        self.save()

    def finish(self) -> dict[str, Any]:
        """Write summary and report, and return `probe.json`.

        Raises:
            InputError: something failed, and every failure is one of bad input.
            RunError: something failed for another reason.
        """
        self.save()
        write_json_atomic(self.run.summary, self._summary())
        write_report([self.run.path], self.run.report)
        if self._errors:
            raise self._failure()
        return self.result

    def save(self) -> None:
        """Write the results so far; the configuration is written last, so if it exists, so do the other files."""
        write_json_atomic(self.run.probe, self.result)
        if not self.run.config.exists():
            write_json_atomic(self.run.environment, environment())
            write_json_atomic(self.run.config, resolved_json(self._config))

    def _add(self, report: PairReport) -> None:
        pairs = [*self.result["pairs"], report.to_json()]
        self.result["pairs"] = sorted(pairs, key=lambda pair: self._order.index((pair["train"], pair["rollout"])))
        self.result["bf16_over_fp16"] = ratio_of(self.result["pairs"])
        self.save()

    def _summary(self) -> dict[str, Any]:
        pairs = {f"{pair['train']}/{pair['rollout']}": pair for pair in self.result["pairs"]}
        return {
            "verb": "probe",
            "target": self.result["target"],
            "engine": self.result["engine"],
            "completions": self.result["completions"],
            "k3": {name: pair.get("k3") for name, pair in pairs.items()},
            "failed": {name: str(error) for name, error in self._errors.items()},
            "bf16_over_fp16": self.result["bf16_over_fp16"],
            "seconds": time.perf_counter() - self._started,
            "run_dir": str(self.run.path),
        }

    def _failure(self) -> BetterhalfError:
        """Return one error for all failures; it names each reason once, with the pairs and parts that it affects."""
        by_reason: dict[str, list[str]] = {}
        for name, error in self._errors.items():
            by_reason.setdefault(str(error), []).append(name)
        reasons = "; ".join(f"{', '.join(names)}: {reason.rstrip('.')}" for reason, names in by_reason.items())
        kind = InputError if all(isinstance(error, InputError) for error in self._errors.values()) else RunError
        return kind(f"could not be measured: {reasons}. Everything else is in {self.run.path}.")


def ratio_of(pairs: Sequence[dict[str, Any]]) -> float | None:
    """Return k3 of the BF16 pair over k3 of the FP16 pair; None without both, or if FP16 has no mismatch at all."""
    k3 = {pair["train"]: pair.get("k3") for pair in pairs if pair["train"] == pair["rollout"]}
    fp16, bf16 = k3.get("fp16"), k3.get("bf16")
    return bf16 / fp16 if fp16 and bf16 is not None else None


def keep_rejected(path: Path, rejected: Sequence[Any]) -> None:
    """Write `rejected.jsonl`: line number and reason of each line that was not used."""
    import json

    rows = [json.dumps({"line": rejection.line, "reason": rejection.reason}) + "\n" for rejection in rejected]
    write_text_atomic(path, "".join(rows))
