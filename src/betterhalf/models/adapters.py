"""LoRA adapters (arXiv 2106.09685): PEFT puts them into a module, and this project's layers compute them."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from betterhalf.config.adapter_folder import PREFIX, WEIGHTS_FILE
from betterhalf.config.lora import ALL_LINEAR
from betterhalf.config.schema import LoraConfig, ModelConfig
from betterhalf.errors import InputError, MissingExtraError
from betterhalf.models.adapter_names import BASE, DOWN, NAME, UP, plain_name, served_name
from betterhalf.models.adapter_start import require_fitting, require_targets, starting_values
from betterhalf.models.files import lasting_name
from betterhalf.models.skeleton import skeleton
from betterhalf.precision.emulation import to_format
from betterhalf.precision.merge import merge_rows
from betterhalf.types import DtypeName, LoraMerge

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that engines fuse into one, so that their weights must be updated together."""
_ROUTER = ".mlp.gate"
"""Last part of a router's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedLinear:
    """A linear layer with an adapter, whose product is `scale * B @ A @ x`; all names are those of parameters."""

    name: str
    """Name of the layer's weight in the model without adapters."""
    base: str
    """Frozen weight [out, in]."""
    down: str
    """A [rank, in]."""
    up: str
    """B [out, rank]."""
    scale: float
    """Factor of the product."""


def require_peft() -> None:
    """Require PEFT, without importing it.

    Raises:
        MissingExtraError: it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError(
            "lora.rank needs the package peft; install it with `pip install betterhalf[lora]`, or set lora.rank=0 to "
            "train all weights"
        )


def check_adapters(hf_config: Any, lora: LoraConfig, base: ModelConfig) -> None:
    """Refuse adapters that the model cannot have, without reading weights.

    Raises:
        InputError: a target matches no linear layer of the decoder, the rank exceeds a side of one, or `lora.adapter`
            does not fit the model or the settings.
        MissingExtraError: PEFT is not installed.
    """
    if not lora.active:
        return
    require_peft()
    module = skeleton(hf_config)
    if lora.adapter is None:
        target_modules(module, lora)
        return
    shapes = {name: (part.out_features, part.in_features) for name, part in _linear_layers(module).items()}
    require_targets(require_fitting(lora, shapes, base), target_modules(module, lora))


def target_modules(module: Any, lora: LoraConfig) -> dict[str, nn.Linear]:
    """Return name -> linear layer of each target, in the module's order.

    Raises:
        InputError: as `check_adapters`.
    """
    linear = _linear_layers(module)
    for target in lora.target_modules:
        if target != ALL_LINEAR and not any(_matches(name, target) for name in linear):
            raise InputError(_names_experts(module, target, linear) or _no_match(target, linear))
    chosen = {name: part for name, part in linear.items() if is_target(name, lora)}
    for name, part in chosen.items():
        if lora.rank > min(part.in_features, part.out_features):
            raise InputError(
                f"lora.rank={lora.rank} exceeds a side of {name}, which is {part.out_features} x {part.in_features}; "
                f"set lora.rank={min(part.in_features, part.out_features)} or less, or leave that layer out of "
                "lora.target_modules"
            )
    return chosen


def _linear_layers(module: Any) -> dict[str, nn.Linear]:
    """Return name -> each linear layer that may have an adapter: all but the LM head."""
    head = module.get_output_embeddings()
    return {name: part for name, part in module.named_modules() if type(part) is nn.Linear and part is not head}


def is_target(name: str, lora: LoraConfig) -> bool:
    """Return whether a linear layer of the decoder, which is not the LM head, gets an adapter.

    Experts and their router get none: transformers holds them as parameters of no linear layer, and engines by names
    that look like those of linear layers.
    """
    if ".experts." in name or name.endswith(_ROUTER):
        return False
    return any(target == ALL_LINEAR or _matches(name, target) for target in lora.target_modules)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


_EXPERT_LEAVES = ("experts", "gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""Last parts of names by which users know experts: the module, its parameters, and those of single experts."""


def _names_experts(module: nn.Module, target: str, linear: Collection[str]) -> str | None:
    """Return the refusal of a target that names experts; None if it does not.

    PEFT's `target_parameters` adds the product to the weights of all experts in each pass, in their dtype: in half, a
    product below half the spacing is lost in the trainer too, and the sum is as large as the experts.
    """
    found = next((name for name, parameter in module.named_parameters() if parameter.dim() == 3), None)
    if found is None or target.rpartition(".")[2] not in _EXPERT_LEAVES:
        return None
    return (
        f"lora.target_modules names {target!r}, which are experts in this model ({found} holds those of a layer), and "
        "experts cannot have adapters: in half precision PEFT would lose small updates of them in each pass. Train "
        f"adapters on {', '.join(_leaves(linear))}, or all weights with lora.rank=0"
    )


def _leaves(names: Collection[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _no_match(target: str, linear: Mapping[str, nn.Linear]) -> str:
    leaves = _leaves(linear)
    near = difflib.get_close_matches(target.rpartition(".")[2], leaves, n=3, cutoff=0.4)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    head = " (the LM head cannot have an adapter)" if target.endswith("lm_head") else ""
    return (
        f"lora.target_modules names {target!r}, which matches no linear layer of this model's decoder{head}; its "
        f"layers are {', '.join(leaves)}{meant}"
    )


def add_adapters(module: Any, lora: LoraConfig, seed: int) -> None:
    """Put adapters into a module, in place, and freeze all other parameters; do nothing if `lora.rank` is 0.

    The values of a skeleton come from `AdaptedSource`.

    Args:
        module: transformers causal language model with FP32 parameters, or its skeleton.
        lora: rank, scale, targets, and the adapter to start from.
        seed: of new adapters.

    Raises:
        InputError, MissingExtraError: as `check_adapters`.
    """
    if not lora.active:
        return
    require_peft()
    chosen = target_modules(module, lora)
    # Imported here because it is optional.
    from peft import inject_adapter_in_model

    bare = next(iter(chosen.values())).weight.is_meta
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(peft_config(lora, list(chosen)), module, low_cpu_mem_usage=bare)
    module.eval()
    start = starting_values(lora, seed)
    for name, parameter in () if bare else trained_parameters(module):
        parameter.data.copy_(start(name, tuple(parameter.shape)))


def peft_config(lora: LoraConfig, names: Sequence[str], base: str | None = None) -> Any:
    """Return PEFT's configuration of the adapters.

    Args:
        lora: rank, scale and targets.
        names: target modules, by last part or full name.
        base: name or folder of the base model, for a saved adapter.
    """
    from peft import LoraConfig as PeftLoraConfig

    # PEFT declares an integer and accepts any number.
    alpha: Any = int(lora.numerator) if lora.numerator.is_integer() else lora.numerator
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        use_rslora=lora.rank_stabilised,
        lora_dropout=0.0,
        target_modules=list(names),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def save_adapter(module: nn.Module, lora: LoraConfig, folder: Path, base: ModelConfig, notes: Mapping[str, str]) -> int:
    """Write the adapters as PEFT does, in FP32, and return their number of parameters.

    Args:
        module: with adapters.
        lora: rank and scale.
        folder: exists; gets `adapter_config.json` and `adapter_model.safetensors`.
        base: names the base model.
        notes: further facts for the header of the weights.

    Raises:
        OSError, SafetensorError: a file cannot be written.
    """
    tensors = {
        served_name(key): module.get_parameter(key).detach().float()
        for layer in adapted_linears(module)
        for key in (layer.down, layer.up)
    }
    targets = _short_names(module, {name.partition(".lora_")[0] for name in tensors})
    write_adapter(folder, tensors, lora, targets, lasting_name(base), base.revision, notes)
    return sum(tensor.numel() for tensor in tensors.values())


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    lora: LoraConfig,
    targets: Collection[str],
    base: str,
    revision: str | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write adapters as PEFT does; see `save_adapter`.

    Args:
        folder: exists.
        tensors: by the names that `served_name` gives.
        lora: rank and scale.
        targets: layers that are adapted, by last part or full name.
        base: name or folder of the base model.
        revision: of a base model on the hub.
        notes: further facts for the header of the weights.
    """
    config = peft_config(lora, sorted(targets), base)
    config.target_modules = sorted(targets)  # PEFT makes a set of them, whose order changes from process to process
    config.inference_mode = True
    config.revision = revision
    config.save_pretrained(str(folder))
    prefixed = {f"{PREFIX}{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(prefixed, folder / WEIGHTS_FILE, metadata={"format": "pt", **(notes or {})})


def _short_names(module: nn.Module, layers: Collection[str]) -> Collection[str]:
    """Return the last parts of the layers' names if no other module has such a name, as PEFT writes them."""
    short = {layer.rpartition(".")[2] for layer in layers}
    named = {name for name, _ in module.named_modules() if name.rpartition(".")[2] in short}
    return short if named == set(layers) else layers


def adapted_linears(module: nn.Module) -> tuple[AdaptedLinear, ...]:
    """Return the linear layers of a module that have adapters, in its order; empty without any."""
    found = []
    for parameter, _ in module.named_parameters():
        if parameter.endswith(DOWN):
            layer = parameter.removesuffix(DOWN)
            scaling: Any = module.get_submodule(layer).scaling
            found.append(
                AdaptedLinear(
                    name=f"{layer}.weight",
                    base=f"{layer}{BASE}.weight",
                    down=parameter,
                    up=f"{layer}{UP}",
                    scale=float(scaling[NAME]),
                )
            )
    return tuple(found)


def remove_adapters(module: Any) -> None:
    """Replace each adapted layer by its base, in place."""
    for layer in adapted_linears(module):
        path = layer.name.removesuffix(".weight")
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, module.get_submodule(path).base_layer)


def merged_weight(module: nn.Module, layer: AdaptedLinear, compute: DtypeName, name: DtypeName) -> Tensor:
    """Return the weight of an adapted layer with FP32 parameters as the engine of a run holds it; see `merge_rows`."""
    base, down, up = (module.get_parameter(key).detach() for key in (layer.base, layer.down, layer.up))
    return merge_rows(to_format(base, compute), down, up, layer.scale, name)[0]


def plain_weights(
    module: nn.Module, compute: DtypeName, name: DtypeName, merge: LoraMerge = "weights"
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight rounded to a format) of a module, with adapters merged or separate.

    Names are those of the transformers module without adapters, which holds the experts of a layer in one tensor, and
    `served_name` of adapters.

    Args:
        module: with FP32 parameters.
        compute: format in which the trainer computes with the base of adapters.
        name: format of the results.
        merge: form of the adapters.
    """
    adapted = {layer.base: layer for layer in adapted_linears(module)}
    inside = {name for layer in adapted.values() for name in (layer.down, layer.up)}
    for key, parameter in module.named_parameters():
        if key in adapted and merge == "weights":
            yield adapted[key].name, merged_weight(module, adapted[key], compute, name)
        elif key in inside:
            if merge == "adapter":
                yield served_name(key), to_format(parameter.detach(), name)
        else:
            frozen = to_format(parameter.detach(), compute) if adapted else parameter.detach()
            yield plain_name(key), to_format(frozen, name)


def trained_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of those that are trained: the adapters', or all of them without adapters."""
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def with_fused(names: Collection[str]) -> frozenset[str]:
    """Return `names` with the weights and biases of their layers, and of the layers that engines fuse with these."""
    found = set(names)
    for name in names:
        layer = name.rpartition(".")[0]
        parent, _, leaf = layer.rpartition(".")
        group = next((group for group in _FUSED if leaf in group), (leaf,))
        found |= {f"{parent}.{other}.{kind}" for other in group for kind in ("weight", "bias")}
    return frozenset(found)
