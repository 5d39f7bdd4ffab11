"""betterhalf: reinforcement-learning fine-tuning of language models in one proven precision."""

__version__ = "0.1.0"
