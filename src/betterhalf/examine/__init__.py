"""Examine a model without training it: `probe`, `doctor` and their parts."""
