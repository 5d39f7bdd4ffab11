"""Metrics of a run: their catalogue, the sinks that keep them, and the views that show them."""
