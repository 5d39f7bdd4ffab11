"""One rollout batch of TRL after it is sampled and scored, before any update: tensors of all processes, and rewards.

Axes: B completions, L positions of a completion, padding included.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from betterhalf.api.tensors import fit_budget, mismatch_metrics
from betterhalf.diagnostics.budget import budget_metrics
from betterhalf.errors import InputError

if TYPE_CHECKING:
    from trl import GRPOTrainer

_FORWARD = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles"),
    *("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
)
"""Entries of TRL's batch that its forward pass takes beside the tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch:
    """Completions of all processes, in TRL's order."""

    trainer_logprobs_BL: Tensor
    """log pi of each token, before any update."""
    behavior_logprobs_BL: Tensor
    """log mu of each token, as the sampler gave it."""
    mask_BL: Tensor
    """bool: sampled tokens with a finite behavior logprob."""
    lengths_B: Tensor
    """Number of sampled tokens of each completion."""
    truncated_B: Tensor
    """bool: the completion ended at the length limit."""
    rewards_B: tuple[float, ...]
    """Weighted sum of TRL's rewards; NaN where no reward function scored the completion."""
    advantages_B: tuple[float, ...]
    """Advantages as TRL computed them."""
    group_size: int
    """Completions for each prompt."""

    @property
    def unscored(self) -> int:
        """Number of sampled tokens that the sampler gave no finite logprob for; they are not measured."""
        return int(self.lengths_B.sum()) - int(self.mask_BL.sum())

    def metrics(self) -> dict[str, float]:
        """Return `mismatch/*`, `budget/*` and `rollout/*`.

        Raises:
            NumericsError: logprobs of the trainer are not finite.
        """
        both = self.trainer_logprobs_BL, self.behavior_logprobs_BL, self.mask_BL
        return {**mismatch_metrics(*both), **budget_metrics(fit_budget(*both)), **self._rollout_metrics()}

    def _rollout_metrics(self) -> dict[str, float]:
        rewards = [reward for reward in self.rewards_B if math.isfinite(reward)]
        zero = torch.tensor(self.advantages_B).view(-1, self.group_size).eq(0).all(dim=1)
        lengths = self.lengths_B.double()
        return {
            "rollout/reward/mean": statistics.fmean(rewards) if rewards else math.nan,
            "rollout/reward/std": statistics.pstdev(rewards) if rewards else math.nan,
            "rollout/length/mean": float(lengths.mean()),
            "rollout/length/max": float(lengths.max()),
            "rollout/truncated_fraction": float(self.truncated_B.double().mean()),
            "rollout/zero_advantage_fraction": float(zero.double().mean()),
        }


def scored_batch(
    trainer: GRPOTrainer, output: Mapping[str, Any], trainer_logprobs_BL: Tensor, drawn_BL: Tensor | None
) -> ScoredBatch:
    """Return the batch of all processes; every process has to call it.

    Args:
        trainer: has just made the batch.
        output: entries of the batch of this process, from TRL's `_generate_and_score_completions`.
        trainer_logprobs_BL: of `output`, from `trainer_logprobs`.
        drawn_BL: logprobs that were noted while `generate` drew the tokens; None if TRL has those of its sampler.

    Raises:
        InputError: neither TRL nor `generate` gave logprobs of the sampler.
    """
    sampled_BL = output["completion_mask"].bool()
    if "tool_mask" in output:
        sampled_BL = sampled_BL & output["tool_mask"].bool()
    behavior_BL = _behavior(output, drawn_BL, sampled_BL)
    columns = (trainer_logprobs_BL, behavior_BL.to(trainer_logprobs_BL.device), sampled_BL)
    trainer_BL, behavior_BL, sampled_BL = (_of_all(trainer, column) for column in columns)
    truncated_B = trainer.accelerator.gather(_truncated(trainer, output))
    count = len(trainer_BL)
    return ScoredBatch(
        trainer_logprobs_BL=trainer_BL,
        behavior_logprobs_BL=behavior_BL,
        mask_BL=sampled_BL & behavior_BL.isfinite(),
        lengths_B=sampled_BL.sum(dim=1),
        truncated_B=truncated_B,
        rewards_B=_rewards(trainer, count),
        advantages_B=tuple(trainer._logs["advantages"])[-count:],
        group_size=trainer.num_generations,
    )


@torch.no_grad()
def trainer_logprobs(trainer: GRPOTrainer, output: Mapping[str, Any]) -> Tensor:
    """Return log pi of the completions of this process before any update, [B, L].

    TRL has them, unless each update follows a rollout batch of its own (`gradient_accumulation_steps` is a multiple of
    `steps_per_generation * num_iterations`) and it corrects no mismatch to vLLM. Then this costs one more forward pass.
    """
    known: Tensor | None = output.get("old_per_token_logps")
    if known is not None:
        return known
    from trl.models.utils import disable_gradient_checkpointing

    tokens = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    with disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        found: Tensor = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            tokens,
            mask,
            output["completion_ids"].size(1),
            batch_size=trainer.args.per_device_train_batch_size,
            **{name: output[name] for name in _FORWARD if name in output},
        )[0]
    return found


def _behavior(output: Mapping[str, Any], drawn_BL: Tensor | None, sampled_BL: Tensor) -> Tensor:
    known: Tensor | None = output.get("sampling_per_token_logps")
    if known is not None:
        return known
    if drawn_BL is None:
        raise InputError(
            "the batch has no logprobs of its sampler. Return `logprobs` from rollout_func, or set use_vllm=True."
        )
    # `generate` stops with the longest completion of this process; `pad_to_multiple_of` makes TRL's tensors wider.
    width = sampled_BL.size(1)
    return torch.nn.functional.pad(drawn_BL[:, :width], (0, max(0, width - drawn_BL.size(1))))


def _of_all(trainer: GRPOTrainer, values_BL: Tensor) -> Tensor:
    """Return the rows of all processes, padded to one length."""
    accelerator = trainer.accelerator
    found: Tensor = accelerator.gather(accelerator.pad_across_processes(values_BL, dim=1))
    return found


def _truncated(trainer: GRPOTrainer, output: Mapping[str, Any]) -> Tensor:
    """Return True for each completion of this process that does not end with a stop token, as TRL counts them."""
    last_B = output["completion_mask"].sum(dim=1, keepdim=True) - 1
    token_B = output["completion_ids"].gather(1, last_B.clamp(min=0)).squeeze(1)
    stops = torch.tensor([*trainer.eos_token_ids, trainer._tokenizer.pad_token_id], device=token_B.device)
    return ~torch.isin(token_B, stops)


def _rewards(trainer: GRPOTrainer, count: int) -> tuple[float, ...]:
    """Return the reward of each of the latest completions, as TRL combines its functions."""
    columns = [tuple(trainer._logs["rewards"][name])[-count:] for name in trainer.reward_func_names]
    weights = trainer.reward_weights.tolist()
    return tuple(_weighted(row, weights) for row in zip(*columns, strict=True))


def _weighted(rewards: Sequence[float], weights: Sequence[float]) -> float:
    scored = [(reward, weight) for reward, weight in zip(rewards, weights, strict=True) if not math.isnan(reward)]
    return math.fsum(reward * weight for reward, weight in scored) if scored else math.nan
