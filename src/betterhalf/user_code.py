"""User-defined functions and classes, which a configuration names as `module:attribute` or `file.py:attribute`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from betterhalf.errors import ConfigError


def load_object(path: str, key: str) -> Any:
    """Import the object that a setting names.

    Args:
        path: `package.module:attribute`, or `folder/file.py:attribute` relative to the working directory. Modules are
            also looked for in the working directory; what a file imports, also in the folder of that file.
        key: the setting, for messages.

    Raises:
        ConfigError: the path has another form, or module or attribute do not exist (the message names the nearest), or
            the import fails.
    """
    source, colon, name = path.partition(":")
    if not colon or not source or not name:
        raise ConfigError(f"{key}={path} is not an import path. Write module:name or file.py:name.")
    module = _file_module(source, key) if source.endswith(".py") else _named_module(source, key)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{key}={path}: {source} has no attribute {name!r}.{_nearest(part, _public(found))}")
        found = getattr(found, part)
    return found


def require_call(function: Any, example: str, arguments: Iterable[str], key: str) -> None:
    """Refuse an object that cannot be called with these positional arguments.

    Args:
        function: the user's object.
        example: expected signature, for the message.
        arguments: names of the positional arguments that it will get.
        key: the setting and its value, for the message.

    Raises:
        ConfigError: it is not callable, or takes other arguments.
    """
    if not callable(function):
        raise ConfigError(f"{key} is {type(function).__name__}, which cannot be called. Expected: {example}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise ConfigError(
            f"{key} has the signature {name}{signature}, which does not fit: {error}. Expected: {example}"
        ) from error


def source_digest(path: str) -> str:
    """Return a digest of the file that holds the object at an import path, or `unknown`; a resumed run compares it."""
    source = path.partition(":")[0]
    with _working_directory():
        file = Path(source) if source.endswith(".py") else _origin(source)
    if file is None or not file.is_file():
        return "unknown"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _file_module(source: str, key: str) -> ModuleType:
    file = Path(source).expanduser().resolve()
    if not file.is_file():
        near = sorted(path.name for path in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise ConfigError(f"{key}: the file {source} does not exist.{_nearest(file.name, near)}")
    name = f"betterhalf_user_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module

    def run() -> ModuleType:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        return module

    _look_in(file.parent)
    try:
        return _imported(run, source, key)
    except ConfigError:
        del sys.modules[name]
        raise


def _named_module(source: str, key: str) -> ModuleType:
    with _working_directory():
        if _is_missing(source, key):
            near = _nearest(source, _modules(source))
            raise ConfigError(
                f"{key}: there is no module {source!r}.{near} Modules are looked for in the working directory and in "
                "the environment; a file is named by its path, as in folder/file.py:name."
            )
        return _imported(lambda: importlib.import_module(source), source, key)


def _is_missing(source: str, key: str) -> bool:
    """Return whether a module does not exist; its parent packages are imported, and their own errors are raised."""
    try:
        return importlib.util.find_spec(source) is None
    except ModuleNotFoundError as error:
        if error.name is not None and f"{source}.".startswith(f"{error.name}."):
            return True
        raise _import_error(source, key, error) from error
    except (AttributeError, ValueError):
        return True
    except (Exception, SystemExit) as error:  # the user's package may raise anything
        raise _import_error(source, key, error) from error


def _imported(run: Callable[[], ModuleType], source: str, key: str) -> ModuleType:
    try:
        return run()
    except (Exception, SystemExit) as error:  # the user's module may raise anything, and may call sys.exit()
        raise _import_error(source, key, error) from error


def _import_error(source: str, key: str, error: BaseException) -> ConfigError:
    return ConfigError(f"{key}: importing {source} fails with {type(error).__name__}: {error}")


def _origin(source: str) -> Path | None:
    """Return the file of a module, without running it; its parent packages are imported."""
    try:
        spec = importlib.util.find_spec(source)
    except (ImportError, AttributeError, ValueError):
        return None
    if spec is None:
        return None
    return Path(spec.origin) if spec.origin else Path(source)


@contextmanager
def _working_directory() -> Iterator[None]:
    """Look for modules in the working directory too; it stays on the path, for imports that run later."""
    if "" not in sys.path:
        _look_in(Path.cwd())
    importlib.invalidate_caches()
    yield


def _look_in(folder: Path) -> None:
    """Look for modules in a folder too, after all others; it stays on the path, for imports that run later."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()


def _modules(source: str) -> list[str]:
    """Return the names of modules beside the one that was looked for."""
    parent, _, _ = source.rpartition(".")
    if not parent:
        return [module.name for module in pkgutil.iter_modules([str(Path.cwd())])] + sorted(sys.stdlib_module_names)
    spec = importlib.util.find_spec(parent) if _origin(parent) else None
    paths = list(spec.submodule_search_locations or []) if spec else []
    return [f"{parent}.{module.name}" for module in pkgutil.iter_modules(paths)]


def _public(value: Any) -> list[str]:
    return [name for name in dir(value) if not name.startswith("_")]


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""
