uv run --isolated -m skyrl.train.entrypoints.main_base trainer.strategy=megatron \
  trainer.policy.model.path=Qwen/Qwen3-8B generator.inference_engine.num_engines=4
