PRECISION=(
    actor_rollout_ref.actor.megatron.dtype=float16
    actor_rollout_ref.ref.megatron.dtype=float16   # the reference policy
    actor_rollout_ref.rollout.dtype=float16
)
python3 -m verl.trainer.main_ppo --config-name=ppo_megatron_trainer.yaml \
    actor_rollout_ref.rollout.name=vllm "${PRECISION[@]}"
