"""A LoRA adapter in PEFT's format, read without PEFT: its settings, and names and shapes of its weights.

`lora.adapter` names such a folder. Its rank, scale and targets fill in the settings of `[lora]` that are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from betterhalf.config.lora import ALL_LINEAR
from betterhalf.errors import InputError

SETTINGS_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""Names of PEFT's files."""
PREFIX = "base_model.model."
"""Prefix of the names in PEFT's weights."""
PARTS = (".lora_A.weight", ".lora_B.weight")
"""Last parts of the names of A [rank, in] and B [out, rank]."""
_READ = frozenset({"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "bias"})
"""Settings that are read below."""
_HARMLESS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
        *("exclude_modules", "layers_pattern", "layers_to_transform"),  # the names of the weights say what they chose
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of how the weights began
        *("megatron_core", "qalora_group_size"),  # without effect alone
    }
)
"""Settings that may have any value."""
_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is."""
_MERGE = "merge it into its base with PEFT (merge_and_unload, save_pretrained), and set model.name to the result"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFolder:
    """An adapter on disk."""

    path: str
    """Folder, as the user wrote it."""
    base: str | None
    """Name of the model that it was trained on; None if its files do not say."""
    revision: str | None
    """Branch, tag or commit of that model."""
    rank: int
    alpha: float
    rank_stabilised: bool
    """True if its scale is `alpha / sqrt(rank)`."""
    dropout: float
    """Dropout with which it was trained."""
    target_modules: tuple[str, ...]
    """Last parts of the names of the layers that it adapts, or their full names."""
    shapes: Mapping[str, tuple[int, ...]]
    """Name of each weight, without `PREFIX` -> its shape."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Full names of the layers that it adapts."""
        return tuple(dict.fromkeys(name.partition(".lora_")[0] for name in self.shapes))


def is_adapter(path: Path) -> bool:
    """Return whether a folder holds an adapter in PEFT's format."""
    return (path / SETTINGS_FILE).is_file()


def fill_from_adapter(section: Mapping[str, Any], *, targets_given: bool) -> dict[str, Any]:
    """Return the settings of `[lora]` with those that are left out as the adapter of `lora.adapter` has them.

    A configuration that gives all of them is returned as it is, without reading the folder.

    Args:
        section: settings, defaults among them.
        targets_given: `target_modules` is a choice and not the default.

    Raises:
        InputError: the folder holds no adapter, or one that this project does not compute.
    """
    wanted = ("rank", "alpha", "target_modules")
    folder = section.get("adapter")
    given = {key: section.get(key) for key in wanted}
    if not targets_given and given["target_modules"] == [ALL_LINEAR]:
        given["target_modules"] = None
    if not isinstance(folder, str) or all(given.values()):
        return dict(section)
    found = read_adapter_folder(folder)
    values = {"rank": found.rank, "alpha": found.alpha, "target_modules": list(found.target_modules)}
    return {
        **section,
        **{key: given[key] or value for key, value in values.items()},
        "rank_stabilised": section.get("rank_stabilised") or found.rank_stabilised,
    }


def read_adapter_folder(folder: str) -> AdapterFolder:
    """Read an adapter's settings, and the header of its weights.

    Raises:
        InputError: the folder holds no adapter, a file is damaged, or its kind is not plain LoRA.
    """
    path = Path(folder).expanduser()
    if not is_adapter(path):
        raise InputError(f"lora.adapter={folder} holds no {SETTINGS_FILE}; {_what_instead(path)}")
    settings = _settings(folder, path / SETTINGS_FILE)
    _require_plain_lora(folder, settings)
    shapes = _shapes(folder, path / WEIGHTS_FILE)
    try:
        return AdapterFolder(
            path=folder,
            base=settings.get("base_model_name_or_path") or None,
            revision=settings.get("revision") or None,
            rank=_rank(settings["r"], shapes),
            alpha=float(settings["lora_alpha"]),
            rank_stabilised=bool(settings.get("use_rslora")),
            dropout=float(settings.get("lora_dropout") or 0.0),
            target_modules=_targets(settings, shapes),
            shapes=shapes,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{SETTINGS_FILE} of lora.adapter={folder} is damaged ({error}); restore it") from error


def _rank(declared: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the rank, which the weights must have as well."""
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith(PARTS[0])}
    if ranks != {declared}:
        raise ValueError(f"it says r={declared}, and the weights have rank {', '.join(map(str, sorted(ranks)))}")
    return declared


def _what_instead(path: Path) -> str:
    if (path / "checkpoints").is_dir():
        return f"it is a run: write its adapter to a folder with `betterhalf export {path} DIR`"
    if (path / "config.json").is_file():
        return "it is a whole model: set model.name to it, and leave out lora.adapter"
    if path.is_dir():
        return "name the folder into which PEFT's save_pretrained wrote the adapter"
    return "there is no such folder; an adapter on a hub is downloaded first (hf download NAME --local-dir DIR)"


def _settings(folder: str, file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{SETTINGS_FILE} of lora.adapter={folder} cannot be read ({error}); restore it") from error
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise InputError(f"{SETTINGS_FILE} of lora.adapter={folder} names no peft_type; restore it")
    return settings


def _require_plain_lora(folder: str, settings: Mapping[str, Any]) -> None:
    """Refuse every kind of adapter but `scale * B @ A` beside linear layers of an unchanged base."""
    if settings["peft_type"] != "LORA":
        raise InputError(
            f"lora.adapter={folder} is an adapter of type {settings['peft_type']}, and this project trains LoRA alone; "
            f"{_MERGE}"
        )
    begun = settings.get("init_lora_weights", True)
    strange = {key: value for key, value in settings.items() if value and key not in _READ | _HARMLESS}
    strange.pop("init_lora_weights", None)
    if begun not in _BEGINNINGS:
        strange = {"init_lora_weights": begun, **strange}  # it moved a part of the base into the adapter
    if settings.get("bias", "none") != "none":
        strange["bias"] = settings["bias"]
    if strange:
        key, value = next(iter(strange.items()))
        raise InputError(
            f"lora.adapter={folder} has {key}={json.dumps(value)} in its {SETTINGS_FILE}, which this project does not "
            f"compute; train an adapter without it, or {_MERGE}"
        )


def _shapes(folder: str, file: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape from the header of a safetensors file, which is JSON after its length in 8 bytes."""
    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        found = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except FileNotFoundError as error:
        raise InputError(
            f"lora.adapter={folder} holds no {WEIGHTS_FILE}; load it with PEFT, and save it again with save_pretrained"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{WEIGHTS_FILE} of lora.adapter={folder} is damaged ({error!r}); restore it") from error
    other = next((name for name in found if not _is_plain(name)), None)
    if other is not None or not found:
        raise InputError(
            f"lora.adapter={folder} holds {other or 'no weights'}, and this project trains adapters of the decoder's "
            f"linear layers alone; train an adapter without it, or {_MERGE}"
        )
    return {name.removeprefix(PREFIX): shape for name, shape in found.items()}


def _is_plain(name: str) -> bool:
    """Return whether a weight is A or B of a linear layer that is not the LM head."""
    return name.startswith(PREFIX) and name.endswith(PARTS) and not name.startswith(f"{PREFIX}lm_head.")


def _targets(settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Return the targets as the settings list them, or all names if they choose by a pattern or by layers."""
    listed = settings.get("target_modules")
    chosen = any(settings.get(key) for key in ("exclude_modules", "layers_to_transform"))
    if isinstance(listed, list) and listed and not chosen:
        return tuple(sorted(listed))
    return tuple(dict.fromkeys(name.partition(".lora_")[0] for name in shapes))
