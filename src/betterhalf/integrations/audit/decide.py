"""Apply a framework's rules to the settings of a file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from betterhalf.errors import InputError
from betterhalf.integrations.audit.records import (
    NO_SCALER,
    ROLES,
    Audit,
    Condition,
    Decided,
    Depends,
    Finding,
    Fixed,
    Framework,
    FromKey,
    Has,
    Is,
    Like,
    Recipe,
    Role,
    Rule,
    Settings,
    Starts,
    Value,
    matches,
)

_DTYPE = re.compile(r"(?:torch\.)?(b?)f(?:loat|p)?(16|32)")
_UNRESOLVED = re.compile(r"\$[\w{(]")
"""A variable, or an interpolation, that the file does not resolve."""
_HALF = re.compile(r"(?:torch\.)?half")
_EIGHT = re.compile(r"(?:torch\.)?(?:mx)?f(?:loat|p)8\w*")
_AT_LAUNCH = "which the file does not resolve"
_PRECISION_WORDS = {
    *("dtype", "dtypes", "precision", "quantization", "quantize", "quant", "qat", "amp", "autocast", "half"),
    *("fp16", "bf16", "fp32", "fp8", "fp4", "nvfp4", "mxfp4", "mxfp8", "int4", "int8"),
}
_OFF = ("false", "none", "null", "", "0", "auto", "no", "disabled")


@dataclass(frozen=True, slots=True)
class _State:
    """The file, and the roles that are decided so far."""

    settings: Settings
    found: Mapping[Role, Finding]


def audit(settings: Settings, framework: Framework) -> Audit:
    """Derive the dtype of every role, and what would change them to FP16.

    Raises:
        InputError: the file chooses a backend that has no rules, or a dtype that the framework refuses.
    """
    settings = _with_implied(settings, framework)
    _require_known_choices(settings, framework)
    state = _State(settings, {})
    for role in ROLES:
        state = replace(state, found={**state.found, role: _decide(role, framework, state)})
    broken = [f"{trap.text} ({trap.source})" for trap in framework.traps if trap.breaks and _hold(trap.when, state)]
    notes = [f"{trap.text} ({trap.source})" for trap in framework.traps if not trap.breaks and _hold(trap.when, state)]
    recipe = next(recipe for recipe in framework.recipes if _hold(recipe.when, state))
    return Audit(
        path=settings.path,
        framework=framework.name,
        title=framework.title,
        version=framework.version,
        findings=tuple(state.found.values()),
        differences=(*_differences(state.found), *broken),
        notes=tuple(notes),
        unknown=tuple(_unknown(settings, framework)),
        change=tuple(_missing(recipe, settings)),
        advice=recipe.note + (f" ({recipe.source})" if recipe.note and recipe.source else ""),
    )


def dtype_of(text: str) -> str | None:
    """Return the short name of a dtype, such as `fp16`; None if the text names none."""
    lower = text.strip().lower()
    if match := _DTYPE.fullmatch(lower):
        return f"{match[1]}{'f' if match[1] else 'fp'}{match[2]}"
    if _HALF.fullmatch(lower):
        return "fp16"
    if lower in ("float", "torch.float"):
        return "fp32"
    return "fp8" if _EIGHT.fullmatch(lower) else None


def _with_implied(settings: Settings, framework: Framework) -> Settings:
    values = dict(settings.values)
    for implied in framework.implied:
        if implied.key not in values and _hold(implied.when, _State(settings, {})):
            values[implied.key] = implied.value
    return replace(settings, values=values)


def _require_known_choices(settings: Settings, framework: Framework) -> None:
    for choice in framework.choices:
        value = settings.get(choice.key) or choice.default
        known = ", ".join(pattern.rstrip("*:") for pattern in choice.known)
        if value is None:
            raise InputError(f"{settings.path} does not set {choice.key}, on which precision depends. Set it: {known}.")
        if not matches(choice.known, value):
            raise InputError(
                f"audit has no rules for {choice.key} = {value} of {framework.title} {framework.version}. It knows "
                f"{known}."
            )


# -- rules


def _decide(role: Role, framework: Framework, state: _State) -> Finding:
    rule, open_key = _deciding_rule(role, framework, state)
    if open_key is not None:
        text = _lookup(open_key, state.settings)
        value, said = f"depends on {text}, {_AT_LAUNCH}", f"{open_key} = {text}, which may be what decides"
        return Finding(role=role, value=value, key=open_key, rule=f"{said}: {rule.why}", source=rule.source)
    value, key, said = _value(rule.value, state)
    if key is None:
        key = next((condition.key for condition in rule.when if isinstance(condition, Is | Has)), None)
        said = _said(rule, state)
    return Finding(
        role=role, value=value, key=key, rule=f"{said}: {rule.why}" if said else rule.why, source=rule.source
    )


def _deciding_rule(role: Role, framework: Framework, state: _State) -> tuple[Rule, str | None]:
    """Return the first rule that holds or may hold; if it may, also the key whose value only the launch resolves."""
    for rule in framework.rules:
        if rule.role != role:
            continue
        failing = [condition for condition in rule.when if not _holds(condition, state)]
        open_keys = [key for condition in failing if (key := _open_key(condition, state)) is not None]
        if len(open_keys) == len(failing):
            return rule, open_keys[0] if open_keys else None
    raise AssertionError(f"{framework.name} has no rule for {role}")


def _open_key(condition: Condition, state: _State) -> str | None:
    """Return the key behind a condition if the file leaves its value to the launch, such as `${oc.env:FP16}`."""
    if isinstance(condition, Decided):
        finding = state.found[condition.role]
        return finding.key if finding.value.endswith(_AT_LAUNCH) else None
    if not isinstance(condition, Is):
        return None
    text = _lookup(condition.key, state.settings)
    return condition.key if text is not None and _UNRESOLVED.search(text) else None


def _value(value: Value, state: _State) -> tuple[str, str | None, str]:
    """Return the value, the key that named it, and what the file says of that key."""
    match value:
        case Fixed(dtype):
            return dtype, None, ""
        case Like(role):
            return state.found[role].value, None, ""
        case Depends(on):
            return f"depends on {on}", None, ""
        case FromKey():
            return _from_key(value, state)


def _from_key(value: FromKey, state: _State) -> tuple[str, str | None, str]:
    written, text = state.settings.values.get(value.key, ""), state.settings.get(value.key)
    said = f"{value.key} = {written}"
    if written.lower() in value.words:
        return _value(value.words[written.lower()], state)[0], value.key, said
    if text is None:
        return _value(value.default, state)[0], value.key, f"{value.key} is not set"
    if "$" in text:
        return f"depends on {text}, {_AT_LAUNCH}", value.key, said
    dtype = dtype_of(text)
    if dtype is None:
        raise InputError(f"{state.settings.path} sets {said}, which is no dtype that audit knows. Write float16.")
    if dtype in value.refused:
        raise InputError(f"{state.settings.path} sets {said}, but {value.refused[dtype]}. Choose another dtype.")
    return dtype, value.key, said


def _said(rule: Rule, state: _State) -> str:
    """Return what the file says of the keys that a rule's conditions read."""
    words = []
    for condition in rule.when:
        if isinstance(condition, Is):
            text = _lookup(condition.key, state.settings)
            words.append(f"{condition.key} = {text}" if text is not None else f"{condition.key} is not set")
        elif isinstance(condition, Has):
            words.append(f"{condition.key} is set")
    return ", ".join(dict.fromkeys(words))


def _hold(conditions: tuple[Condition, ...], state: _State) -> bool:
    return all(_holds(condition, state) for condition in conditions)


def _holds(condition: Condition, state: _State) -> bool:
    match condition:
        case Is(key, values, default):
            text = _lookup(key, state.settings)
            return matches(values, default if text is None else text)
        case Has(key):
            return _lookup(key, state.settings) is not None
        case Starts(words):
            return any(matches(words, word) for word in state.settings.command)
        case _:
            return matches(condition.values, state.found[condition.role].value)


def _lookup(key: str, settings: Settings) -> str | None:
    """Return the value of a key, or of the first key that matches a pattern."""
    if "*" not in key:
        return settings.get(key)
    return next((text for name in settings.values if fnmatchcase(name, key) and (text := settings.get(name))), None)


# -- verdict


def _differences(found: Mapping[Role, Finding]) -> Iterator[str]:
    """Yield a sentence for everything that cannot be right, whatever the framework."""
    value = {role: finding.value for role, finding in found.items() if not finding.depends}
    compute, engine, kv, wire = (value.get(role) for role in ("compute", "engine", "kv", "wire"))
    if compute and engine and compute != engine:
        yield f"the trainer computes in {compute} and the engine in {engine}"
    if engine and kv and kv != engine and engine != "fp8":
        yield f"the KV cache holds {kv} and the engine computes in {engine}"
    if engine and wire and engine != "fp8" and wire not in (engine, "fp32"):
        yield f"weights travel in {wire} to an engine in {engine}: they are rounded twice"
    if compute == "fp16" and value.get("scaler") == NO_SCALER:
        yield "gradients in fp16 without a loss scaler: those below 3e-8 become zero"
    masters = value.get("masters")
    if masters and masters != "fp32":
        yield f"master weights in {masters}: updates below its rounding step are lost"


def _missing(recipe: Recipe, settings: Settings) -> Iterator[str]:
    """Yield the settings of a recipe that the file lacks."""
    for key, value in recipe.settings:
        text = settings.get(key)
        same = text is not None and (text.lower() == value.lower() or (dtype_of(text) or text) == dtype_of(value))
        if not same:
            yield f"{key} = {value}"


def _unknown(settings: Settings, framework: Framework) -> Iterator[str]:
    """Yield the settings that look like precision and that no rule reads."""
    known = tuple(framework.known_keys())
    for key, text in settings.values.items():
        words = re.split(r"[._\-/@]", key.lower())
        if not _PRECISION_WORDS.intersection(words) or text.lower() in _OFF:
            continue
        if not matches((*known, *framework.irrelevant), key):
            yield f"{key} = {text}"
