"""Trackers of runs, such as W&B: each in a process of its own, which can neither stop nor slow the run."""
