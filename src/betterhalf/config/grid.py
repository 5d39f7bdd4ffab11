"""Expansion of a sweep file into its cells: one complete configuration for each combination of values and seed."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from betterhalf.config import keys
from betterhalf.config.load import COMMAND_LINE, Layer, flat, read_layers, resolve_layers, resolved_json
from betterhalf.config.overrides import expand, expand_table
from betterhalf.config.schema import RunConfig, SweepConfig
from betterhalf.errors import ConfigError

SEED = "seed"
"""Name of the axis of seeds."""

_SEEDS_ALONE = "all"
"""Combination of a sweep of seeds alone."""

_GENERIC = ("name", "preset", "type")
"""Last parts of a key that say less than the part before them: `algorithm.preset` is the axis `algorithm`."""

_LONGEST_LABEL = 200
"""Maximum length of a label, which is the name of a folder."""

_OF_A_CELL = ("evaluate", "evaluation_prompts", "evaluation_samples", "keep_checkpoints")
"""Keys of `[sweep]` that concern a cell itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis of a sweep."""

    name: str
    """Short name, as in labels."""
    key: str
    """Name in the file: the dotted key, or the name of a table of labels."""
    changes: Mapping[str, Mapping[str, Any]]
    """Settings of each value, by the label of the value."""
    numbers: tuple[float, ...] | None
    """The values themselves, if all are numbers; None otherwise."""
    labelled: bool = False
    """True if a label is not the value itself: it is a name in the file, or had to be rewritten."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the values, in order."""
        return tuple(self.changes)

    def settings(self) -> set[str]:
        """Return the dotted keys that the axis sets."""
        return {key for changes in self.changes.values() for key in flat(changes)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    label: str
    """Name of its folder, such as `precision=bf16,rounding=aligned,seed=0`."""
    point: Mapping[str, str]
    """Axis name -> label of the value, without the seed."""
    config: RunConfig
    """Complete configuration."""

    @property
    def combination(self) -> str:
        """Label without the seed; `all` for a sweep of seeds alone."""
        return _joined(self.point) or _SEEDS_ALONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A sweep, expanded."""

    config: RunConfig
    """Configuration of the file itself; its section `sweep` holds the axes."""
    axes: tuple[Axis, ...]
    """Axes in the order of the file, without the seeds."""
    cells: tuple[Cell, ...]
    """Cells in the order of the axes; the seed varies fastest."""


def combination_of(label: str) -> str | None:
    """Return the combination of a cell from its label; None for a label without a seed."""
    found = re.fullmatch(rf"(?:(.+),)?{SEED}=\d+", label)
    return (found[1] or _SEEDS_ALONE) if found else None


def load_grid(path: str | Path, overrides: Sequence[str] = ()) -> Grid:
    """Expand a sweep file; `overrides` apply to every cell.

    Raises:
        ConfigError: the file has no axis, an axis sets an unknown key or a wrong value, two axes or an axis and the
            command line set the same key, or two cells would have the same folder or the same configuration.
    """
    layers = read_layers(path, overrides)
    config = resolve_layers(layers)
    axes = _axes(config.sweep)
    _require_separate_keys(axes, config.sweep.seeds, layers)
    seeds = config.sweep.seeds or (config.seed,)
    if not axes and not config.sweep.seeds:
        raise ConfigError(f"{path} has neither axes nor seeds. Add a table [sweep.axes], or sweep.seeds = [0, 1, 2].")
    by_seed = Axis(name=SEED, key=SEED, changes={str(seed): {SEED: seed} for seed in seeds}, numbers=None)
    points = list(_kept(config.sweep, [*axes, by_seed]))
    if not points:
        raise ConfigError("sweep.only and sweep.exclude leave no combination. Remove one of their tables.")
    cells = [_cell(layers, [*axes, by_seed], point, shown=bool(config.sweep.seeds)) for point in points]
    _require_distinct(cells)
    return Grid(config=config, axes=axes, cells=tuple(cells))


def _axes(sweep: SweepConfig) -> tuple[Axis, ...]:
    names = [_short(key) for key in sweep.axes]
    axes = []
    for name, (key, values) in zip(names, sweep.axes.items(), strict=True):
        unique = names.count(name) == 1 and name != SEED
        axes.append(_axis(name if unique else key, key, values))
    return tuple(axes)


def _axis(name: str, key: str, values: Any) -> Axis:
    tables = list(values.values()) if isinstance(values, Mapping) else [{key: value} for value in values]
    texts = [_text(value) for value in values]  # of a mapping, its labels
    _require_different(key, list(values), texts)
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    rewritten = any(
        not isinstance(value, (bool, int, float)) and value != text for value, text in zip(values, texts, strict=True)
    )
    return Axis(
        name=name,
        key=key,
        changes={text: expand_table(table) for text, table in zip(texts, tables, strict=True)},
        numbers=tuple(map(float, values)) if numeric else None,
        labelled=isinstance(values, Mapping) or rewritten,
    )


def _require_different(key: str, values: Sequence[Any], texts: Sequence[str]) -> None:
    """Refuse two values of an axis with one label, which is a part of a folder's name."""
    for place, text in enumerate(texts):
        first = texts.index(text)
        if first == place:
            continue
        if values[first] == values[place]:
            raise ConfigError(f"the axis {key} has the value {text} twice. Name each value once.")
        raise ConfigError(
            f"the axis {key} has the values {values[first]!r} and {values[place]!r}, which would both be written "
            f"{text} in the names of folders. Give them different labels, as a table."
        )


def _short(key: str) -> str:
    parts = key.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] in _GENERIC else parts[-1]


def _text(value: object) -> str:
    """Return a value as part of a folder's name."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, (int, float)):
        return f"{value:g}" if isinstance(value, float) else str(value)
    elif isinstance(value, (list, tuple)):
        text = "+".join(map(_text, value)) or "none"
    elif isinstance(value, Mapping):
        text = "+".join(map(_text, value.values())) or "none"
    else:
        text = str(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-") or "empty"


def _joined(point: Mapping[str, str]) -> str:
    return ",".join(f"{name}={label}" for name, label in point.items())


def _require_separate_keys(axes: Sequence[Axis], seeds: Sequence[int], layers: Sequence[Layer]) -> None:
    """Refuse a key that two axes set, or an axis (also of `seeds`) and the command line: one would silently win."""
    overrides = [flat(expand(layer)) for source, layer in layers if source == COMMAND_LINE]
    given = {key: value for override in overrides for key, value in override.items()}
    if SEED in given and seeds:
        fix = f"Write sweep.seeds={given[SEED]} instead of seed={given[SEED]}"
        raise ConfigError(f"seed is set by the command line, but the seeds of a sweep are sweep.seeds. {fix}.")
    owners = dict.fromkeys(given, "the command line")
    for axis in axes:
        settings = axis.settings()
        if SEED in settings:
            raise ConfigError(f"the axis {axis.key} sets the seed. Leave it out and list the seeds in sweep.seeds.")
        if shared := sorted(settings & owners.keys()):
            raise ConfigError(
                f"{shared[0]} is set by {owners[shared[0]]} and by the axis {axis.key}. Leave one of them out; "
                "sweep.only chooses among the values of an axis."
            )
        owners |= dict.fromkeys(settings, f"the axis {axis.key}")


def _kept(sweep: SweepConfig, axes: Sequence[Axis]) -> Iterator[dict[str, str]]:
    """Yield the combinations that `only` and `exclude` leave, as axis name -> label."""
    only = [_condition("only", table, axes) for table in sweep.only]
    exclude = [_condition("exclude", table, axes) for table in sweep.exclude]
    for labels in itertools.product(*(axis.labels for axis in axes)):
        point = dict(zip((axis.name for axis in axes), labels, strict=True))
        if (not only or any(_fits(point, table) for table in only)) and not any(_fits(point, t) for t in exclude):
            yield point


def _condition(where: str, table: Mapping[str, Any], axes: Sequence[Axis]) -> dict[str, list[str]]:
    """Return one table of `only` or `exclude` as axis name -> labels."""
    condition = {}
    named = {name: axis for axis in axes for name in (axis.key, axis.name)}
    for name, wanted in table.items():
        if name not in named:
            hint = keys.nearest(name, list(named))
            fix = f"Did you mean {hint!r}?" if hint else f"The axes are {', '.join(axis.name for axis in axes)}."
            raise ConfigError(f"sweep.{where} names {name!r}, which is no axis of the sweep. {fix}")
        axis = named[name]
        labels = [_text(value) for value in (wanted if isinstance(wanted, (list, tuple)) else [wanted])]
        if unknown := [label for label in labels if label not in axis.labels]:
            raise ConfigError(
                f"sweep.{where} names {unknown[0]!r}, which is no value of the axis {axis.key}. "
                f"Its values are {', '.join(axis.labels)}."
            )
        condition[axis.name] = labels
    return condition


def _fits(point: Mapping[str, str], condition: Mapping[str, Sequence[str]]) -> bool:
    return all(point[name] in labels for name, labels in condition.items())


def _cell(layers: Sequence[Layer], axes: Sequence[Axis], point: Mapping[str, str], *, shown: bool) -> Cell:
    """Resolve one cell; `shown` puts the seed into its label."""
    label = _joined({name: value for name, value in point.items() if shown or name != SEED})
    if len(label) > _LONGEST_LABEL:
        raise ConfigError(
            f"the label {label[:60]}... has {len(label)} characters, too many for the name of a folder. Shorten it "
            f"with a table of labels (at most {_LONGEST_LABEL} characters)."
        )
    # Last, so that nothing overrides an axis.
    own = [(f"axis {axis.key}, {point[axis.name]}", dict(axis.changes[point[axis.name]])) for axis in axes]
    try:
        config = resolve_layers([*layers, *own])
    except ConfigError as error:
        raise ConfigError(f"the cell {label} cannot run: {error}") from error
    kept = {key: getattr(config.sweep, key) for key in _OF_A_CELL}
    return Cell(
        label=label,
        point={name: value for name, value in point.items() if name != SEED},
        config=config.model_copy(update={"name": label, "sweep": SweepConfig(**kept)}),
    )


def _require_distinct(cells: Sequence[Cell]) -> None:
    """Refuse two cells with one folder, or with the same settings."""
    folders, configs = dict[str, Cell](), dict[str, Cell]()
    for cell in cells:
        if (other := folders.setdefault(cell.label.lower(), cell)) is not cell:
            raise ConfigError(
                f"the folders of the cells {other.label} and {cell.label} would differ in upper and lower case alone, "
                "which some file systems do not distinguish. Give the values different labels, as a table."
            )
        settings = json.dumps({**resolved_json(cell.config), "name": ""}, sort_keys=True)
        if (other := configs.setdefault(settings, cell)) is not cell:
            raise ConfigError(
                f"the cells {other.label} and {cell.label} have the same settings. Remove one of the values, or leave "
                "one of them out with sweep.exclude."
            )
