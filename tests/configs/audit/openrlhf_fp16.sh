ray job submit --address="http://127.0.0.1:8265" -- python3 -m openrlhf.cli.train_ppo_ray \
   --actor.model_name_or_path Qwen/Qwen3-4B \
   --vllm.num_engines 4 \
   --ds.zero_stage 3 \
   --ds.param_dtype fp16 \
   --rollout.batch_size 128
