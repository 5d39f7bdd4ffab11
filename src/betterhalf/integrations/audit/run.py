"""The audit of a file, from its path to the result."""

from __future__ import annotations

from pathlib import Path

from betterhalf.integrations.audit.decide import audit
from betterhalf.integrations.audit.detect import find_framework
from betterhalf.integrations.audit.reading import read_file
from betterhalf.integrations.audit.records import Audit


def audit_file(path: Path, framework: str | None = None) -> Audit:
    """Read another framework's configuration, and derive the dtypes that it would really run.

    Args:
        path: YAML, JSON, TOML or shell file.
        framework: `NAME` or `NAME==VERSION`; None to recognise the framework by its keys.

    Raises:
        InputError: the file cannot be read, its framework, version or backend is not known, or one of its values is
            not a dtype.
    """
    file = read_file(path)
    found = find_framework(file, framework)
    return audit(file.settings(found), found)
