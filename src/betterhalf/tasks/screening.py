"""Check every row before a run, for anything that the model, its tokenizer or the grader cannot handle.

A row that fails later costs all the work done before it, and would fail again in a resumed run.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from betterhalf.errors import InputError
from betterhalf.tasks.dataset import DatasetTask, Subset
from betterhalf.tasks.prompting import Draft, encode_texts
from betterhalf.tasks.row import BadRow, Row, RowError
from betterhalf.tasks.task import Tokenizer
from betterhalf.types import BadRowAction

_ROWS_AT_ONCE = 1024
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLimits:
    """Limits on the size and the tokens of a prompt."""

    context_length: int
    """Context length of the model in tokens: prompt and completion together."""
    max_tokens: int
    """Maximum length of a completion, in tokens."""
    max_tokens_key: str = "sampling.max_tokens"
    """Configuration key that sets it, for messages."""
    vocab_size: int
    """Number of token ids that the model has an embedding for."""
    max_prompt_tokens: int | None = None
    """Longest prompt to use, from `task.max_prompt_tokens`; None for no limit."""
    filters: bool = False
    """True if the configuration may leave rows out that are usable: by this limit, or by a filter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRowRule:
    """Rule for rows that cannot be used."""

    action: BadRowAction
    """Raise an error, or leave the rows out."""
    key: str
    """Configuration key that sets the action, for messages."""


@dataclass(slots=True, kw_only=True)
class _Found:
    """Rows checked so far."""

    indices: list[int]
    """Indices of the usable rows, in order."""
    encoded: list[array[int]]
    """Their token ids at 4 bytes each; a tuple would take 8 or more."""
    bad: list[BadRow]
    """Unusable rows, in order."""


def screen(
    task: DatasetTask,
    limits: PromptLimits,
    rule: BadRowRule,
    *,
    count: int | None = None,
    will_grade: bool = True,
    advance: Callable[[int], None] = lambda rows: None,
) -> DatasetTask:
    """Check every row that a run may use: its text, its rendering in the template, its length and its gold answer.

    Args:
        task: all rows.
        limits: limits that every prompt must satisfy.
        rule: refuse unusable rows, or leave them out.
        count: number of rows to use, from the first on; all if None.
        will_grade: True if completions will be graded later; the grader then tests itself first.
        advance: called with the number of rows checked since the last call.

    Returns:
        The task with the rows that are usable and that no filter leaves out, in order and with their own prompt ids;
        the prompts are tokenized.

    Raises:
        InputError: a row is unusable and the rule refuses it, or no row is left.
        RewardError: the grader does not work.
    """
    wanted = len(task) if count is None else min(count, len(task))
    found = _Found(indices=[], encoded=[], bad=[])
    most = wanted if rule.action == "refuse" and not limits.filters else len(task)
    blocks = _blocks(most, min(wanted, _ROWS_AT_ONCE))
    for index, token_ids, bad in _checked(task, limits, blocks, will_grade=will_grade, advance=advance):
        if bad is not None:
            found.bad.append(bad)
            continue
        found.indices.append(index)
        found.encoded.append(token_ids)
        if len(found.indices) == wanted:
            break
    unusable = [bad for bad in found.bad if not bad.filtered]
    if unusable and (rule.action == "refuse" or not found.indices):
        raise InputError(_refusal(unusable, len(found.bad) + len(found.indices), rule, limits.max_tokens_key))
    if found.bad and not found.indices:
        raise InputError("\n".join([f"the filters leave out all {len(found.bad)} rows:", *listing(found.bad)]))
    problems = Subset(base=task.problems, indices=found.indices)
    return replace(task, problems=problems, encoded=found.encoded, left_out=tuple(found.bad))


def _blocks(rows: int, at_once: int) -> list[range]:
    return [range(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]


def _checked(
    task: DatasetTask,
    limits: PromptLimits,
    blocks: Sequence[range],
    *,
    will_grade: bool,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, array[int], BadRow | None]]:
    """Yield the index, token ids and defect of each row."""
    for block in blocks:
        checked = [task.problems.row(index) for index in block]
        drafts = [_drafted(task, index, row) for index, row in zip(block, checked, strict=True)]
        encoded = _encoded(task.problems.tokenizer, checked, drafts)
        results = [_fitted(row, ids, limits) for row, ids in zip(checked, encoded, strict=True)]
        graded = _graded(task, checked, results, will_grade=will_grade)
        # Before the rows are yielded: a caller that has enough rows does not resume this generator.
        advance(len(block))
        yield from zip(block, *zip(*graded, strict=True), strict=True)


def _drafted(task: DatasetTask, index: int, row: Row) -> Draft | BadRow:
    """Return the text for the model, or why there is none."""
    if row.defect is not None:
        return row.defect
    for name, text in (("question", row.question), ("answer", row.answer)):
        if (place := _surrogate(text)) is not None:
            return BadRow(
                place=row.place,
                reason=f"character {place + 1} of its {name} is half of a surrogate pair, which has no encoding",
                fix="replace that character",
            )
    try:
        return task.problems.draft(index)
    except RowError as error:
        return BadRow(place=row.place, reason=error.reason, fix=error.fix)


def _surrogate(text: str) -> int | None:
    """Return the index of the first lone surrogate, or None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None


def _encoded(
    tokenizer: Tokenizer, rows: Sequence[Row], drafts: Sequence[Draft | BadRow]
) -> list[Sequence[int] | BadRow]:
    """Tokenize all drafts in one call, or one by one if one of them makes the tokenizer fail."""
    ready = [draft for draft in drafts if isinstance(draft, Draft)]
    try:
        found: Iterator[Sequence[int] | BadRow] = iter(encode_texts(tokenizer, ready) if ready else [])
        return [next(found) if isinstance(draft, Draft) else draft for draft in drafts]
    except Exception:  # each kind of tokenizer raises other errors
        return [_encoded_alone(tokenizer, row, draft) for row, draft in zip(rows, drafts, strict=True)]


def _encoded_alone(tokenizer: Tokenizer, row: Row, draft: Draft | BadRow) -> Sequence[int] | BadRow:
    if isinstance(draft, BadRow):
        return draft
    try:
        return encode_texts(tokenizer, [draft])[0]
    except Exception as error:
        reason = f"the model's tokenizer fails with {type(error).__name__}: {error}"
        return BadRow(place=row.place, reason=reason, fix="correct its text")


def _fitted(row: Row, token_ids: Sequence[int] | BadRow, limits: PromptLimits) -> Sequence[int] | BadRow:
    """Check that the token ids are in the vocabulary and leave room for a completion."""
    if isinstance(token_ids, BadRow):
        return token_ids
    size, room = len(token_ids), limits.context_length - len(token_ids)
    if not size:
        return BadRow(place=row.place, reason="its prompt has no tokens", fix="give it a text")
    if not 0 <= min(token_ids) <= max(token_ids) < limits.vocab_size:
        reason = f"token {max(token_ids)} of its prompt is outside the model's vocabulary of {limits.vocab_size}"
        return BadRow(place=row.place, reason=reason, fix="use the model's own tokenizer")
    if limits.max_prompt_tokens is not None and size > limits.max_prompt_tokens:
        reason = f"its prompt of {size} tokens is longer than task.max_prompt_tokens={limits.max_prompt_tokens}"
        return BadRow(place=row.place, reason=reason, fix="raise it", filtered=True)
    if room <= 0:
        reason = f"its prompt of {size} tokens leaves no room in the model's context of {limits.context_length}"
        return BadRow(place=row.place, reason=reason, fix="shorten or drop it", too_long=True)
    if room < limits.max_tokens:
        reason = (
            f"its prompt of {size} tokens and {limits.max_tokens_key}={limits.max_tokens} exceed the model's context "
            f"of {limits.context_length}"
        )
        return BadRow(place=row.place, reason=reason, fix="shorten or drop it", room=room, too_long=True)
    return token_ids


def _graded(
    task: DatasetTask, rows: Sequence[Row], results: Sequence[Sequence[int] | BadRow], *, will_grade: bool
) -> list[tuple[array[int], BadRow | None]]:
    """Return the token ids and defect of each row, after the grader has checked the gold answers of the good ones."""
    good = [row for row, result in zip(rows, results, strict=True) if not isinstance(result, BadRow)]
    reasons = iter(task.grader.check_golds([row.answer for row in good], will_grade=will_grade) if good else [])
    return [_with_gold(row, result, reasons) for row, result in zip(rows, results, strict=True)]


def _with_gold(
    row: Row, result: Sequence[int] | BadRow, reasons: Iterator[str | None]
) -> tuple[array[int], BadRow | None]:
    if isinstance(result, BadRow):
        return array("i"), result
    reason = next(reasons)
    bad = (
        None
        if reason is None
        else BadRow(
            place=row.place,
            reason=f"no completion can match its answer {row.answer!r}: {reason}",
            fix="correct the answer",
        )
    )
    return array("i", result), bad


def _refusal(bad: Sequence[BadRow], checked: int, rule: BadRowRule, max_tokens_key: str) -> str:
    """Return the error message: the first unusable rows, how many there are, and how to fix them."""
    fixes = _fixes(bad, max_tokens_key)
    if rule.action == "refuse" and len(bad) < checked:
        fixes.append(f"leave such rows out with {rule.key}=skip")
    advice = f"{_listed(fixes)}."
    advice = advice[0].upper() + advice[1:]
    if len(bad) == 1:
        return f"{bad[0].place}: {bad[0].reason} (1 of {checked} rows cannot be used). {advice}"
    return "\n".join([f"{len(bad)} of {checked} rows cannot be used:", *listing(bad), advice])


def _fixes(bad: Sequence[BadRow], max_tokens_key: str) -> list[str]:
    """List the fixes, each once."""
    fixes = list(dict.fromkeys(row.fix for row in bad))[:_SHOWN]
    rooms = [row.room for row in bad if row.room is not None]
    if len(rooms) == len(bad):
        fixes = [f"set {max_tokens_key}={min(rooms)} or less"]
    if any(row.too_long for row in bad):
        fixes.append("choose a model with a longer context")
    return fixes


def _listed(words: Sequence[str]) -> str:
    """Join words as in `a, b, or c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, or {words[-1]}"


def listing(bad: Sequence[BadRow]) -> list[str]:
    """Return the first rows with their reasons, one per line, and the number of further rows."""
    lines = [f"  {row.place}: {row.reason}" for row in bad[:_SHOWN]]
    return [*lines, f"  ... and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else lines
