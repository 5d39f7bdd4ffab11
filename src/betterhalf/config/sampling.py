"""The section `[sampling]`, and a check that sampling draws from the whole distribution."""

from __future__ import annotations

from pydantic import Field

from betterhalf.config.section import Section
from betterhalf.errors import ConfigError


class SamplingConfig(Section):
    """Sampling of completions."""

    temperature: float = Field(1.0, gt=0)
    """Sampling temperature: trainer and engine divide logits by it before the log-softmax."""
    max_tokens: int = Field(64, ge=1)
    """Maximum length of a completion, in tokens."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the most likely tokens that together reach this probability. For `evaluate` only, as are the next
    two: the trainer's logprobs are those of the whole distribution."""
    top_k: int = Field(-1, ge=-1)
    """Number of most likely tokens to sample from; -1 or 0 for all. For `evaluate` only."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Smallest probability of a token to sample, as a share of the largest one. For `evaluate` only."""


def require_whole_distribution(sampling: SamplingConfig) -> None:
    """Refuse truncated sampling for a run that compares the trainer's logprobs with the engine's.

    Raises:
        ConfigError: `top_p`, `top_k` or `min_p` truncates; the message gives its neutral value.
    """
    for key, truncates, neutral in (
        ("top_p", sampling.top_p < 1, 1.0),
        ("top_k", sampling.top_k > 0, -1),
        ("min_p", sampling.min_p > 0, 0.0),
    ):
        if truncates:
            raise ConfigError(
                f"sampling.{key}={getattr(sampling, key)} truncates the distribution of the samples, but the "
                "trainer's logprobs are those of the whole distribution, which biases every importance ratio. Set it "
                f"to {neutral}, or use it with `betterhalf evaluate` only."
            )
