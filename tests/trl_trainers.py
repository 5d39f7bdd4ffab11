"""Small GRPO trainers of TRL on a CPU, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from betterhalf.config.schema import ModelConfig
from betterhalf.models.loading import load_model

PROMPTS = ("1+2", "3+4", "15+6", "2+2")


def distinct_characters(completions: list[str], **_columns: Any) -> list[float]:
    """Reward the number of distinct characters, which differs between siblings."""
    return [float(len(set(text))) for text in completions]


def grpo_trainer(folder: Path, dtype: str = "fp32", *, scale: float | None = 2.0**16, **changes: Any) -> Any:
    """Return a trainer of the smallest demo model: 4 completions of 2 prompts, and 2 optimizer steps for each batch.

    Args:
        folder: TRL's own files.
        dtype: `fp16`, `bf16` or `fp32`; the weights are FP32, and passes run under autocast.
        scale: first loss scale in FP16; None leaves FP16 as accelerate has it on a CPU, without autocast and scaler.
        changes: arguments of `GRPOConfig`, `reward_funcs` and `rollout_func`.
    """
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    model = load_model(ModelConfig(name="demo-small"))
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(model.stop_token_ids[0])
    functions = {name: changes.pop(name) for name in ("rollout_func",) if name in changes}
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-4,
        "fp16": dtype == "fp16",
        "bf16": dtype == "bf16",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    trainer = GRPOTrainer(
        model=model.module,
        reward_funcs=distinct_characters,
        args=GRPOConfig(**settings | changes),
        train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}),
        processing_class=model.tokenizer,
        **functions,
    )
    trainer.remove_callback(PrinterCallback)
    if dtype == "fp16" and scale is not None:
        autocast_in_fp16(trainer, scale)
    return trainer


def autocast_in_fp16(trainer: Any, scale: float = 2.0**16) -> None:
    """Give a trainer on a CPU the FP16 autocast and the loss scale that accelerate leaves out there."""
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
