"""Records of the audit: the rules of a framework, and what they find in a configuration.

A rule gives one role its value, under conditions on the file's keys or on roles that were decided before. The first
rule of a role whose conditions hold decides it. Every rule names the file and line of the framework's source that it
was read from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

Role = Literal["compute", "masters", "reduction", "wire", "engine", "kv", "logits", "logprobs", "scaler"]
"""Role of a dtype: those of docs/precision.md, with `logprobs` and `scaler` beside them."""

ROLES: dict[Role, str] = {
    "compute": "trainer compute",
    "masters": "master weights",
    "reduction": "gradient reduction",
    "wire": "weight wire",
    "engine": "rollout engine",
    "kv": "KV cache",
    "logits": "trainer logits",
    "logprobs": "trainer logprobs",
    "scaler": "loss scaler",
}
"""Role -> displayed name, in the order in which roles are decided: a rule may refer to an earlier one."""

DECISIVE: tuple[Role, ...] = ("compute", "masters", "wire", "engine", "kv", "scaler")
"""Roles that have to be decided before both sides are known to agree."""

FileKind = Literal["yaml", "json", "toml", "shell"]
"""Format of a configuration file."""

NULL = "null"
"""Text of a value that is set to nothing."""

NO_SCALER = "none"
"""Value of the role `scaler` without loss scaling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A configuration file as flat text values."""

    path: str
    """Path of the file, for messages."""
    kind: FileKind
    """Format of the file."""
    values: Mapping[str, str]
    """Dotted key -> value as text; `null` for a key that is set to nothing, `true` for a flag without a value."""
    command: tuple[str, ...] = ()
    """Words of the launch command of a shell script, without its settings."""

    def get(self, key: str) -> str | None:
        """Return the value of a key, None if the file does not set it or sets it to nothing."""
        text = self.values.get(key)
        return None if text == NULL else text


@dataclass(frozen=True, slots=True)
class Is:
    """Condition: a key has one of some values, compared without regard to case; `*` matches anything."""

    key: str
    """Dotted key."""
    values: tuple[str, ...]
    """Patterns of its value."""
    default: str = ""
    """Value if the file does not set the key."""


@dataclass(frozen=True, slots=True)
class Has:
    """Condition: the file sets a key."""

    key: str
    """Dotted key, or a pattern of keys."""


@dataclass(frozen=True, slots=True)
class Decided:
    """Condition: an earlier role has one of some values."""

    role: Role
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Starts:
    """Condition: the launch command of a script has a word that matches; a file of another format has none."""

    words: tuple[str, ...]
    """Patterns of the word."""


Condition = Is | Has | Decided | Starts


@dataclass(frozen=True, slots=True)
class Fixed:
    """Value that the framework's code fixes."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Like:
    """Value of a role that was decided before."""

    role: Role


@dataclass(frozen=True, slots=True)
class Depends:
    """Value that the file does not determine."""

    on: str
    """The thing that decides it, as it follows `depends on`."""


@dataclass(frozen=True, slots=True)
class FromKey:
    """Dtype that a key of the file names."""

    key: str
    """Dotted key."""
    default: Fixed | Like | Depends
    """Value if the file does not set the key."""
    words: Mapping[str, Fixed | Like | Depends] = field(default_factory=dict)
    """Values that are not the name of a dtype, such as `auto` -> their meaning."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Dtypes that the framework refuses -> the reason."""


Value = Fixed | Like | Depends | FromKey


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a framework's table: the value of a role under conditions."""

    role: Role
    value: Value
    why: str
    """Reason, as a clause that follows the deciding key."""
    source: str
    """File and line of the framework's source."""
    when: tuple[Condition, ...] = ()
    """Conditions, all of which have to hold."""


@dataclass(frozen=True, slots=True)
class Trap:
    """Behaviour that a configuration does not show."""

    text: str
    """Sentence for the user."""
    source: str
    """File and line of the framework's source, or an issue."""
    when: tuple[Condition, ...]
    """Conditions, all of which have to hold."""
    breaks: bool = False
    """True if training crashes or computes something wrong."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings for FP16 on both sides, or the reason why there are none."""

    settings: tuple[tuple[str, str], ...] = ()
    """(key, value) of each setting."""
    note: str = ""
    """Sentence on what the settings leave open; without settings, why the framework cannot."""
    source: str = ""
    """File and line of the framework's source."""
    when: tuple[Condition, ...] = ()
    """Conditions, all of which have to hold."""


@dataclass(frozen=True, slots=True)
class Implied:
    """Setting that follows from another one, such as the members of a group of configurations."""

    when: tuple[Condition, ...]
    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Key whose value has to be one that the table has rules for, such as the trainer's backend."""

    key: str
    known: tuple[str, ...]
    """Patterns of its known values."""
    default: str | None
    """Value if the file does not set it; None if the framework requires it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Framework:
    """Everything that the audit knows about one framework, read from some of its versions."""

    name: str
    """Name for `--framework`."""
    title: str
    """Displayed name."""
    versions: tuple[str, ...]
    """Releases or commits that the rules were read from; the first is the one that `source` lines refer to."""
    repository: str
    """Address of its source."""
    kinds: tuple[FileKind, ...]
    """Formats of its configuration files."""
    marks: tuple[str, ...]
    """Patterns of keys by which a file of this framework is recognised."""
    commands: tuple[str, ...] = ()
    """Patterns of a word in its launch command."""
    extends: str | None = None
    """Key that names a file to inherit from, relative to the file; None if there is none."""
    choices: tuple[Choice, ...] = ()
    implied: tuple[Implied, ...] = ()
    rules: tuple[Rule, ...]
    traps: tuple[Trap, ...] = ()
    recipes: tuple[Recipe, ...]
    """Ways to FP16; the first whose conditions hold is shown."""
    irrelevant: tuple[str, ...] = ()
    """Patterns of keys that look like precision, but do not touch the policy or the engine."""
    other_versions: Mapping[str, str] = field(default_factory=dict)
    """Pattern of a key that only other versions have -> those versions."""

    @property
    def version(self) -> str:
        """Version that the rules were read from."""
        return self.versions[0]

    def known_keys(self) -> frozenset[str]:
        """Return every key that a rule, trap, recipe, choice or implied setting reads, and that a recipe sets."""
        rows: tuple[Rule | Trap | Recipe | Implied, ...] = (*self.rules, *self.traps, *self.recipes, *self.implied)
        keys = {condition.key for row in rows for condition in row.when if isinstance(condition, Is | Has)}
        keys |= {rule.value.key for rule in self.rules if isinstance(rule.value, FromKey)}
        keys |= {key for recipe in self.recipes for key, _ in recipe.settings}
        return frozenset(keys | {choice.key for choice in self.choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Value of one role, with the rule that decided it."""

    role: Role
    value: str
    """Dtype, `none`, the kind of scaler, or `depends on ...`."""
    key: str | None
    """Key that decided it; None if the framework's code fixes it."""
    rule: str
    """Deciding setting and reason, as a sentence for the user."""
    source: str
    """File and line of the framework's source."""

    @property
    def depends(self) -> bool:
        """True if the file does not determine the value."""
        return self.value.startswith("depends on ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Result of an audit."""

    path: str
    framework: str
    """Name of the framework."""
    title: str
    version: str
    """Version that the rules were read from."""
    findings: tuple[Finding, ...]
    """One for each role."""
    differences: tuple[str, ...]
    """Sentence for each pair of roles that cannot agree, and for each step of training that cannot be right."""
    notes: tuple[str, ...]
    """Sentences on settings without effect, and on what the file leaves open."""
    unknown: tuple[str, ...]
    """Settings that look like precision and have no rule."""
    change: tuple[str, ...]
    """Settings that give FP16 on both sides, as `key = value`."""
    advice: str
    """Sentence on FP16: what the settings leave open, or why the framework cannot."""

    @property
    def undecided(self) -> tuple[Role, ...]:
        """Decisive roles that the file does not determine."""
        return tuple(finding.role for finding in self.findings if finding.depends and finding.role in DECISIVE)

    @property
    def passed(self) -> bool:
        """True if the file alone proves that both sides run the same precision."""
        return not (self.differences or self.undecided or self.unknown)


def matches(patterns: tuple[str, ...], text: str) -> bool:
    """Return whether a text matches one of some patterns, without regard to case."""
    return any(fnmatchcase(text.lower(), pattern.lower()) for pattern in patterns)
