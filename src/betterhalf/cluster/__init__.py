"""Ranks and engines in processes of their own, started, placed and supervised by Ray."""
