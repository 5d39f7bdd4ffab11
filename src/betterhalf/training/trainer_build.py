"""Preparation of a transformers module for the trainer: layers, islands, attention, and checks of what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from betterhalf.config.schema import RunConfig
from betterhalf.models import tiled_attention
from betterhalf.models.attention import attention_name, use_packed_attention
from betterhalf.precision import coverage, tiled_products
from betterhalf.precision.cpu_activations import use_cpu_activations
from betterhalf.precision.cpu_embedding import use_cpu_embedding
from betterhalf.precision.cpu_linear import CpuLinear, use_cpu_linear
from betterhalf.precision.experts import use_experts
from betterhalf.precision.island_hooks import use_islands
from betterhalf.precision.islands import Islands
from betterhalf.precision.roles import Precision
from betterhalf.precision.routing import RoutingTape
from betterhalf.training.model_limits import head_dim_of, require_no_dropout


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Facts about a prepared module."""

    attention: str
    """Name of its attention implementation."""
    layers: Mapping[str, nn.Linear | CpuLinear]
    """Name -> linear layer, without the LM head."""
    routing: RoutingTape | None
    """Tape of the routers; None without experts."""


def prepare_module(module: Any, config: RunConfig, precision: Precision, islands: Islands) -> Prepared:
    """Replace layers and attention of a module, in place, for the precision of a run.

    It is done before a weight store takes the parameters over: the store of a rank changes the classes of modules and
    exchanges their parameters in every pass.

    Args:
        module: transformers causal language model with FP32 parameters, on its final device.
        config: of the run.
        precision: of the run.
        islands: those of this module.

    Raises:
        InputError: the model has dropout, which would make pi random; it lacks an FP32 island of the configuration; it
            computes in half where no precision rule covers it; or this processor cannot compute exactly.
    """
    require_no_dropout(module.config)
    use_cpu_linear(module, precision, islands)
    use_cpu_embedding(module, precision)
    routing = use_experts(module, precision)
    if precision.exact:
        use_cpu_activations(module)
        _require_exact(module)
    # After the replacements, which would lose the hooks of an island's linear layer.
    use_islands(module, islands, precision.compute_dtype)
    coverage.require_covered(module, precision)
    sums = precision.fp32_sums(precision.roles.compute_dtype)
    attention = attention_name(precision.device, head_dim_of(module.config), fp32_sums=sums, exact=precision.exact)
    use_packed_attention(module, attention, compiled=config.training.compile_layers)
    if config.training.activation_checkpointing:
        # transformers 5.24 renamed this method.
        enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        module.train()
    layers = coverage.linear_layers(module, module.get_output_embeddings())
    return Prepared(attention=attention, layers=layers, routing=routing)


def _require_exact(module: Any) -> None:
    """Check that this processor computes head and attention independently of the batch, as `CpuLinear` does.

    Raises:
        InputError: it does not.
    """
    vocabulary, hidden = module.get_output_embeddings().weight.shape
    tiled_products.block_sizes(vocabulary, hidden, torch.get_num_threads())
    tiled_attention.block_sizes(head_dim_of(module.config), torch.get_num_threads())
