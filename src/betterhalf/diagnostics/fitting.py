"""Search for settings with which a run would fit into its devices, by planning the run with each proposal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

from betterhalf.config.load import configuration_of
from betterhalf.config.schema import RunConfig
from betterhalf.diagnostics.memory import DevicePlan, Setting, plan_memory
from betterhalf.diagnostics.sizes import GIB, StepSizes
from betterhalf.errors import ConfigError

_MOST = 1024
"""Largest proposed number of ranks, or of GPUs for one engine."""

Values = dict[str, Any]
"""Dotted key -> value."""


def misfits(setting: Setting) -> tuple[str, ...]:
    """Return a sentence for each device that is too small, with settings that would fit; empty if everything fits."""
    return tuple(_misfit(setting, device) for device in plan_memory(setting).devices if not device.fits)


def _misfit(setting: Setting, device: DevicePlan) -> str:
    assert device.limit_bytes is not None
    found = f"{device.name} needs {device.total_bytes / GIB:.2f} GiB and has {device.limit_bytes / GIB:.2f} GiB."
    fixes = [fix for change in _CHANGES if (fix := _first_that_fits(setting, change(setting.config, setting.step)))]
    fixes = fixes or [fix for fix in [_first_that_fits(setting, _combined(setting))] if fix]
    if not fixes:
        return f"{found} No setting makes everything fit: use larger devices or a smaller model."
    written = [" and ".join(f"{key}={_written(value)}" for key, value in fix.items()) for fix in fixes]
    return f"{found} Set {', or '.join(written)}."


def _first_that_fits(setting: Setting, proposals: Iterator[Values]) -> Values | None:
    for values in proposals:
        changed = with_values(setting, values)
        if changed is not None and plan_memory(changed).fits:
            return values
    return None


def with_values(setting: Setting, values: Mapping[str, Any]) -> Setting | None:
    """Return the setting with some keys changed; None if the configuration refuses the values."""
    try:
        config = configuration_of(setting.config, values)
    except ConfigError:
        return None
    budget = values.get("training.tokens_per_micro_batch", setting.step.pack_tokens)
    step = setting.step
    if budget < step.pack_tokens:
        loss = -(-step.loss_tokens * budget // step.pack_tokens)
        step = replace(step, pack_tokens=budget, loss_tokens=loss)
    return replace(setting, config=config, step=step)


def _combined(setting: Setting) -> Iterator[Values]:
    """Yield the mildest changes combined, one more key each time; then more ranks, more shards and fewer sequences."""
    changes = [next(change(setting.config, setting.step), {}) for change in _CHANGES]
    together = list(accumulate(changes, lambda held, more: held | more))
    yield from together
    config = setting.config
    for values in _more_ranks(config, setting.step):
        yield changes[0] | values
    for ranks in _more_ranks(config, setting.step):
        for shards in [*_more_shards(config, setting.step), *_fewer_sequences(config, setting.step)]:
            yield changes[0] | ranks | shards


_Change = Callable[[RunConfig, StepSizes], Iterator[Values]]
"""(configuration, step) -> values to try, the mildest first."""


def _checkpointing(config: RunConfig, step: StepSizes) -> Iterator[Values]:
    if not config.training.activation_checkpointing:
        yield {"training.activation_checkpointing": True}


def _smaller_packs(config: RunConfig, step: StepSizes) -> Iterator[Values]:
    budget = step.pack_tokens
    while budget > step.sequence_tokens:
        budget = max(budget // 2, step.sequence_tokens)
        yield {"training.tokens_per_micro_batch": budget}


def _fewer_sequences(config: RunConfig, step: StepSizes) -> Iterator[Values]:
    if config.engine.reserved_cache is not None:
        return
    most = min(config.engine.max_concurrent, -(-step.sequences // config.cluster.engines))
    while most > 1:
        most //= 2
        yield {"engine.max_concurrent": most}


def _more_shards(config: RunConfig, step: StepSizes) -> Iterator[Values]:
    key = config.engine.devices_key
    if key is not None and config.cluster.engine.gpus >= 1:
        shards = config.engine.devices
        while (shards := 2 * shards) <= _MOST:
            yield {key: shards, "cluster.engine.gpus": shards}


def _more_ranks(config: RunConfig, step: StepSizes) -> Iterator[Values]:
    ranks = config.cluster.trainers
    while config.cluster.backend == "ray" and (ranks := 2 * ranks) <= _MOST:
        yield {"cluster.trainers": ranks}


def _offloading(config: RunConfig, step: StepSizes) -> Iterator[Values]:
    if config.cluster.trainer.gpus and not config.cluster.trainer.offload_optimizer:
        yield {"cluster.trainer.offload_optimizer": True}


def _separation(config: RunConfig, step: StepSizes) -> Iterator[Values]:
    if config.cluster.placement == "colocated":
        yield {"cluster.placement": "separate"}


_CHANGES: tuple[_Change, ...] = (
    *(_checkpointing, _smaller_packs, _fewer_sequences, _more_shards, _more_ranks, _offloading, _separation),
)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
