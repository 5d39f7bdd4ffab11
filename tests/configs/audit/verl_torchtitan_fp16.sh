#!/usr/bin/env bash
# The dtype of torchtitan's section, which verl never hands on.
python3 -m verl.trainer.main_ppo \
    model_engine=torchtitan \
    actor_rollout_ref.actor.torchtitan.dtype=float16 \
    actor_rollout_ref.rollout.dtype=float16
