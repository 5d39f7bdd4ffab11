"""Valid keys, derived from the schema: the type of each dotted key, and the nearest key to a wrong one."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from betterhalf.config.familiar import familiar
from betterhalf.config.lora import ALL_LINEAR
from betterhalf.config.schema import RunConfig, Section

_RENAMED_VALUES = {("gradient", "score"): "logprob"}
"""Current values by (last part of the key, value in earlier runs)."""


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, `None` included; any other annotation alone. Ignores Annotated."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(part for member in get_args(annotation) for part in members(member))
    return (annotation,)


def sections(annotation: Any) -> tuple[type[Section], ...]:
    """Return the sections a field can hold; none for a plain value."""
    return tuple(part for part in members(annotation) if isinstance(part, type) and issubclass(part, Section))


def items(annotation: Any) -> tuple[type[Section], ...]:
    """Return the sections in a list of sections; none for any other field."""
    lists = [part for part in members(annotation) if get_origin(part) is tuple]
    return tuple(section for part in lists for section in sections(get_args(part)[0]))


def tables(annotation: Any) -> tuple[type[Section], ...]:
    """Return the sections in a mapping of names to sections; none for any other field."""
    mappings = [part for part in members(annotation) if get_origin(part) is dict]
    return tuple(section for part in mappings for section in sections(get_args(part)[1]))


def is_optional(annotation: Any) -> bool:
    """Return True if a field may be absent."""
    return type(None) in members(annotation)


def is_text(annotation: Any) -> bool:
    """Return True if a field holds free text, so that `name=1e3` means the three characters."""
    return str in members(annotation)


def is_tuple(annotation: Any) -> bool:
    """Return True if a field holds several values, which commas separate."""
    return any(get_origin(part) is tuple for part in members(annotation))


def holds_text(annotation: Any) -> bool:
    """Return True if a field holds several free texts."""
    lists = [part for part in members(annotation) if get_origin(part) is tuple]
    return any(is_text(get_args(part)[0]) for part in lists)


def alternatives(annotation: Any) -> int:
    """Return the number of forms that a field can take, not counting an absent value."""
    return len([part for part in members(annotation) if part is not type(None)])


def choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values of a Literal, or of a tuple of Literals; none for anything else."""
    found: list[Any] = []
    for part in members(annotation):
        if get_origin(part) is Literal:
            found += get_args(part)
        elif get_origin(part) is tuple:
            found += choices(get_args(part)[0])
    return tuple(dict.fromkeys(found))


def type_key(annotation: Any) -> str | None:
    """Return `type` for a field that holds one of several sections, which that key distinguishes; None for others."""
    return "type" if len(sections(annotation)) > 1 else None


def shorthand(annotation: Any) -> str | None:
    """Return the key that a bare value of the section sets, such as `preset` for `precision=fp16`; None without one."""
    found = sections(annotation)
    return type_key(annotation) or (found[0].shorthand if found else None)


def field(holders: Sequence[type[Section]], key: str) -> FieldInfo | None:
    """Return the field `key` of the first of `holders` that has it; None without one."""
    for section in holders:
        if key in section.model_fields:
            return section.model_fields[key]
    return None


def find(path: Sequence[str]) -> FieldInfo | None:
    """Return the field at a path from the root, searched in every type of section; None without one.

    The path has no positions in lists: `watchdog.levels.metric`. The path of a table that the user names, such as
    `evaluate.data.NAME`, gives the field that holds it. The settings of an arm, `sanity.arm.NAME.KEY`, are those of a
    run: KEY.
    """
    if tuple(path[:2]) == ("sanity", "arm"):
        path = path[3:] or path[:2]
    holders: tuple[type[Section], ...] = (RunConfig,)
    found = None
    names = iter(path)
    for key in names:
        found = field(holders, key)
        if found is None:
            return None
        inner = tables(found.annotation)
        holders = inner or sections(found.annotation) or items(found.annotation)
        if inner:
            next(names, None)  # the name that the user gave
    return found


def all_keys() -> tuple[str, ...]:
    """Return every dotted key that holds a value, in the order of the schema."""
    return tuple(dict.fromkeys(_keys((RunConfig,), "")))


def _keys(holders: Sequence[type[Section]], prefix: str) -> Iterator[str]:
    for section in holders:
        for name, info in section.model_fields.items():
            inner = sections(info.annotation)
            if inner:
                yield from _keys(inner, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"


def advice(wrong: str) -> str | None:
    """Return a sentence that leads from a wrong dotted key to the right one; None if no key is similar.

    A key that other frameworks use is answered with the key here, or with what to do instead.
    """
    close = _close_keys(wrong)
    known = None if close else familiar(wrong)
    if known:
        return str(known)
    hints = close or [hint for hint in (nearest_key(wrong),) if hint]
    return f"Did you mean {' or '.join(map(repr, hints))}?" if hints else None


def nearest_key(wrong: str) -> str | None:
    """Return the valid dotted key most similar to `wrong`; None if no key is similar.

    A key of the same section that differs in a letter or two, or that has the words of `wrong` and more, comes first,
    then a key of that name in another section, then the key of another framework, then the most similar key overall.
    Names of sections count as keys, so that `optimiser` finds one as well.
    """
    keys = all_keys()
    if close := _close_keys(wrong):
        return close[0]
    if (known := familiar(wrong)) is not None:
        return known.key
    return _nearest(wrong, [*keys, *_section_names()]) or _nearest_leaf(wrong.rpartition(".")[2], keys)


def _close_keys(wrong: str) -> list[str]:
    """Return the key of the same section that is close, and one of that name in another section unless it is a slip."""
    keys = all_keys()
    section, _, leaf = wrong.rpartition(".")
    beside = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}
    if (slip := _nearest(leaf, list(beside), cutoff=0.85)) is not None:
        return [beside[slip]]
    longer = [name for name in beside if section and set(leaf.split("_")) <= set(name.split("_"))]
    fuller = _nearest(leaf, longer, cutoff=0.0)
    elsewhere = next((key for key in keys if leaf == key.rpartition(".")[2] and key != wrong), None)
    return [key for key in (beside.get(fuller or ""), elsewhere) if key]


def nearest(wrong: object, allowed: Sequence[object]) -> str | None:
    """Return the allowed value most similar to `wrong`; None if none is close."""
    return _nearest(str(wrong), [str(value) for value in allowed])


def current_value(leaf: str, value: object) -> object:
    """Return the current name of a value that earlier runs call by another; any other value unchanged."""
    if leaf == "target_modules" and value == []:
        return [ALL_LINEAR]
    return _RENAMED_VALUES.get((leaf, value), value) if isinstance(value, str) else value


def _section_names() -> list[str]:
    return sorted({key.rpartition(".")[0] for key in all_keys() if "." in key})


def _nearest(wrong: str, allowed: Sequence[str], cutoff: float = 0.6) -> str | None:
    found = difflib.get_close_matches(wrong, allowed, n=3, cutoff=cutoff)
    # Swapped letters are the most common slip, and difflib counts them like two wrong ones.
    swapped = [name for name in found if sorted(name) == sorted(wrong)]
    return next(iter([*swapped, *found]), None)


def _nearest_leaf(leaf: str, keys: Sequence[str]) -> str | None:
    found = _nearest(leaf, [key.rpartition(".")[2] for key in keys], cutoff=0.75)
    return next((key for key in keys if key.rpartition(".")[2] == found), None) if found else None
