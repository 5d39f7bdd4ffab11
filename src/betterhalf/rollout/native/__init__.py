"""The native rollout engine: a small decoder with fused projections, a slot KV cache and continuous batching."""
