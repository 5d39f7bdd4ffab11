"""Tasks: where prompts come from, and what earns a reward."""
