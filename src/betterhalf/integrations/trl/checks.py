"""Checks of a TRL trainer before training: one whose mismatch cannot be measured is refused, with the fix."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal

from betterhalf.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from trl import GRPOTrainer

RELEASE = "1.16"
"""Release of TRL that this package was written for: it reads private attributes, which the next may change."""

Sampler = Literal["vllm colocate", "vllm server", "generate", "rollout_func"]
"""Program that draws the completions of a `GRPOTrainer`."""

_NEUTRAL = {"top_p": (1.0,), "top_k": (0, -1, None), "min_p": (0.0, None), "repetition_penalty": (1.0, None)}
"""Settings with which the sampler draws from the whole distribution of the model."""

_HARMLESS = (
    *("seed", "stop", "stop_strings", "stop_token_ids", "eos_token_id", "max_tokens", "max_new_tokens", "use_cache"),
)
"""Keys of `generation_kwargs` that do not change the distribution of a token."""


def check_installed() -> None:
    """Refuse a missing TRL, or one of another release.

    Raises:
        MissingExtraError: TRL is not installed.
        InputError: it is another release.
    """
    try:
        found = version("trl")
    except PackageNotFoundError as error:
        raise MissingExtraError(
            "the callback needs the package trl, which is not installed. Install it with pip install 'betterhalf[trl]'."
        ) from error
    if found.split(".")[:2] != RELEASE.split("."):
        raise InputError(
            f"the callback was written for TRL {RELEASE} and reads private attributes of its trainer, but TRL {found} "
            "is installed. Install it with pip install 'betterhalf[trl]'."
        )


def check_trainer(trainer: GRPOTrainer, record_generate: bool) -> Sampler:
    """Return the program that samples for a trainer, or refuse the trainer.

    Args:
        trainer: a `GRPOTrainer` before its training.
        record_generate: note the logprobs of transformers' `generate`, which TRL does not keep.

    Raises:
        InputError: there are no logprobs of the sampler, they are of another distribution than the trainer's, or the
            loss scale cannot be read.
    """
    from trl import GRPOTrainer

    if not isinstance(trainer, GRPOTrainer):
        raise InputError(
            f"the callback measures a GRPOTrainer of TRL, not a {type(trainer).__name__}. Pass "
            "BetterhalfCallback(trainer, run_dir) the trainer that it is added to."
        )
    if trainer.is_deepspeed_enabled:
        raise InputError("DeepSpeed keeps a loss scale of its own, which the callback cannot read. Use DDP or FSDP.")
    _check_distribution(trainer)
    return _sampler(trainer, record_generate)


def _check_distribution(trainer: GRPOTrainer) -> None:
    """Refuse sampling from another distribution than the one whose logprobs the trainer computes."""
    changed = {name: value for name in _NEUTRAL if (value := getattr(trainer, name)) not in _NEUTRAL[name]}
    more = {"vllm_structured_outputs_regex": trainer.args.vllm_structured_outputs_regex}
    more |= trainer.args.generation_kwargs or {}
    changed |= {name: value for name, value in more.items() if value is not None and name not in _HARMLESS}
    if changed:
        settings = ", ".join(f"{name}={value}" for name, value in changed.items())
        raise InputError(
            f"with {settings} TRL samples from another distribution than the one its trainer computes logprobs of, and "
            "the callback would measure that difference. Remove these settings from GRPOConfig; temperature may stay."
        )


def _sampler(trainer: GRPOTrainer, record_generate: bool) -> Sampler:
    found = _sampler_with_logprobs(trainer)
    if found is not None:
        if record_generate:
            raise InputError(f"record_generate=True has no effect: {found} samples, not generate. Leave it out.")
        return found
    if trainer.use_transformers_continuous_batching:
        raise InputError(
            "continuous batching of transformers gives no logprobs of the sampler, so there is no mismatch to measure. "
            "Set use_vllm=True; or use_transformers_continuous_batching=False, and record_generate=True here."
        )
    if trainer.tools and record_generate:
        raise InputError(
            "record_generate=True notes one call of generate for each batch, and tools make several. Set use_vllm=True."
        )
    if not record_generate:
        raise InputError(
            "TRL samples with transformers' generate and keeps no logprobs of this sampler, so there is no mismatch to "
            "measure. Set use_vllm=True in GRPOConfig, or pass record_generate=True, which notes them token by token."
        )
    return "generate"


def _sampler_with_logprobs(trainer: GRPOTrainer) -> Sampler | None:
    """Return the sampler if TRL gets logprobs from it; None for those of transformers."""
    if trainer.rollout_func is not None:
        return "rollout_func"
    if not trainer.use_vllm:
        return None
    if trainer.vllm_mode == "colocate":
        return "vllm colocate"
    mode = trainer.vllm_generation.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise InputError(
            f"the vLLM server returns {mode}, which leave out the temperature. Start it with --logprobs-mode "
            "processed_logprobs."
        )
    return "vllm server"
