"""Load an experiment file and `key=value` overrides into one checked configuration, and compare configurations.

    schema defaults <- base files, named by `extends` <- the experiment file <- overrides

Files are sparse TOML: they hold only what differs from the layer below. A run folder, or the `config.json` in it, works
as an experiment file too; it is JSON, which has a null. The choices of an algorithm's preset are filled in last, so the
values in all files apply to the preset that is named last.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from betterhalf.config import keys
from betterhalf.config.adapter_folder import fill_from_adapter
from betterhalf.config.algorithm import own_choices
from betterhalf.config.explain import explain
from betterhalf.config.overrides import SHORT_KEYS, expand, expand_table, merge, parse_overrides
from betterhalf.config.render import toml_value
from betterhalf.config.schema import RunConfig, Section
from betterhalf.errors import ConfigError
from betterhalf.types import DtypeName

_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = (_PACKAGE / "experiments", _PACKAGE.parents[1] / "experiments")
"""Folders of the experiment files: in an installed package, and in a checkout."""

_SHARED = ("model", "task", "sanity")
"""Sections that an arm cannot change: the perfectible set belongs to them."""


Layer = tuple[str, dict[str, Any]]
"""(source, sparse settings): a file, the command line, or a value of a sweep's axis."""

COMMAND_LINE = "command line"
"""Source of the layers of overrides."""

KEYWORDS = "keyword argument"
"""Source of the settings that a Python call adds."""

ConfigSource = str | Path | Mapping[str, Any] | RunConfig | None
"""Forms in which Python code gives a configuration; see `configuration_of`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One key whose value differs between two configurations."""

    key: str
    """Dotted key."""
    left: Any
    """JSON value in the first; None also if it lacks the key."""
    right: Any
    """JSON value in the second; None also if it lacks the key."""

    def __str__(self) -> str:
        return f"{self.key}: {toml_value(self.left)} -> {toml_value(self.right)}"


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the configuration of an experiment.

    Args:
        path: TOML file, run folder, or `config.json`; None for the defaults. A path below `experiments/` that does not
            exist is looked up among the files of the package.
        overrides: `key=value`; later ones win; see `config.overrides`.

    Raises:
        ConfigError: a file is missing or malformed, `extends` forms a circle, a key is unknown, or a value is wrong.
            The message lists every error.
    """
    config = resolve_layers(read_layers(path, overrides))
    for name in config.sanity.arm:
        arm_settings(config, name)
    return config


def configuration_of(source: ConfigSource, settings: Mapping[str, Any] | None = None) -> RunConfig:
    """Return the configuration that Python code describes.

    Args:
        source: an experiment as in `load_config`, a mapping of settings, a configuration, or None for the defaults. A
            mapping may name the experiment that it changes in `extends`.
        settings: further settings, which win. Keys are those of an experiment file or dotted:
            `{"precision": "fp16", "training": {"steps": 3}, "optimizer.learning_rate": 1e-5}`.

    Raises:
        ConfigError: as `load_config`.
    """
    if isinstance(source, RunConfig):
        layers: list[Layer] = [("configuration", _sparse(resolved_json(source)))]
    elif isinstance(source, Mapping):
        layers = [*read_layers(source.get("extends")), ("mapping", _python_layer(source))]
    else:
        layers = read_layers(source)
    config = resolve_layers([*layers, (KEYWORDS, _python_layer(settings or {}))])
    for name in config.sanity.arm:
        arm_settings(config, name)
    return config


def _python_layer(settings: Mapping[str, Any]) -> dict[str, Any]:
    given = {SHORT_KEYS.get(key, key): value for key, value in settings.items() if key != "extends"}
    layer: dict[str, Any] = expand_table(given)
    return layer


def read_layers(path: str | Path | None, overrides: Sequence[str] = ()) -> list[Layer]:
    """Return the layers of an experiment, the defaults excluded, each with the name of its source; see `load_config`.

    The first of an experiment file is its name, without `.toml` or `.sweep.toml`.
    """
    file = resolve_experiment(path) if path is not None else None
    layers: list[Layer] = []
    if file and file.suffix == ".toml":
        layers.append((str(file), {"name": file.stem.removesuffix(".sweep")}))
    layers += _file_layers(file) if file else []
    return layers + [(COMMAND_LINE, override) for override in parse_overrides(overrides)]


def resolve_layers(layers: Sequence[Layer]) -> RunConfig:
    """Return the configuration of layers over the defaults; later layers win.

    Raises:
        ConfigError: a key is unknown, or a value is wrong. The message lists every error.
    """
    return _validate(*_merge_layers(layers))


def arm_settings(config: RunConfig, name: str) -> RunConfig:
    """Return the configuration of one arm of a sanity run: another precision, or the settings in its table.

    Raises:
        ConfigError: the table has an unknown key, a wrong value, or a setting that all arms share.
    """
    table = config.sanity.arm.get(name)
    source = f"sanity.arm.{name}"
    for section in _SHARED:
        if table is not None and section in table:
            raise ConfigError(f"[{source}] sets {section!r}, which all arms share. Set it for the whole run.")
    layer = expand({"precision": name}) if table is None else table
    merged = _with_types(merge(_sparse(resolved_json(config)), layer), RunConfig)
    return _validate(merged, dict.fromkeys(flat(layer), source))


def resolve_experiment(path: str | Path) -> Path:
    """Return the file that an EXPERIMENT argument names.

    Raises:
        ConfigError: there is no such file; the message names the most similar one.
    """
    path = Path(path)
    candidates = [path, path / "config.json", *(root / _below_experiments(path) for root in _SHIPPED)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise ConfigError(f"{str(path)!r} is a folder without config.json. Name a TOML file, or the folder of a run.")
    if path.name == "config.json" and path.parent.is_dir():
        raise ConfigError(f"run {str(path.parent)!r} has lost its config.json. Restore the file.")
    hint = _nearest_file(path)
    fix = f"Did you mean {str(hint)!r}?" if hint else "Name a TOML file, or the folder of a run."
    raise ConfigError(f"there is no experiment file {str(path)!r}. {fix}")


def resolved_json(config: RunConfig) -> dict[str, Any]:
    """Return every setting as plain JSON; `RunConfig.model_validate` restores the configuration."""
    return config.model_dump(mode="json")


def config_difference(left: RunConfig, right: RunConfig) -> list[Difference]:
    """Return the keys whose values differ, sorted."""
    a, b = flat(resolved_json(left)), flat(resolved_json(right))
    changed = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    return [Difference(key=key, left=a.get(key), right=b.get(key)) for key in changed]


def same_except(left: RunConfig, right: RunConfig, *prefixes: str) -> bool:
    """Return True if two configurations differ only in keys at and below `prefixes`."""
    changed = (difference.key for difference in config_difference(left, right))
    return all(any(f"{key}.".startswith(f"{prefix}.") for prefix in prefixes) for key in changed)


def _file_layers(path: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """Read a file and the files it extends, base first, each with its name."""
    resolved = path.resolve()
    if resolved in above:
        circle = " -> ".join(file.name for file in (*above[above.index(resolved) :], resolved))
        raise ConfigError(f"`extends` forms a circle: {circle}. Remove one of them.")
    layer = _read(path)
    base = layer.pop("extends", None)
    if base is None:
        return [(str(path), layer)]
    if not isinstance(base, str):
        raise ConfigError(f"extends = {toml_value(base)} in {path} is not text. Name one file, relative to this one.")
    file = path.parent / base
    if not file.is_file():
        raise ConfigError(
            f"{path} extends {base!r}, which does not exist. Give its path relative to the folder of {path.name}."
        )
    return [*_file_layers(file, (*above, resolved)), (str(path), layer)]


def _read(path: Path) -> dict[str, Any]:
    """Read a TOML file, or the JSON of a run folder."""
    try:
        text = path.read_text(encoding="utf-8")
        layer = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}). Check the path and its permissions.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid {path.suffix[1:].upper()}: {error}. Correct it there.") from error
    if not isinstance(layer, dict):
        raise ConfigError(f"{path} holds no settings. Name the config.json of a run, or a TOML file.")
    return _sparse(_current(_renamed(layer))) if path.suffix == ".json" else layer


def _renamed(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a run with the current names of values; an earlier version may have written it."""
    return {
        key: _renamed(value) if isinstance(value, Mapping) else keys.current_value(key, value)
        for key, value in resolved.items()
    }


def _current(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a run with today's keys: `logging.tensorboard` came before `logging.trackers`."""
    section = resolved.get("logging")
    if not isinstance(section, Mapping) or "tensorboard" not in section:
        return dict(resolved)
    kept = {key: value for key, value in section.items() if key != "tensorboard"}
    trackers = {"trackers": ["tensorboard"]} if section["tensorboard"] else {}
    return {**resolved, "logging": {**kept, **trackers}}


def _sparse(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved configuration as a layer, without its preset's choices, which another preset replaces."""
    section = resolved.get("algorithm")
    return {**resolved, "algorithm": own_choices(section)} if isinstance(section, Mapping) else dict(resolved)


def _merge_layers(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge all layers over the defaults; return the result and the layer that set each dotted key."""
    merged, origins = _sparse(resolved_json(RunConfig())), {}
    for source, layer in _joined(layers):
        merged = merge(_without_unlisted_arms(merged, layer), layer)
        origins.update(dict.fromkeys(flat(layer), source))
    return _with_types(merged, RunConfig), origins


def _without_unlisted_arms(merged: Mapping[str, Any], layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Drop the tables of arms that a layer above no longer lists, so that `arms=fp16,coarse` chooses among them.

    All are kept if it lists an arm that nothing describes: the message then names the most similar one.
    """
    listed, own, tables = _in_sanity(layer, "arms"), _in_sanity(layer, "arm"), _in_sanity(merged, "arm")
    if not isinstance(listed, (list, tuple)) or not isinstance(tables, Mapping):
        return merged
    described = {*get_args(DtypeName), *tables, *(own if isinstance(own, Mapping) else ())}
    if not described.issuperset(map(str, listed)):
        return merged
    kept = {name: table for name, table in tables.items() if name in listed}
    return {**merged, "sanity": {**merged["sanity"], "arm": kept}}


def _in_sanity(layer: Mapping[str, Any], key: str) -> Any:
    section = layer.get("sanity")
    return section.get(key) if isinstance(section, Mapping) else None


def _joined(layers: Sequence[Layer]) -> list[Layer]:
    """Expand shorthands, and join neighbours of one source (the overrides) to one layer.

    If each override were its own layer, `task.path=a task.type=math` would lose the path when the type changes.
    """
    joined: list[Layer] = []
    for source, layer in layers:
        if joined and joined[-1][0] == source:
            joined[-1] = (source, merge(joined[-1][1], expand(layer)))
        else:
            joined.append((source, expand(layer)))
    return joined


def _with_types(data: Mapping[str, Any], section: type[Section]) -> dict[str, Any]:
    """Add the default `type` to sections with several types that do not name one."""
    filled = dict(data)
    for key, info in section.model_fields.items():
        value = filled.get(key)
        if not isinstance(value, Mapping):
            continue
        inner, named = keys.sections(info.annotation), keys.tables(info.annotation)
        if len(named) > 1:
            kind = named[0].model_fields["type"].default
            filled[key] = {name: _with_type(table, named, kind) for name, table in value.items()}
        elif len(inner) > 1:
            filled[key] = _with_type(value, inner, info.default.type)
        elif inner:
            filled[key] = _with_types(value, inner[0])
    return filled


def _with_type(value: Any, holders: Sequence[type[Section]], default: str) -> Any:
    """Add `type` to the value of a section with several types, and to the sections in it."""
    if not isinstance(value, Mapping):
        return value
    kind = value.get("type", default)
    chosen = [section for section in holders if section.model_fields["type"].default == kind]
    return {"type": kind} | (_with_types(value, chosen[0]) if chosen else dict(value))


def _validate(data: Mapping[str, Any], origins: Mapping[str, str]) -> RunConfig:
    """Validate strictly: "12" is not a number, true is not 1. Only the JSON mode accepts a list for a tuple."""
    lora = data["lora"]
    if isinstance(lora, Mapping):
        lora = fill_from_adapter(lora, targets_given="lora.target_modules" in origins)
    whole = {**data, "lora": lora}
    try:
        return RunConfig.model_validate_json(json.dumps(whole, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, origins)) from error


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves by their dotted keys; a list is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def _below_experiments(path: Path) -> Path:
    return Path(*path.parts[1:]) if path.parts[:1] == ("experiments",) else path


def _nearest_file(path: Path) -> Path | None:
    """Return the file with the most similar path, beside `path` or below `experiments/`, else one of that name."""
    beside = {file.name: file for file in sorted(path.parent.glob("*.toml"))}
    roots = [root for root in (Path("experiments"), *_SHIPPED) if root.is_dir()][:1]
    below = {str(file.relative_to(root)): file for root in roots for file in sorted(root.rglob("*.toml"))}
    for files, wanted in ((beside, path.name), (below, str(_below_experiments(path)))):
        close = difflib.get_close_matches(wanted, files, n=1, cutoff=0.7)
        if close:
            return files[close[0]]
    return next((file for file in below.values() if file.stem == path.stem), None)
