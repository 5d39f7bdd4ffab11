"""The wing of pi: packing, the trainer with FP32 master weights, schedules and checkpoints."""
