"""The verb `plan`: memory, traffic and packing of a run on its cluster, before any weight is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import torch
from torch import nn

from betterhalf.algorithms.presets import resolve_algorithm
from betterhalf.config.lora import FULL
from betterhalf.config.schema import LoraConfig, RunConfig
from betterhalf.diagnostics.fitting import misfits
from betterhalf.diagnostics.memory import Plan, Setting, plan_memory
from betterhalf.diagnostics.sizes import GIB, Machine, ModelSizes, StepSizes
from betterhalf.diagnostics.trainer_memory import is_sharded
from betterhalf.errors import ConfigError
from betterhalf.models.adapters import target_modules, with_fused
from betterhalf.models.context import context_length
from betterhalf.models.estimated_tokens import describe_for_plan
from betterhalf.models.files import find_model
from betterhalf.models.skeleton import skeleton
from betterhalf.models.weight_files import WholeReason, whole_reason
from betterhalf.precision.experts import is_replaced
from betterhalf.precision.formats import torch_dtype
from betterhalf.precision.products import has_native_matmul
from betterhalf.setup.data import load_task
from betterhalf.tasks.draw import draw_int
from betterhalf.training.pack import packs_of
from betterhalf.training.split import split_lengths
from betterhalf.types import Completion, HardwareDtype, Prompt, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Packing of one step whose completions have some lengths."""

    completions: str
    """Lengths of the completions, in words."""
    tokens: int
    """Number of packed tokens in the step."""
    packs: int
    """Largest number of packs in one optimizer step, over all ranks."""
    passes: int
    """Largest number of passes that each rank makes in one optimizer step."""
    balance: float
    """Mean of the ranks' tokens divided by their maximum, in the worst optimizer step."""
    largest_pack: int
    """Number of tokens in the pack with the most tokens."""
    largest_loss: int
    """Number of completion tokens in the pack with the most of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Result of `plan`."""

    model: str
    sizes: ModelSizes
    lora_rank: int
    """Rank of the LoRA adapters; 0 if all weights are trained."""
    cluster: str
    """Processes of the run in words."""
    memory: Plan
    packings: tuple[Packing, ...]
    misfits: tuple[str, ...]
    """Sentence for each device that is too small, with settings that would fit."""
    notes: tuple[str, ...]
    """Reasons, apart from memory, why the run would be refused; and notes on the model's files."""

    @property
    def fits(self) -> bool:
        """True if every device is large enough."""
        return not self.misfits

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; sizes in bytes."""
        processes = [
            {
                "kind": process.kind,
                "count": process.count,
                "total_bytes": process.total_bytes,
                "host_bytes": process.host_bytes,
                "items": [asdict(item) for item in process.items],
            }
            for process in self.memory.processes
        ]
        return {
            "verb": "plan",
            "fits": self.fits,
            "model": self.model,
            "sizes": asdict(self.sizes),
            "lora_rank": self.lora_rank,
            "cluster": self.cluster,
            "processes": processes,
            "devices": [asdict(device) for device in self.memory.devices],
            "traffic": asdict(self.memory.traffic),
            "packing": [asdict(packing) for packing in self.packings],
            "misfits": list(self.misfits),
            "notes": list(self.notes),
        }


def plan(config: RunConfig, gpu_gib: float | None = None) -> RunPlan:
    """Plan a run from its data and its model's configuration files; the cluster is not contacted.

    Args:
        config: the run, with any `[cluster]`.
        gpu_gib: memory of one GPU in GiB, to plan a run on GPUs; by default that of this machine's first GPU. A run on
            CPUs is planned for the memory of this host.

    Raises:
        InputError: the model's files or the data cannot be read, or the memory contradicts `device=cpu`.
    """
    described = describe_for_plan(config.model)
    task = load_task(described, config, rows=config.training.prompts_per_step, will_grade=False)
    try:
        prompts = task.prompts(0, config.training.prompts_per_step, config.seed)
    finally:
        task.close()
    machine = this_machine(config, gpu_gib)
    source = find_model(config.model, tokenizer=False)
    whole = whole_reason(source, described.hf_config) if is_sharded(config) else None
    found = plan_model(config, described.hf_config, prompts, machine, name=described.name, whole=whole)
    return replace(found, notes=(*found.notes, *described.notes))


def plan_model(
    config: RunConfig,
    hf_config: Any,
    prompts: Sequence[Prompt],
    machine: Machine,
    name: str,
    *,
    whole: WholeReason | None = None,
) -> RunPlan:
    """Plan a run of a model that is described by its transformers configuration alone.

    Args:
        config: the run.
        hf_config: transformers configuration.
        prompts: those of one step.
        machine: where it runs.
        name: displayed name of the model.
        whole: reason why the ranks cannot read the model's files in parts; None if they can.
    """
    module = skeleton(hf_config)
    sizes = model_sizes(hf_config, module, config.lora)
    room = context_length(hf_config) - max(len(prompt.token_ids) for prompt in prompts)
    longest = min(config.sampling.max_tokens, room)
    packings = _packings(config, prompts, longest)
    longest_packing = packings[0]
    step = StepSizes(
        pack_tokens=max(packing.largest_pack for packing in packings),
        loss_tokens=max(packing.largest_loss for packing in packings),
        train_passes=longest_packing.passes,
        sequences=len(prompts) * config.training.group_size,
        sequence_tokens=longest + max(len(prompt.token_ids) for prompt in prompts),
    )
    reads_reference = resolve_algorithm(config.algorithm, with_loss=False).reads_reference
    setting = Setting(
        config=config,
        sizes=sizes,
        step=step,
        machine=machine,
        keeps_reference=reads_reference,
        reads_rows=whole is None,
    )
    return RunPlan(
        model=name,
        sizes=sizes,
        lora_rank=config.lora.rank,
        cluster=_in_words(config, machine),
        memory=plan_memory(setting),
        packings=packings,
        misfits=misfits(setting),
        notes=(*_refusals(config, module), *_whole_files(config, sizes, whole)),
    )


def this_machine(config: RunConfig, gpu_gib: float | None) -> Machine:
    """Return the machine to plan for; its memory is None for a run on GPUs of unknown size.

    Raises:
        ConfigError: `gpu_gib` is not a positive and finite number, or contradicts `device=cpu`.
    """
    native = frozenset(name for name in get_args(HardwareDtype) if has_native_matmul(torch_dtype(name)))
    if gpu_gib is not None and not 0 < gpu_gib < math.inf:
        raise ConfigError(f"--gpu-gib={gpu_gib:g} is not the memory of a GPU; give GiB, such as --gpu-gib 80")
    if gpu_gib is not None and config.device == "cpu":
        raise ConfigError("device=cpu contradicts --gpu-gib; leave out one of them")
    asked = gpu_gib is not None or config.device == "cuda" or config.cluster.needed_gpus > 0
    if config.device == "cpu" or not (asked or torch.cuda.is_available()):
        return Machine(gpu=False, memory_bytes=_host_bytes(), native_halves=native)
    if gpu_gib is not None:
        return Machine(gpu=True, memory_bytes=int(gpu_gib * GIB))
    found = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return Machine(gpu=True, memory_bytes=found)


def _host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# -- model


def model_sizes(hf_config: Any, empty: nn.Module | None = None, lora: LoraConfig = FULL) -> ModelSizes:
    """Return the sizes of a model from its transformers configuration.

    Args:
        hf_config: transformers configuration of a decoder.
        empty: its module without storage; built if absent.
        lora: its adapters.

    Raises:
        InputError: the model cannot have these adapters.
    """
    module: Any = empty or skeleton(hf_config)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in module.get_decoder().layers]
    parameters = sum(p.numel() for p in module.parameters())
    heads = hf_config.num_attention_heads
    experts = int(getattr(hf_config, "num_experts", None) or getattr(hf_config, "num_local_experts", None) or 0)
    chosen = int(getattr(hf_config, "num_experts_per_tok", 0)) if experts else 0
    resting = sum(p.numel() for name, p in module.named_parameters() if ".experts." in name)
    width = getattr(hf_config, "moe_intermediate_size", None) if experts else None
    return ModelSizes(
        parameters=parameters,
        active_parameters=parameters - (resting * (experts - chosen) // experts if experts else 0),
        layer_parameters=max(layers),
        layers=len(layers),
        hidden=hf_config.hidden_size,
        intermediate=width or hf_config.intermediate_size,
        heads=heads,
        kv_heads=hf_config.num_key_value_heads or heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        vocabulary=hf_config.vocab_size,
        tied_head=bool(hf_config.tie_word_embeddings),
        qk_norm=any(name.endswith("q_norm.weight") for name, _ in module.named_parameters()),
        experts_per_token=chosen,
        **_adapter_sizes(module, lora),
    )


def _adapter_sizes(module: Any, lora: LoraConfig) -> dict[str, int]:
    """Return the sizes of `ModelSizes` that adapters have; none without adapters."""
    if not lora.active:
        return {}
    targets = target_modules(module, lora)
    adapters = sum(lora.rank * (part.in_features + part.out_features) for part in targets.values())
    changing = with_fused([f"{name}.weight" for name in targets])
    merged = sum(p.numel() for name, p in module.named_parameters() if name in changing)
    return {"adapters": adapters, "resent": merged if lora.merge == "weights" else adapters}


def _refusals(config: RunConfig, module: nn.Module) -> tuple[str, ...]:
    """Return the reason why the trainer would refuse the model in half; see `coverage.require_covered`."""
    compute = config.precision.roles().compute_dtype
    bare = [
        f"{name} ({type(part).__name__})"
        for name, part in module.named_modules()
        if any(p.dim() > 1 for p in part.parameters(recurse=False))
        and not (type(part) in (nn.Linear, nn.Embedding) or is_replaced(part))
    ]
    if compute == "fp32" or not bare:
        return ()
    return (
        f"the trainer has no precision rule for some layers of this model in {compute}: it also multiplies by weights "
        f"in {bare[0]}; train it with precision.compute_dtype=fp32",
    )


_WHOLE: dict[WholeReason, tuple[str, str]] = {
    "format": (
        "the model's files cannot be read in parts",
        ". If that is too much, convert them once to safetensors: load the model with transformers' from_pretrained, "
        "and write it with save_pretrained",
    ),
    "conversion": (
        "transformers converts the tensors of the model's safetensors files, so these cannot be read in parts",
        ". If that is too much, convert them once: load the model with transformers' from_pretrained, and write it "
        "with save_pretrained(..., save_original_format=False)",
    ),
    "buffers": (
        "the model has buffers whose values only a whole load sets, so its files cannot be read in parts",
        ". No conversion changes that; rank 0 needs a host with room for them",
    ),
}
"""Reason for loading files whole -> beginning and end of the note on it; the end names the way out."""


def _whole_files(config: RunConfig, sizes: ModelSizes, whole: WholeReason | None) -> tuple[str, ...]:
    """Return a note on files that one rank has to load whole."""
    if whole is None or not is_sharded(config):
        return ()
    problem, fix = _WHOLE[whole]
    return (
        f"{problem}: while the ranks start, rank 0 holds all {4 * sizes.parameters / GIB:.1f} GiB of FP32 weights in "
        f"its host's memory, and sends the others their rows{fix}",
    )


# -- packing


def _packings(config: RunConfig, prompts: Sequence[Prompt], longest: int) -> tuple[Packing, ...]:
    """Pack a step at the longest completions, at half of these, and at a mixture of lengths."""
    middle, rollouts = max(1, longest // 2), len(prompts) * config.training.group_size
    mixed = [draw_int(1, longest, config.seed, place) for place in range(rollouts)]
    return (
        _packing(config, prompts, [longest] * rollouts, f"all {longest} tokens"),
        _packing(config, prompts, [middle] * rollouts, f"all {middle} tokens"),
        _packing(config, prompts, mixed, f"1 to {longest} tokens"),
    )


def _packing(config: RunConfig, prompts: Sequence[Prompt], lengths: Sequence[int], words: str) -> Packing:
    """Pack a step as training does, with completions without content."""
    each = [prompt for prompt in prompts for _ in range(config.training.group_size)]
    rollouts = [_rollout(prompt, length) for prompt, length in zip(each, lengths, strict=True)]
    batches = packs_of(rollouts, config, step=1)
    tokens = [[_tokens([rollouts[index] for index in pack]) for pack in packs] for packs in batches]
    splits = [split_lengths(lengths, config.cluster.trainers) for lengths in tokens]
    completed = [
        sum(len(rollouts[index].completion.token_ids) for index in pack) for packs in batches for pack in packs
    ]
    return Packing(
        completions=words,
        tokens=sum(map(sum, tokens)),
        packs=max(map(len, batches)),
        passes=max(split.passes for split in splits),
        balance=min(split.balance for split in splits),
        largest_pack=max(map(max, tokens)),
        largest_loss=max(completed),
    )


def _tokens(rollouts: Sequence[Rollout]) -> int:
    """Return the tokens of a pack: siblings share their prompt, and a completion's last token is left out."""
    prompts = {rollout.prompt.token_ids for rollout in rollouts}
    return sum(map(len, prompts)) + sum(len(rollout.completion.token_ids) - 1 for rollout in rollouts)


def _rollout(prompt: Prompt, length: int) -> Rollout:
    completion = Completion(
        token_ids=(0,) * length, behavior_logprobs=(0.0,) * length, finish_reason="stop", policy_version=0
    )
    return Rollout(prompt=prompt, completion=completion, text="", reward=0.0)


def _in_words(config: RunConfig, machine: Machine) -> str:
    cluster, device = config.cluster, "GPU" if machine.gpu else "CPU"
    if cluster.backend == "local":
        return f"one process on one {device}"
    place = "on the same devices" if cluster.placement == "colocated" else "on devices of their own"
    return f"Ray: {cluster.processes} on {device}s, engines {place}"
