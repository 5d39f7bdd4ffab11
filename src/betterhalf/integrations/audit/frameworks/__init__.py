"""The table of frameworks: every module of this package holds the rules of one, as `FRAMEWORK`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from betterhalf.integrations.audit.records import Framework


def _table() -> dict[str, Framework]:
    names = sorted(module.name for module in iter_modules(__path__))
    found: list[Framework] = [import_module(f"{__name__}.{name}").FRAMEWORK for name in names]
    return {framework.name: framework for framework in found}


FRAMEWORKS = _table()
"""Name -> rules."""
