"""Read a configuration file of another framework as flat text values."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from betterhalf.errors import InputError
from betterhalf.integrations.audit.records import NULL, FileKind, Framework, Settings
from betterhalf.integrations.audit.shell import Command, commands, launch_command

if TYPE_CHECKING:
    import yaml

_WHOLE = re.compile(r"\$\{(?:oc\.select:)?\s*([\w.]+)\s*(?:,([^{}]*))?\}")
"""An interpolation of OmegaConf that is a whole value: `${a.b}` or `${oc.select:a.b,default}`."""

_MISSING = "???"
"""OmegaConf's word for a value that has to be given."""

MAX_DEPTH = 20
"""Maximum length of a chain of files, or of interpolations, that refer to each other."""

_MAX_BYTES = 1_000_000
"""Size of the largest file that is parsed: PyYAML takes several seconds for it."""

_MAX_KEYS = 100_000
"""Number of values that a file may hold once its YAML aliases are written out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """Content of a file, before a framework is known."""

    path: Path
    kind: FileKind
    tree: Mapping[str, Any]
    """Parsed content; empty for a script."""
    commands: tuple[Command, ...]
    """Commands of a script; none otherwise."""

    def settings(self, framework: Framework) -> Settings:
        """Return the settings as a framework reads them, with inherited files and interpolations resolved.

        Raises:
            InputError: an inherited file is missing, or a script starts training twice.
        """
        if self.kind == "shell":
            command = launch_command(self.commands, framework.commands, str(self.path))
            values, words = command.settings(), command.words
        else:
            values, words = _flat(_inherited(self.path, self.tree, framework.extends)), ()
        return Settings(path=str(self.path), kind=self.kind, values=_resolved(values), command=words)

    def keys(self) -> frozenset[str]:
        """Return all keys of the file itself, those of every command of a script included."""
        if self.kind == "shell":
            return frozenset(key for command in self.commands for key in command.settings())
        return frozenset(_flat(self.tree))

    def words(self) -> frozenset[str]:
        """Return all words of a script's commands."""
        return frozenset(word for command in self.commands for word in command.words)


def read_file(path: Path) -> ConfigFile:
    """Read and parse a file; its extension gives the format, and any other extension means a shell script.

    Raises:
        InputError: the file cannot be read or parsed.
    """
    text = _text(path)
    found = _FORMATS.get(path.suffix.lower())
    if found is None:
        return ConfigFile(path=path, kind="shell", tree={}, commands=tuple(commands(text)))
    kind, parse = found
    try:
        tree = parse(text)
        if isinstance(tree, Mapping):
            _require_finite(tree)
    except RecursionError as error:
        raise InputError(f"{path} nests values too deeply, or inside themselves. Give audit a flatter file.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid {kind.upper()}: {error}. Fix the file.") from error
    if not isinstance(tree, Mapping):
        raise InputError(f"{path} holds no keys. Give audit the configuration of a training run.")
    return ConfigFile(path=path, kind=kind, tree=tree, commands=())


def _text(path: Path) -> str:
    if path.suffix.lower() in (".py", ".ipynb"):
        raise InputError(
            f"{path} is Python, which audit does not run. Give it the settings as JSON: "
            "`json.dump(args.to_dict(), file)` writes those of a GRPOConfig."
        )
    try:
        if path.is_file() and path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} has more than {_MAX_BYTES // 1000} kB. Give audit the configuration alone.")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InputError(f"{path} cannot be read ({reason}). Give audit a YAML, JSON, TOML or shell file.") from error
    if not text.strip():
        raise InputError(f"{path} is empty. Give audit the configuration of a training run.")
    return text


def _require_finite(tree: Mapping[str, Any]) -> None:
    """Raise ValueError if YAML aliases multiply the values of a small file."""
    if next(islice(_pairs(tree, ""), _MAX_KEYS, None), None) is not None:
        raise ValueError(f"its aliases stand for more than {_MAX_KEYS:,} values")


def _yaml(text: str) -> Any:
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        _require_distinct_keys(root)
        return loader.construct_document(root) if root is not None else None
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from error


def _require_distinct_keys(root: yaml.Node | None) -> None:
    """Raise ValueError if a mapping sets a key twice: some loaders refuse that, others keep the last value."""
    import yaml

    pending: list[yaml.Node | None] = [root]
    seen: set[int] = set()
    while pending:
        node = pending.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _distinct((key.value, value) for key, value in node.value if key.value != "<<")
            pending += [value for _, value in node.value]
        else:
            pending += node.value


def _distinct(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if str(key) in found:
            raise ValueError(f"it sets {key} twice")
        found[str(key)] = value
    return found


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_distinct)


_FORMATS: dict[str, tuple[FileKind, Callable[[str], Any]]] = {
    ".yaml": ("yaml", _yaml),
    ".yml": ("yaml", _yaml),
    ".json": ("json", _json),
    ".toml": ("toml", tomllib.loads),
}
"""Ending of a file's name -> format and parser."""


def _inherited(path: Path, tree: Mapping[str, Any], key: str | None, depth: int = 0) -> Mapping[str, Any]:
    """Return the content of a file on top of the files that it inherits from."""
    if key is None or tree.get(key) is None:
        return tree
    if depth == MAX_DEPTH:
        raise InputError(f"{path} inherits from itself through {key!r}. Break the circle.")
    parents = tree[key] if isinstance(tree[key], list) else [tree[key]]
    merged: dict[str, Any] = {}
    for parent in parents:
        where = path.parent / str(parent)
        if not where.is_file():
            raise InputError(
                f"{path} inherits from {parent} ({key!r}), which is not in {where.parent}. Give audit the file where "
                "its bases are, or the resolved configuration."
            )
        read = read_file(where)
        merged = _merged(merged, _inherited(where, read.tree, key, depth + 1))
    return _merged(merged, {name: value for name, value in tree.items() if name != key})


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for name, value in top.items():
        old = both.get(name)
        both[name] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """Return dotted key -> text; OmegaConf's `???` is left out, and items of lists have their number."""
    return dict(_pairs(tree, prefix))


def _pairs(tree: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping | list):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for name, value in items:
            yield from _pairs(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(tree, bool):
        yield prefix, str(tree).lower()
    elif tree != _MISSING:
        yield prefix, NULL if tree is None else str(tree)


def _resolved(values: Mapping[str, str]) -> dict[str, str]:
    """Return the values with interpolations replaced; those of other forms, or of absent keys, stay."""
    return {key: _value(text, values) for key, text in values.items()}


def _value(text: str, values: Mapping[str, str], depth: int = 0) -> str:
    match = _WHOLE.fullmatch(text.strip())
    if match is None or depth == MAX_DEPTH:
        return text.strip()
    key, default = match.groups()
    if key in values:
        return _value(values[key], values, depth + 1)
    return text.strip() if default is None else default.strip()
