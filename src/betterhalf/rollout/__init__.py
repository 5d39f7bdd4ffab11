"""Rollout engines: they sample completions from the behavior policy mu and report what they really run."""
