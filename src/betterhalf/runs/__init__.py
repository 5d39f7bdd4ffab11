"""Whole runs, where both wings meet: the loop, weight sync, training, evaluation and the sanity test."""
