"""The wing of mu: engines that sample completions, and report what they really run."""
