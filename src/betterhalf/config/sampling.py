"""The section `[sampling]`, and the refusal of truncated sampling where logprobs are compared."""

from __future__ import annotations

from pydantic import Field

from betterhalf.config.section import Section
from betterhalf.errors import ConfigError


class SamplingConfig(Section):
    """Sampling of completions."""

    temperature: float = Field(1.0, gt=0)
    """Logits are divided by this, on both sides, before the log-softmax."""
    max_tokens: int = Field(64, ge=1)
    """Length limit of a completion."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that together reach this probability. For `evaluate` only, as the next two: a
    trainer scores the whole distribution."""
    top_k: int = Field(-1, ge=-1)
    """Sample from this many of the likeliest tokens; -1 or 0 for all. For `evaluate` only."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Sample from tokens at least this share as likely as the likeliest. For `evaluate` only."""


def require_whole_distribution(sampling: SamplingConfig) -> None:
    """Refuse truncated sampling where the trainer's logprobs are compared with the engine's.

    Raises:
        ConfigError: names the key and its neutral value.
    """
    for key, truncates, neutral in (
        ("top_p", sampling.top_p < 1, 1.0),
        ("top_k", sampling.top_k > 0, -1),
        ("min_p", sampling.min_p > 0, 0.0),
    ):
        if truncates:
            raise ConfigError(
                f"sampling.{key}={getattr(sampling, key)} truncates the distribution sampled from, but the trainer "
                f"scores the whole one, which biases every importance ratio; set it to {neutral}, or use it with "
                "`betterhalf evaluate` alone"
            )
