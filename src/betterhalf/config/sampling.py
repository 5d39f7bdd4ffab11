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
    """Sample from the most likely tokens that together reach this probability. Training with this or one of the next
    two scores the same truncated distribution and needs the native engine; `probe` and `doctor` refuse them."""
    top_k: int = Field(-1, ge=-1)
    """Number of most likely tokens to sample from; -1 or 0 for all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Smallest probability of a token to sample, as a share of the largest one."""

    @property
    def truncates(self) -> bool:
        """True if some tokens cannot be sampled."""
        return bool(_truncations(self))


def require_whole_distribution(sampling: SamplingConfig) -> None:
    """Refuse truncated sampling where logprobs of the whole distribution are compared.

    Raises:
        ConfigError: `top_p`, `top_k` or `min_p` truncates; the message gives its neutral value.
    """
    for setting, neutral in _truncations(sampling):
        raise ConfigError(
            f"{setting} truncates the distribution of the samples, but this verb compares logprobs of the whole "
            f"distribution; set {neutral}. `betterhalf train` and `betterhalf evaluate` can truncate."
        )


def require_support(sampling: SamplingConfig, engine: str, *, reports_support: bool) -> None:
    """Refuse truncated sampling in training with an engine that does not report what it truncated to.

    Args:
        sampling: the settings.
        engine: `engine.type`.
        reports_support: True if the engine's completions come with the tokens that could be drawn.

    Raises:
        ConfigError: `top_p`, `top_k` or `min_p` truncates; the message gives its neutral value.
    """
    for setting, neutral in () if reports_support else _truncations(sampling):
        raise ConfigError(
            f"{setting} truncates the distribution of the samples, and the trainer must score the same distribution, "
            f"but engine.type={engine} does not report which tokens it kept, so every importance ratio would be "
            f"biased. Set engine=native, which reports them, or {neutral}."
        )


def _truncations(sampling: SamplingConfig) -> list[tuple[str, str]]:
    """Return `sampling.key=value` of each setting that truncates, as it is and with its neutral value."""
    settings: tuple[tuple[str, bool, float], ...] = (
        ("top_p", sampling.top_p < 1, 1.0),
        ("top_k", sampling.top_k > 0, -1),
        ("min_p", sampling.min_p > 0, 0.0),
    )
    return [
        (f"sampling.{key}={getattr(sampling, key)}", f"sampling.{key}={neutral}")
        for key, truncates, neutral in settings
        if truncates
    ]
