"""Grade completions with the user's own reward functions, in worker processes with a time limit."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from betterhalf.config.schema import PythonTask, RewardTerm
from betterhalf.errors import ConfigError, RewardError
from betterhalf.tasks.reward_replies import Scored, read_reply
from betterhalf.tasks.reward_sum import Summand, SumRule, add_up
from betterhalf.tasks.worker_channel import COUNTERS
from betterhalf.tasks.worker_limits import memory_bytes
from betterhalf.tasks.worker_pool import WorkerPool, WorkerStartError
from betterhalf.types import FinishReason, Prompt, RewardFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class _Siblings:
    """Completions of one prompt."""

    prompt: Prompt
    texts: list[str]
    finish_reasons: list[FinishReason]

    def request(self, reward: str) -> dict[str, Any]:
        """Return the message that asks a worker for one reward."""
        return {
            "reward": reward,
            "prompt": self.prompt.text,
            "completions": self.texts,
            "metadata": [self._metadata(reason) for reason in self.finish_reasons],
        }

    def _metadata(self, finish_reason: FinishReason) -> Mapping[str, Any]:
        """Return the fields of the row; ours are added where the row has no field of that name."""
        ours = {"prompt_id": self.prompt.prompt_id, "answer": self.prompt.answer, "finish_reason": finish_reason}
        return {**ours, **self.prompt.metadata}


class PythonGrader:
    """Grader that calls the user's functions and adds up their rewards.

    A reward that fails (it takes too long, ends its worker, raises, or returns no finite number) is counted by kind,
    and scored with `task.error_reward` or refused, as `task.on_error` says. The first failure of each kind is shown.
    The workers start when the rows are checked, and run until `close`.
    """

    def __init__(self, config: PythonTask) -> None:
        """Create the grader, without starting its workers."""
        self._config = config
        self._terms = config.terms
        self._rule = SumRule(normalise=config.normalise, scale=config.scale, clip=config.clip)
        self._pool = WorkerPool(
            "reward_worker",
            {"functions": _functions(config)},
            workers=config.workers,
            seconds=config.time_limit,
            memory_bytes=memory_bytes(config.memory_gib),
        )
        self._tried = False
        self._timeouts = 0
        self._values: dict[str, list[float]] = {}
        self._failures: Counter[RewardFailure] = Counter()
        self._printed_bytes = 0
        self._notes: list[str] = []
        self._shown: set[tuple[str, str]] = set()

    @property
    def timeouts(self) -> int:
        """Number of rewards so far that ran out of time."""
        return self._timeouts

    @property
    def unparsed_answers(self) -> int:
        """Always 0: the functions parse answers themselves."""
        return 0

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """Return one reward for each completion; neighbours with the same `Prompt` object are siblings.

        Raises:
            RewardError: a reward failed and `task.on_error` is `stop`, or a worker cannot start.
        """
        groups = _grouped(prompts, texts, finish_reasons)
        requests = [group.request(name) for group in groups for name in self._terms]
        try:
            replies = iter(self._pool.run(requests))
        except WorkerStartError as error:
            raise RewardError(f"a reward worker cannot start: {_fault(error)}") from error
        self._keep_printed()
        return [reward for group in groups for reward in self._add_up(group, replies)]

    def check_golds(self, answers: Sequence[str], *, will_grade: bool = True) -> list[str | None]:
        """Return None for every answer, since only the user's functions know; with `will_grade`, import them first.

        Raises:
            ConfigError: a function does not exist, cannot be imported, or takes other arguments.
        """
        if will_grade and not self._tried:
            try:
                self._pool.start()
            except WorkerStartError as error:
                raise ConfigError(_fault(error)) from error
            self._tried = True
        return [None] * len(answers)

    def take_metrics(self) -> dict[str, float]:
        """Return the rewards and counters since the last call, under `task/`."""
        counts = {metric: float(self._failures[kind]) for kind, metric in COUNTERS.items()}
        found = {
            "task/errors": float(self._failures.total()),
            **counts,
            "task/printed_bytes": float(self._printed_bytes),
        }
        for name, values in self._values.items():
            found[f"task/{name}/mean"] = statistics.fmean(values)
            found[f"task/{name}/std"] = statistics.pstdev(values)
        self._values, self._failures, self._printed_bytes = {}, Counter(), 0
        return found

    def take_notes(self) -> list[str]:
        """Return warnings since the last call; each kind of failure gives one, as does the first output."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """End the workers and everything that the user's code has started."""
        self._pool.close()

    def _add_up(self, group: _Siblings, replies: Any) -> list[float]:
        summands = []
        for name, term in self._terms.items():
            scored = read_reply(next(replies), len(group.texts), self._config.error_reward)
            self._count(name, scored, group)
            summands += [Summand(weight=term.weight, values_G=column) for column in scored.summands]
        return add_up(summands, self._rule)

    def _count(self, name: str, scored: Scored, group: _Siblings) -> None:
        for kind, message in scored.messages.items():
            failed = f"the reward {name} failed for {scored.failures[kind]} of {len(group.texts)} completions of "
            failed += f"prompt {group.prompt.prompt_id}: {message}."
            if self._config.on_error == "stop":
                raise RewardError(
                    f"{failed} Fix it, or set task.on_error=score to give such completions task.error_reward and count "
                    "them."
                )
            self._note(
                (name, kind),
                f"warning: {failed} They get {self._config.error_reward:g} (task.error_reward); {COUNTERS[kind]} "
                "counts further ones without another warning.",
            )
        self._failures += scored.failures
        self._timeouts += scored.failures["timeout"]
        self._values.setdefault(name, []).extend(scored.values_G)
        for component, values in scored.components.items():
            self._values.setdefault(f"{name}/{component}", []).extend(values)

    def _keep_printed(self) -> None:
        text, size = self._pool.take_printed()
        self._printed_bytes += size
        if text.strip():
            self._note(
                ("", "printed"),
                f"a reward printed {size} bytes, which are counted in task/printed_bytes and shown this once, up to "
                f"{len(text)} characters:\n{text.rstrip()}",
            )

    def _note(self, key: tuple[str, str], text: str) -> None:
        """Keep a note to show, once for each key."""
        if key not in self._shown:
            self._shown.add(key)
            self._notes.append(text)


def _fault(error: WorkerStartError) -> str:
    """Return why a worker cannot start, and the fix."""
    if error.kind == "config":
        return error.message
    if error.kind == "exception":
        return f"importing the reward raises {error.message}"
    return (
        f"importing the module of the reward fails: {error.message}. A module must only define functions when it is "
        "imported."
    )


def _functions(config: PythonTask) -> dict[str, Any]:
    """Return the functions that each worker imports."""
    single = config.reward is not None
    return {name: _described(name, term, single=single) for name, term in config.terms.items()}


def _described(name: str, term: RewardTerm, *, single: bool) -> dict[str, Any]:
    key = "task.reward" if single else f"task.rewards.{name}.function"
    return {"key": key, "path": term.function, "batched": term.batched}


def _grouped(
    prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
) -> list[_Siblings]:
    """Group neighbours of one `Prompt` object: a step may draw the same row twice, as two groups."""
    rows = zip(prompts, texts, finish_reasons, strict=True)
    groups = [list(group) for _, group in groupby(rows, key=lambda row: id(row[0]))]
    return [
        _Siblings(prompt=group[0][0], texts=[row[1] for row in group], finish_reasons=[row[2] for row in group])
        for group in groups
    ]
