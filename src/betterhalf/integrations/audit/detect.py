"""Find the framework that a configuration file is for, by keys that only its files have."""

from __future__ import annotations

from betterhalf.errors import InputError
from betterhalf.integrations.audit.frameworks import FRAMEWORKS
from betterhalf.integrations.audit.reading import ConfigFile
from betterhalf.integrations.audit.records import Framework, matches


def find_framework(file: ConfigFile, asked: str | None) -> Framework:
    """Return the framework of a file.

    Args:
        file: the file.
        asked: `NAME` or `NAME==VERSION` of the user; None to recognise the framework by its keys.

    Raises:
        InputError: the framework or the version is not known, none or several are recognised, or the framework does
            not read files of this format.
    """
    found = _asked(asked) if asked else _recognised(file)
    _require_kind(found, file)
    _require_version(found, file)
    return found


def known() -> str:
    """Return the names of all frameworks with the versions that their rules were read from."""
    return ", ".join(f"{name} {' and '.join(found.versions)}" for name, found in FRAMEWORKS.items())


def _asked(text: str) -> Framework:
    name, _, version = text.partition("==")
    found = FRAMEWORKS.get(name.strip().lower())
    if found is None:
        raise InputError(f"audit does not know the framework {name.strip()!r}. It knows {known()}.")
    if version and version.strip() not in found.versions:
        raise InputError(
            f"audit has no rules for {found.title} {version.strip()}: they were read from "
            f"{' and '.join(found.versions)}. Ask for one of these with --framework {found.name}=={found.version} if "
            "its verdict helps you; another version may behave differently."
        )
    return found


def _recognised(file: ConfigFile) -> Framework:
    keys, words = file.keys(), file.words()
    found = [
        framework
        for framework in FRAMEWORKS.values()
        if any(matches(framework.marks, key) for key in keys)
        or any(matches(framework.commands, word) for word in words)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        names = [framework.name for framework in found]
        raise InputError(f"{file.path} may be of {' or '.join(names)}. Say which with --framework {names[0]}.")
    raise InputError(
        f"{file.path} has no key by which audit recognises a framework. It knows {known()}; say which with --framework "
        "NAME."
    )


def _require_kind(framework: Framework, file: ConfigFile) -> None:
    if file.kind not in framework.kinds:
        raise InputError(
            f"{file.path} is a {file.kind} file, but {framework.title} is configured in {' or '.join(framework.kinds)}"
            f". Give audit the {framework.kinds[0]} configuration."
        )


def _require_version(framework: Framework, file: ConfigFile) -> None:
    keys = sorted(file.keys())
    for pattern, versions in framework.other_versions.items():
        key = next((key for key in keys if matches((pattern,), key)), None)
        if key is not None:
            raise InputError(
                f"{file.path} sets {key}, a key of {framework.title} {versions}, and audit has rules for "
                f"{' and '.join(framework.versions)} only. Port the file, or look the precision up in that version."
            )
