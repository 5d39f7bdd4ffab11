"""A callback for TRL's `GRPOTrainer` that measures the mismatch and writes a run folder; docs/trl.md describes it."""

from betterhalf.integrations.trl.callback import BetterhalfCallback as BetterhalfCallback
