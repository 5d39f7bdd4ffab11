"""The native engine: a small decoder of its own, with fused projections, a slot KV cache and continuous batching."""
