"""Whole runs, where trainer and engine meet: the loop, weight sync, training, evaluation and the sanity test."""
