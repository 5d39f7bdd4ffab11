"""Initial values of LoRA adapters: new ones, or those of a folder in PEFT's format."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from betterhalf.config.adapter_folder import PARTS, PREFIX, WEIGHTS_FILE, AdapterFolder, read_adapter_folder
from betterhalf.config.schema import LoraConfig, ModelConfig
from betterhalf.distributed.shard_range import ShardRange
from betterhalf.errors import InputError
from betterhalf.models.adapter_names import DOWN, UP, plain_name, served_name
from betterhalf.models.files import lasting_name
from betterhalf.models.row_source import RowSource

StartingValues = Callable[[str, tuple[int, ...]], Tensor]
"""(name of an adapter's parameter, its shape) -> initial value, float32 on the CPU."""


def starting_values(lora: LoraConfig, seed: int) -> StartingValues:
    """Return the initial values of adapters: those of `lora.adapter`, or new ones from `seed`."""
    if lora.adapter is None:
        return lambda name, shape: new_value(name, shape, seed)
    return _Saved(lora.adapter)


def new_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return the initial value of an adapter's parameter, as in PEFT: 0 for B, uniform within 1 / sqrt(in) for A.

    B is 0, so that the policy starts as the base. A depends on the seed and the name alone, so that all ranks draw the
    same.

    Args:
        name: of the parameter; each has random numbers of its own.
        shape: of the parameter.
        seed: of the run.

    Returns:
        float32, on the CPU.
    """
    if not name.endswith(DOWN):
        return torch.zeros(shape)
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.rand(shape, generator=generator).mul_(2).sub_(1).div_(shape[1] ** 0.5)


class _Saved:
    """Values of an adapter on disk, read one tensor at a time."""

    def __init__(self, folder: str) -> None:
        self._folder, self._file = folder, Path(folder).expanduser() / WEIGHTS_FILE

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        key = PREFIX + served_name(name)
        try:
            with safe_open(self._file, framework="pt") as opened:
                value: Tensor = opened.get_tensor(key).float()
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{WEIGHTS_FILE} of lora.adapter={self._folder} cannot be read ({error}); restore it"
            ) from error
        if tuple(value.shape) != shape or not bool(value.isfinite().all()):
            raise InputError(
                f"{key} of lora.adapter={self._folder} has another shape than {shape}, or values that are not finite; "
                "restore its files"
            )
        return value


class AdaptedSource:
    """Source of the rows of a model with adapters; implements `RowSource`."""

    def __init__(self, base: RowSource, start: StartingValues, trained: RowSource | None = None) -> None:
        """Prepare the source; no weight is read yet.

        Args:
            base: values of the model without adapters.
            start: initial values of the adapters.
            trained: values of adapters that a run has trained, which replace `start`.
        """
        self._base, self._start, self._trained = base, start, trained

    def rows(self, wanted: Mapping[str, ShardRange]) -> Iterator[tuple[str, Tensor]]:
        """See `RowSource.rows`; the adapters come last."""
        adapters = {name: rows for name, rows in wanted.items() if name.endswith((DOWN, UP))}
        base = {plain_name(name): name for name in wanted if name not in adapters}
        for name, values in self._base.rows({name: wanted[key] for name, key in base.items()}):
            yield base[name], values
        if self._trained is not None:
            yield from self._trained.rows(adapters)
            return
        for name, rows in adapters.items():
            yield name, self._start(name, rows.shape)[rows.rows]


def require_fitting(lora: LoraConfig, linear: Mapping[str, tuple[int, int]], base: ModelConfig) -> AdapterFolder:
    """Return the adapter to start from, after checking that it fits the base model and the settings.

    Args:
        lora: settings, with `adapter`.
        linear: name of each linear layer that may have an adapter -> shape of its weight, [out, in].
        base: the run's model.

    Raises:
        InputError: the message names the key to change.
    """
    assert lora.adapter is not None, "a new adapter fits"
    found = read_adapter_folder(lora.adapter)
    _require_same_settings(lora, found)
    for key, shape in found.shapes.items():
        rows, columns = linear.get(key.partition(".lora_")[0], (0, 0))
        if shape != ((found.rank, columns) if key.endswith(PARTS[0]) else (rows, found.rank)):
            there = f"it belongs to a weight of {rows} x {columns}" if rows else "there is no such linear layer"
            raise InputError(
                f"lora.adapter={found.path} was trained on another model than {base.name!r}: it holds {key} of shape "
                f"{list(shape)}, and in that model {there}; {_name_base(found)}"
            )
    _require_base(found, base)
    return found


def require_targets(found: AdapterFolder, chosen: Collection[str]) -> None:
    """Refuse settings that choose other layers than the adapter has.

    Raises:
        InputError: the message names the first of them.
    """
    more, less = sorted(set(found.layers) - set(chosen)), sorted(set(chosen) - set(found.layers))
    if more or less:
        problem = (
            f"adapts {more[0]}, which lora.target_modules does not choose"
            if more
            else (f"does not adapt {less[0]}, which lora.target_modules chooses")
        )
        raise InputError(
            f"lora.adapter={found.path} {problem}; leave out lora.target_modules to continue the adapter as it is"
        )


def _require_same_settings(lora: LoraConfig, found: AdapterFolder) -> None:
    for key, own, theirs in (
        ("rank", lora.rank, found.rank),
        ("alpha", lora.numerator, found.alpha),
        ("rank_stabilised", lora.rank_stabilised, found.rank_stabilised),
    ):
        if own != theirs:
            raise InputError(
                f"lora.{key}={_toml(own)}, and the adapter in lora.adapter={found.path} has {_toml(theirs)}; leave out "
                f"lora.{key} to continue it as it is, or leave out lora.adapter to start a new one"
            )


def _toml(value: float) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _require_base(found: AdapterFolder, base: ModelConfig) -> None:
    """Refuse an adapter whose files name another model.

    A copy of a model has another path, but usually the same last part of its name.
    """
    if found.base is None:
        return
    named, own = (_lasting(ModelConfig(name=name)) for name in (found.base, base.name))
    if named != own and Path(named).name.lower() != Path(own).name.lower():
        raise InputError(
            f"lora.adapter={found.path} was trained on {found.base!r}, and model.name is {base.name!r}; "
            f"{_name_base(found)}. If both are the same model, write {base.name!r} into base_model_name_or_path of its "
            "adapter_config.json"
        )
    on_hub = not Path(own).exists()
    if on_hub and found.revision not in (None, base.revision):
        raise InputError(
            f"lora.adapter={found.path} was trained on revision {found.revision!r} of {found.base!r}, and "
            f"model.revision is {base.revision or 'not set'}; set model.revision={found.revision}"
        )


def _lasting(base: ModelConfig) -> str:
    try:
        return lasting_name(base)
    except (InputError, ImportError):  # it need not be on this machine
        return base.name


def _name_base(found: AdapterFolder) -> str:
    return f"set model.name={found.base or 'to the model that it was trained on'}"
