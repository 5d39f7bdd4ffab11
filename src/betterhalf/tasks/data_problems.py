"""Problems from the rows of a data set, for every task that has one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from betterhalf.config.schema import DataConfig
from betterhalf.tasks.data_fields import answer_of, plain_fields, question_of
from betterhalf.tasks.data_source import RawRow, read_rows
from betterhalf.tasks.prompting import Draft
from betterhalf.tasks.row import BadRow, Row, RowError
from betterhalf.tasks.task import Tokenizer
from betterhalf.tasks.templates import QuestionTemplate, question_template
from betterhalf.user_code import load_object, require_call

RowFilter = Callable[[Mapping[str, Any]], Any]
"""The user's function of the fields of a row; it should return true to keep it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataProblems:
    """Rows of a data set, in one prompt template."""

    rows: list[Row]
    """All rows, those with a defect included."""
    template: QuestionTemplate
    tokenizer: Tokenizer

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def row(self, index: int) -> Row:
        """Return row `index`, counted from 0 without blank lines."""
        return self.rows[index]

    def draft(self, index: int) -> Draft:
        """Return the question of row `index`, rendered in the template."""
        return self.template.draft(self.tokenizer, self.rows[index])


def build_problems(
    config: DataConfig, tokenizer: Tokenizer, *, default_instruction: str = "", digest_fields: bool = True
) -> DataProblems:
    """Read a data set. Rows that cannot be read, or that the filter leaves out, carry the reason; none is dropped here.

    Args:
        config: source, fields, filter and prompt.
        tokenizer: tokenizer of the model.
        default_instruction: instruction for each question where the configuration gives none.
        digest_fields: true if rewards can depend on all fields of a row; each is then part of the row's digest.

    Raises:
        InputError: the data cannot be read or is empty, or the tokenizer lacks the chat template that it needs.
        ConfigError: the filter cannot be imported, or the chat template does not read an argument.
        MissingExtraError: the data set is on the hub and `datasets` is not installed.
    """
    template = question_template(config, tokenizer, default_instruction)
    keep = load_filter(config.filter)
    raw = read_rows(config.path, config.split, config.subset, config.max_rows)
    rows = [keep(read_row(config, index, row, digest_fields=digest_fields)) for index, row in enumerate(raw)]
    return DataProblems(rows=rows, template=template, tokenizer=tokenizer)


def read_row(config: DataConfig, index: int, raw: RawRow, *, digest_fields: bool = True) -> Row:
    """Return a row of the data set; if it cannot be read, with the reason and without question and answer."""
    name, place = f"{config.type}/{index}", f"{config.path}, row {raw.number}"
    fields = plain_fields(raw.fields)
    try:
        if raw.error is not None:
            raise raw.error
        question, messages = question_of(raw.fields, config.question_field)
        answer = "" if config.answer_field is None else answer_of(raw.fields, config.answer_field)
    except RowError as error:
        defect = BadRow(place=place, reason=error.reason, fix=error.fix)
        return Row(prompt_id=name, place=place, question="", answer="", metadata=fields, defect=defect)
    more = {"fields": fields} if digest_fields else {"messages": messages} if messages else None
    return Row(
        prompt_id=name,
        place=place,
        question=question,
        answer=answer,
        metadata=fields,
        messages=messages,
        context="" if more is None else json.dumps(more, sort_keys=True),
    )


def load_filter(path: str | None) -> Callable[[Row], Row]:
    """Return a function that gives a row a defect if the user's filter at this import path leaves it out.

    Raises:
        ConfigError: the filter cannot be imported, or does not take one argument.
    """
    if path is None:
        return lambda row: row
    function: RowFilter = load_object(path, "task.filter")
    require_call(function, "def keep(row: dict) -> bool", ("row",), f"task.filter={path}")
    return lambda row: _filtered(row, function, path)


def _filtered(row: Row, keep: RowFilter, name: str) -> Row:
    """Return the row with a defect if the filter does not keep it; it is a bad row if the filter fails on it."""
    if row.defect is not None:
        return row
    fix = f"correct the function task.filter={name}"
    try:
        kept = keep(row.metadata)
    except (Exception, SystemExit) as error:  # the user's function may raise anything
        reason = f"the filter {name} raises {type(error).__name__}: {error}"
        return replace(row, defect=BadRow(place=row.place, reason=reason, fix=fix))
    if not isinstance(kept, bool):
        reason = f"the filter {name} returns {str(kept)[:40]!r} ({type(kept).__name__}), not true or false"
        return replace(row, defect=BadRow(place=row.place, reason=reason, fix=fix))
    if kept:
        return row
    return replace(
        row, defect=BadRow(place=row.place, reason=f"task.filter={name} leaves it out", fix=fix, filtered=True)
    )
