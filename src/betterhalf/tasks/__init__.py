"""Tasks: sources of prompts, and the rewards for completions."""
