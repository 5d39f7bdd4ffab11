CKPT_ARGS=(
   --hf-checkpoint /root/Qwen3-4B
   #--hf-checkpoint /root/Qwen3-4B-FP8
)
MISC_ARGS=(
   --fp16
   --accumulate-allreduce-grads-in-fp32
   --attention-softmax-in-fp32
)
RUNTIME_ENV_JSON="{
  \"env_vars\": {\"PYTHONPATH\": \"/root/Megatron-LM/\"}
}"
ray job submit --runtime-env-json="${RUNTIME_ENV_JSON}" -- python3 train.py \
   --num-rollout 3000 \
   ${CKPT_ARGS[@]} \
   ${MISC_ARGS[@]}
