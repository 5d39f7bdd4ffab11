"""Measurements of the difference between trainer and engine: pure maths; nothing here runs a model."""
