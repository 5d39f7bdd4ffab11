"""The trainer, which computes the policy pi: packing, FP32 master weights, schedules and checkpoints."""
