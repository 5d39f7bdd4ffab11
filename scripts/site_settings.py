"""The reference of settings, made from the schema: a table for each section of an experiment file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from betterhalf.config.keys import choices, is_optional, items, members, sections, tables
from betterhalf.config.render import toml_value
from betterhalf.config.schema import RunConfig, Section

INTRODUCTION = """\
# Settings

Every key of an experiment file, with its default and its values. A heading names the table, as in
`[precision.loss_scale]`; where several types share a table, its key `type` chooses one. `betterhalf config EXPERIMENT`
prints the resolved value of each. Any can be set on the command line, dotted: `precision.loss_scale.floor=1`.
"""


def settings_page() -> str:
    """Return the page as Markdown."""
    return "\n\n".join([INTRODUCTION, *_section(RunConfig, "", {})])


def _section(section: type[Section], table: str, shown: dict[type[Section], str]) -> Iterator[str]:
    """Yield heading, meaning and table of a section, and then those of the sections in it.

    Args:
        section: class of the section.
        table: its dotted name; empty for the root.
        shown: class -> table of the sections that have a heading; another table of one of them refers to it.
    """
    fields = section.model_fields
    below = {name: (*sections(f.annotation), *items(f.annotation), *tables(f.annotation)) for name, f in fields.items()}
    kind = fields["type"].default if "type" in fields else None
    yield f"## {f'[{table}]' if table else 'Top level'}{f' with type = {kind!r}' if isinstance(kind, str) else ''}"
    yield (section.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    rows = [_row(name, field) for name, field in fields.items() if name != "type" and not sections(field.annotation)]
    if rows:
        yield "\n".join(["| key | default | values | meaning |", "|---|---|---|---|", *rows])
    shown[section] = table
    for name, inner in below.items():
        place = f"{table}.{name}{'.NAME' if tables(fields[name].annotation) else ''}".lstrip(".")
        if inner and inner[0] in shown:
            yield f"## [{place}]"
            yield f"The keys of `[{shown[inner[0]]}]`."
            continue
        for one in inner:
            yield from _section(one, place, shown)


def _row(name: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split())
    return f"| `{name}` | {_default(field)} | {_values(field)} | {meaning} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value is None or value in ({}, ()) or isinstance(value, Section) else f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    return ", ".join(map(_toml, value)) if isinstance(value, tuple) else toml_value(value)


def _values(field: FieldInfo) -> str:
    """Return the allowed values of a field, or its type and bounds."""
    named = ", ".join(f"`{value}`" for value in choices(field.annotation))
    bounds = [_bound(bound) for bound in field.metadata]
    absent = "absent" if is_optional(field.annotation) else ""
    kind = next((found for part in members(field.annotation) if (found := _kind(part))), "")
    return ", ".join(filter(None, [named or kind, *bounds, absent]))


def _kind(annotation: Any) -> str:
    words = {"int": "integer", "float": "number", "str": "text", "bool": "`true`, `false`"}
    return words.get(getattr(annotation, "__name__", ""), "")


def _bound(bound: Any) -> str:
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [f"{words} {getattr(bound, sign):g}" for sign, words in signs.items() if hasattr(bound, sign)]
    return " ".join(found)
