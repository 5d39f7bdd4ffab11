"""A GRPO run of TRL with a vLLM in its own process, on a CPU: `python -m tests.trl_colocated FOLDER CHECKPOINT DTYPE`.

TRL itself builds the engine and samples with it. Its weight sync alone is replaced: it calls `load_weights` of vLLM's
model, which fails on a CPU, where vLLM has packed the weights away; vLLM's own reload loads the same names and tensors.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tests.trl_trainers import PROMPTS, autocast_in_fp16, distinct_characters

from betterhalf.config.schema import ModelConfig
from betterhalf.models.loading import load_model
from betterhalf.rollout.vllm.weights import repack_tied_head


def saved_model(folder: Path, dtype: str) -> str:
    """Save the smallest demo model in `dtype`, and return its folder."""
    model = load_model(ModelConfig(name="demo-small"))
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(model.stop_token_ids[0])
    model.module.to(getattr(torch, dtype)).save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return str(folder)


def reload(generation: Any) -> None:
    """Send the trainer's weights to vLLM under TRL's names, in the place of TRL's `sync_weights`."""
    wrapper = generation.llm.llm_engine.model_executor.driver_worker
    wrapper.worker.reload_weights(weights_iterator=iter(generation._iter_named_params()))
    repack_tied_head(wrapper.model_runner.get_model())
    generation.llm.reset_prefix_cache()


def main(folder: Path, checkpoint: str, dtype: str) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from betterhalf.integrations.trl import BetterhalfCallback

    trainer = GRPOTrainer(
        model=saved_model(folder / "model", checkpoint),
        reward_funcs=distinct_characters,
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            max_steps=4,
            per_device_train_batch_size=4,
            steps_per_generation=2,
            num_generations=4,
            max_completion_length=12,
            learning_rate=1e-4,
            fp16=dtype == "fp16",
            bf16=dtype == "bf16",
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=64,
            vllm_gpu_memory_utilization=0.1,
        ),
        train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}),
    )
    if dtype == "fp16":
        autocast_in_fp16(trainer)
    trainer.vllm_generation.sync_weights = lambda: reload(trainer.vllm_generation)
    trainer.add_callback(BetterhalfCallback(trainer, folder / "run", rollouts_per_step=8))
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
