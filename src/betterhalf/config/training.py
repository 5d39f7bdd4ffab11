"""The section `[training]`."""

from __future__ import annotations

from pydantic import Field

from betterhalf.config.section import Section


class TrainingConfig(Section):
    """Sizes of a step, and what is saved."""

    steps: int = Field(100, ge=1)
    """Steps of the run; each is one rollout batch."""
    prompts_per_step: int = Field(32, ge=1)
    """Prompts sampled in a step."""
    group_size: int = Field(8, ge=1)
    """Siblings of each prompt."""
    optimizer_steps: int = Field(4, ge=1)
    """Optimizer steps for each rollout batch (the paper: 4)."""
    tokens_per_micro_batch: int = Field(4096, ge=1)
    """Token budget of one forward-backward; a longer sequence gets a pack of its own."""
    logits_mib: int = Field(256, ge=1)
    """Memory for FP32 logits; logprobs are computed in chunks that fit, never for all tokens at once."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    compile_layers: bool = False
    """Compile the trainer's layers with torch.compile, which fuses norms, rope and SwiGLU; roundings to half are kept.
    The first steps take up to a minute longer. On a CPU it needs a C++ compiler."""
    checkpoint_every: int = Field(10, ge=0)
    """Steps between checkpoints; 0 saves only the last."""
    keep_checkpoints: int = Field(2, ge=1)
    """Older checkpoints are deleted."""
