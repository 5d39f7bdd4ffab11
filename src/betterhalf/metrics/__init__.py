"""Metrics of a run: their catalogue, and the views that show them."""
