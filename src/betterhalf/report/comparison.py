"""Sentences that compare the arms of a sanity run: what each changes, which break, and what separates them.

Every sentence follows from the summary of the run. An arm is broken if it collapsed or was damaged; a cause follows
from a broken arm and one that learned, and from no others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

from betterhalf.report.fields import mapping
from betterhalf.types import EmulatedDtype, LearningOutcome

Arm = Mapping[str, Any]

_EMULATED: tuple[str, ...] = get_args(EmulatedDtype)

_VERBS: Mapping[LearningOutcome, str] = {
    "learned": "learned",
    "dips": "learned, with dips",
    "flat": "neither learned nor lost reward",
    "damaged": "lost reward",
    "collapsed": "collapsed",
    "short": "was too short to tell",
}
"""Verdicts as verbs."""

_BROKEN: tuple[LearningOutcome, ...] = ("collapsed", "damaged")
_FINE: tuple[LearningOutcome, ...] = ("learned", "dips")

_PREVENTED = {
    "engine.rounding": "The same coarse arithmetic with less mismatch learns, so the mismatch between trainer and "
    "engine is what breaks the run.",
    "algorithm.surrogate.dual_clip": "It bounds the ratio current/proximal of tokens with a negative advantage, which "
    "the clip of PPO does not: so it is such tokens that break the run.",
}
"""Conclusion from a changed setting with which a broken arm learns, by its key."""


def changes_text(changes: Mapping[str, Any]) -> str:
    """Return the settings that an arm changes, as on the command line; emulated formats are called so."""
    shown = [f"{key}={_plain(value)}" for key, value in changes.items() if key != "precision.allow_difference"]
    return ", ".join(shown) or "nothing"


def comparison_sentences(arms: Mapping[str, Arm]) -> list[str]:
    """Return sentences on arms that have a verdict and on what each changes; none without an arm of its own table."""
    judged = {name: arm for name, arm in arms.items() if arm.get("verdict")}
    if not any(own_table(name, arm) for name, arm in judged.items()):
        return []
    return [_outcome(judged), *_separations(judged), *_sides(judged)]


def own_table(name: str, arm: Arm) -> bool:
    """Return whether an arm is described in a table: an arm without one changes its precision only."""
    return any(key != "precision.preset" or value != name for key, value in mapping(arm, "changes").items())


def _outcome(arms: Mapping[str, Arm]) -> str:
    """Return the arms by verdict, with their rewards."""
    groups = {verdict: [name for name, arm in arms.items() if arm["verdict"] == verdict] for verdict in _VERBS}
    listed = [
        f"{verdict} {', '.join(f'{name} ({_reward(arms[name])})' for name in names)}"
        for verdict, names in groups.items()
        if names
    ]
    first = [f"{arm['first_reward']:.2f}" for arm in sorted(arms.values(), key=lambda arm: arm["first_reward"])]
    start = f"at {first[0]}" if first[0] == first[-1] else f"between {first[0]} and {first[-1]}"
    unclear = any(groups[verdict] for verdict in (*_BROKEN, "short"))
    end = "" if unclear else " No arm collapsed."
    return f"Rewards began {start} and ended: {'; '.join(listed)}.{end}"


def _separations(arms: Mapping[str, Arm]) -> list[str]:
    """Return a sentence on each pair of a broken arm and another that differ in one setting; one if both are broken."""
    names = list(arms)
    return [
        _separation(name, arms[name], other, arms[other], key)
        for place, name in enumerate(names)
        for other_place, other in enumerate(names)
        if _broken(arms[name]) and (other_place > place or not _broken(arms[other]))
        if (key := _only_difference(arms[name], arms[other])) in _PREVENTED
    ]


def _broken(arm: Arm) -> bool:
    return arm["verdict"] in _BROKEN


def _only_difference(one: Arm, other: Arm) -> str | None:
    """Return the only key in which two arms differ; None if there are several or none."""
    a, b = mapping(one, "changes"), mapping(other, "changes")
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return keys[0] if len(keys) == 1 else None


def _separation(name: str, arm: Arm, other: str, its: Arm, key: str) -> str:
    value, too = mapping(its, "changes").get(key), its["verdict"] == arm["verdict"]
    setting = f"{key}={_plain(value)}" if value is not None else f"the default of {key}"
    numbers = f"({_reward(its)} against {_reward(arm)}; k3 {_k3(its)} against {_k3(arm)})"
    sentence = f"{other} differs from {name} in {setting} alone and {_verb(its)}{' too' * too} {numbers}."
    if too and arm["verdict"] == "collapsed":
        return f"{sentence} So {key} is not what breaks it here."
    # A setting of the broken arm alone may add to the mismatch; and another broken arm shows no more than its numbers.
    shows = value is not None and its["verdict"] in _FINE
    return f"{sentence} {_PREVENTED[key]}" if shows else sentence


def _sides(arms: Mapping[str, Arm]) -> list[str]:
    """Return a sentence on the arms in which one side alone computes in another format."""
    trainer, engine = (_one_side(arms, key) for key in ("precision.compute_dtype", "precision.rollout_dtype"))
    if trainer is None or engine is None:
        return []
    ends = {
        (True, False): "So it is the trainer's rounding that breaks the run, not the engine's.",
        (False, True): "So it is the engine's rounding that breaks the run, not the trainer's.",
        (True, True): "So either side is enough to break the run.",
        (False, False): "So neither side alone breaks the run.",
    }
    (name, arm), (other, its) = trainer, engine
    clear = all(each["verdict"] in (*_BROKEN, *_FINE) for each in (arm, its))
    end = f" {ends[_broken(arm), _broken(its)]}" if clear else ""
    return [
        f"In {name}, the trainer alone is coarse: it {_verb(arm)} ({_reward(arm)}, k3 {_k3(arm)}). In {other}, the "
        f"engine alone is: it {_verb(its)} ({_reward(its)}, k3 {_k3(its)}).{end}"
    ]


def _one_side(arms: Mapping[str, Arm], key: str) -> tuple[str, Arm] | None:
    """Return the first arm that is emulated in this dtype role alone, and changes nothing else; None without one."""
    others = {"precision.preset", "precision.allow_difference"}
    for name, arm in arms.items():
        changes = mapping(arm, "changes")
        emulated = [changed for changed, value in changes.items() if value in _EMULATED]
        if emulated == [key] and changes.keys() - others == {key}:
            return name, arm
    return None


def _verb(arm: Arm) -> str:
    return _VERBS[arm["verdict"]]


def _reward(arm: Arm) -> str:
    return f"{arm['final_reward']:.2f}"


def _k3(arm: Arm) -> str:
    value = arm.get("mismatch_k3")
    return "-" if value is None else f"{value:.1e}"


def _plain(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text} (emulated)" if text in _EMULATED else text
