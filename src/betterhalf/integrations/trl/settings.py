"""Settings of a TRL run under betterhalf's names, as `config.json` holds them for the report and for `compare`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from betterhalf.integrations.trl.checks import Sampler

if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer

SETTINGS: Mapping[str, tuple[str, Callable[[GRPOConfig], Any]]] = {
    "training.prompts_per_step": (
        "`generation_batch_size / num_generations`",
        lambda args: args.generation_batch_size // args.num_generations,
    ),
    "training.group_size": ("`num_generations`", lambda args: args.num_generations),
    "training.optimizer_steps": (
        "`steps_per_generation * num_iterations / gradient_accumulation_steps`",
        lambda args: max(1, generate_every(args) // args.gradient_accumulation_steps),
    ),
    "sampling.max_tokens": ("`max_completion_length`", lambda args: args.max_completion_length),
    "sampling.temperature": ("`temperature`", lambda args: args.temperature),
    "optimizer.learning_rate": ("`learning_rate`", lambda args: args.learning_rate),
    "optimizer.betas": ("`adam_beta1`, `adam_beta2`", lambda args: [args.adam_beta1, args.adam_beta2]),
    "optimizer.eps": ("`adam_epsilon`", lambda args: args.adam_epsilon),
    "optimizer.weight_decay": ("`weight_decay`", lambda args: args.weight_decay),
    "optimizer.max_grad_norm": ("`max_grad_norm`", lambda args: args.max_grad_norm),
    "algorithm.surrogate.lower": ("1 - `epsilon`", lambda args: 1 - args.epsilon),
    "algorithm.surrogate.upper": (
        "1 + `epsilon_high` (`epsilon` if it is not set)",
        lambda args: 1 + (args.epsilon if args.epsilon_high is None else args.epsilon_high),
    ),
    "algorithm.kl.coefficient": ("`beta`", lambda args: args.beta),
    "seed": ("`seed`", lambda args: args.seed),
}
"""Our key -> TRL's settings, as docs/trl.md shows them, and the value from them."""


def generate_every(args: GRPOConfig) -> int:
    """Return the number of forward and backward passes for each rollout batch."""
    return int(args.steps_per_generation * args.num_iterations)


def run_settings(trainer: GRPOTrainer, sampler: Sampler, max_steps: int) -> dict[str, Any]:
    """Return `config.json`: the settings that both frameworks have, and all of TRL's in a section `trl`.

    Args:
        trainer: its arguments and its model.
        sampler: program that samples.
        max_steps: number of optimizer steps of the run.
    """
    args = trainer.args
    found: dict[str, Any] = {
        "name": str(args.run_name or "trl"),
        "model": {"name": str(trainer.model.config._name_or_path)},
        "engine": {"type": sampler},
        "algorithm": {"preset": f"{args.loss_type} of TRL"},
        "training": {"steps": -(-max_steps * args.gradient_accumulation_steps // generate_every(args))},
    }
    for key, (_, value_of) in SETTINGS.items():
        _put(found, key.split("."), value_of(args))
    return found | {"trl": json.loads(args.to_json_string())}


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
