#!/usr/bin/env bash
# The key that fsdp.yaml documents, which the FSDP engine never reads.
set -x
MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="$HOME/data/gsm8k/train.parquet" \
    actor_rollout_ref.model.path=$MODEL \
    actor_rollout_ref.actor.fsdp_config.dtype=float16 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.dtype=float16 "$@"
