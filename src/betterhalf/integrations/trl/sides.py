"""Precision contract of a TRL run: the formats in which trainer and sampler really compute, and their weights.

`fp16=True` says little: on a CPU accelerate then enters no autocast, and a colocated vLLM takes the format of the
checkpoint. So the formats are read from the output of a layer, from the cache and from the weights of the engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from betterhalf.integrations.trl.checks import Sampler
from betterhalf.integrations.trl.watch import Drawn
from betterhalf.precision.contract import Contract, SideReport, compare, weights_digests
from betterhalf.precision.formats import dtype_name, most_common_dtype
from betterhalf.rollout.vllm import weights as vllm_weights
from betterhalf.types import DtypeName

if TYPE_CHECKING:
    from trl import GRPOTrainer

_WHOLE = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
"""Kinds of training in which each process holds whole parameters."""


def read_contract(trainer: GRPOTrainer, sampler: Sampler, compute: torch.dtype, drawn: Drawn | None) -> Contract | None:
    """Compare trainer and sampler; every process has to call it. None for a sampler that cannot be read.

    Args:
        trainer: has sampled and scored a batch since its last update.
        sampler: program that samples.
        compute: format in which the trainer computed while it scored.
        drawn: what was seen of `generate`; None for other samplers.
    """
    if sampler == "rollout_func":
        return None
    name = dtype_name(compute)
    digests = _sent_digests(trainer, compute)
    mine = _trainer_side(trainer, name, digests)
    if drawn is not None:
        theirs = _generate_side(
            trainer, drawn, digests if drawn.compute == compute else _sent_digests(trainer, drawn.compute)
        )
    elif sampler == "vllm colocate":
        theirs = _colocated_side(trainer.vllm_generation)
    else:
        theirs = _server_side(trainer.vllm_generation.vllm_client.get_server_info())
    found = compare(mine, theirs, allow_difference=False)
    return found if mine.digests and theirs.digests else _without_weights(found)


def _trainer_side(trainer: GRPOTrainer, compute: DtypeName, digests: dict[str, str]) -> SideReport:
    accelerator, config = trainer.accelerator, trainer.model.config
    held = dtype_name(most_common_dtype(trainer.model.parameters()))
    return SideReport(
        side="trainer",
        dtypes={"weights": held, "compute": compute, "wire": compute, "master": held},
        facts={
            "attention": str(config.get_text_config()._attn_implementation),
            "autocast": accelerator.mixed_precision if accelerator.native_amp else "none",
            "loss_scaler": "none" if accelerator.scaler is None else type(accelerator.scaler).__name__,
            "trl": version("trl"),
            "transformers": version("transformers"),
            "accelerate": version("accelerate"),
            "device": str(accelerator.device),
        },
        digests=digests,
    )


def _generate_side(trainer: GRPOTrainer, drawn: Drawn, digests: dict[str, str] | None) -> SideReport:
    """Return the report of `generate`: it holds the trainer's own weights, and rounds them as its passes need them.

    Under autocast the keys, which rope has widened, are cached in FP32, and attention rounds them to its format once,
    as it does in the trainer's passes.

    Args:
        trainer: its model samples.
        drawn: what was seen.
        digests: those of the trainer, if it computes in the same format; None if they have to be taken.
    """
    compute, cached, autocast = dtype_name(drawn.compute), dtype_name(drawn.kv), trainer.accelerator.native_amp
    held = dtype_name(most_common_dtype(trainer.model.parameters()))
    return SideReport(
        side="engine",
        dtypes={"weights": held, "compute": compute, "wire": compute, "kv": compute if autocast else cached},
        facts={
            "engine": "transformers generate, with the trainer's own weights",
            "kv_cache": cached,
            "attention": str(trainer.model.config.get_text_config()._attn_implementation),
            "device": str(trainer.accelerator.device),
        },
        digests=_sent_digests(trainer, drawn.compute) if digests is None else digests,
    )


def _colocated_side(generation: Any) -> SideReport:
    """Return the report of a vLLM in this process, from its live tensors; asleep, it has no weights to compare."""
    runner = generation.llm.llm_engine.model_executor.driver_worker.model_runner
    model, config = runner.get_model(), runner.vllm_config
    held = dtype_name(vllm_weights.projection_dtype(model))
    attention = vllm_weights.attention_layer(config)
    return SideReport(
        side="engine",
        dtypes={"weights": held, "compute": held, "wire": held, "kv": dtype_name(attention.kv_cache.dtype)},
        facts={
            "engine": "vLLM, colocated",
            "attention": f"vLLM {attention.attn_backend.get_name()}",
            "logprobs": str(config.model_config.logprobs_mode),
            "device": str(next(model.parameters()).device),
        },
        digests={} if generation.enable_sleep_mode else weights_digests(vllm_weights.held(model)),
    )


def _server_side(info: dict[str, Any]) -> SideReport:
    """Return the report of a vLLM server, from the configuration that it has resolved; it shows no weights."""
    compute = dtype_name(getattr(torch, str(info["model_config"]["dtype"]).removeprefix("torch.")))
    cache = str(info["cache_config"]["cache_dtype"])
    named = getattr(torch, cache, None)
    # A format of eight bits has no name here; it is shown as it is, and differs from every compute format.
    kv = compute if cache == "auto" else dtype_name(named) if named is not None else cast(DtypeName, cache)
    return SideReport(
        side="engine",
        dtypes={"weights": compute, "compute": compute, "wire": compute, "kv": kv},
        facts={"engine": "vLLM server", "logprobs": str(info["model_config"]["logprobs_mode"])},
        digests={},
    )


def _sent_digests(trainer: GRPOTrainer, compute: torch.dtype) -> dict[str, str]:
    """Return the digest of each weight, rounded once to `compute`; empty for sharded weights."""
    if trainer.accelerator.distributed_type not in _WHOLE:
        return {}
    return weights_digests((name, tensor.to(compute)) for name, tensor in _sent(trainer))


def _sent(trainer: GRPOTrainer) -> Iterable[tuple[str, Tensor]]:
    """Return the weights under the names that vLLM is sent, or the parameters if there is no vLLM."""
    if trainer.use_vllm:
        sent: Iterable[tuple[str, Tensor]] = trainer.vllm_generation._iter_named_params()
        return sent
    return ((name, parameter.detach()) for name, parameter in trainer.model.named_parameters())


def _without_weights(contract: Contract) -> Contract:
    """Return the contract without the row of the weights, which were not compared."""
    rows = tuple(row for row in contract.rows if row.region != "weights")
    first = None if all(row.status != "differs" for row in rows) else contract.first_difference
    return replace(contract, rows=rows, first_difference=first)
