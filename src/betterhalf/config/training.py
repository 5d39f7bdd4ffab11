"""The section `[training]`: sizes of a step, memory, checkpoints."""

from __future__ import annotations

from pydantic import Field

from betterhalf.config.section import Section
from betterhalf.types import BestName


class TrainingConfig(Section):
    """Sizes of a step, memory, and checkpoints."""

    steps: int = Field(100, ge=1)
    """Number of steps; each trains on one rollout batch."""
    prompts_per_step: int = Field(32, ge=1)
    """Number of prompts in a step."""
    group_size: int = Field(8, ge=1)
    """Number of completions of each prompt."""
    optimizer_steps: int = Field(4, ge=1)
    """Number of optimizer steps in one pass over a rollout batch (the paper: 4)."""
    epochs: int = Field(1, ge=1)
    """Number of passes over each rollout batch, each in a new order; `optimizer_steps` are those of one pass."""
    tokens_per_micro_batch: int = Field(4096, ge=1)
    """Token budget of one forward-backward pass; a longer sequence gets its own pass."""
    logits_mib: int = Field(256, ge=1)
    """Memory for FP32 logits, in MiB; logprobs are computed in chunks that fit into it."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    compile_layers: bool = False
    """Compile the trainer's layers with torch.compile, which fuses norms, rope and SwiGLU and keeps every rounding to
    half. The first steps take up to a minute longer. Needs a C++ compiler on a CPU."""
    checkpoint_every: int = Field(10, ge=0)
    """Number of steps between checkpoints; 0 saves only the last."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of checkpoints to keep; older ones are deleted, once a new one is whole."""
    keep_best_metric: str | None = None
    """Name of a metric of each step, such as `rollout/reward/mean`: of the checkpoints that are written, the one with
    its best value is kept as well. `evaluate.keep_best` does the same for evaluations."""
    keep_best_mode: BestName = "highest"
    """Best value of `keep_best_metric`: the highest, or the lowest."""
