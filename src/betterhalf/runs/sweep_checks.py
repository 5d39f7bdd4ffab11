"""Checks of all cells of a sweep before the first one runs: what `train` would refuse is refused here, by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from betterhalf.config.grid import Cell, combination_of
from betterhalf.config.load import resolved_json
from betterhalf.config.schema import RunConfig
from betterhalf.errors import InputError, MissingExtraError
from betterhalf.metrics.names import is_known, nearest
from betterhalf.models.description import ModelDescription, describe_model
from betterhalf.run_dir import RunDir
from betterhalf.runs.assembly import checked_algorithm, checked_machine
from betterhalf.runs.sweep_cell import evaluation_config
from betterhalf.runs.train import require_same_config
from betterhalf.runs.watchdog import require_sound_levels
from betterhalf.setup.data import load_task
from betterhalf.setup.model_checks import check_model, require_stop_token
from betterhalf.tracking.kinds import require_trackers


@dataclass(slots=True)
class _Seen:
    """Models and data that earlier cells have checked already."""

    models: dict[str, ModelDescription]
    tasks: set[str]


def check_cells(cells: Sequence[Cell]) -> int:
    """Check every cell, and return the number of parameters of the largest model.

    Raises:
        InputError: a cell cannot run; the message names it.
    """
    seen = _Seen(models={}, tasks=set())
    for cell in cells:
        try:
            _check(cell.config, seen)
        except (InputError, MissingExtraError) as error:
            raise InputError(f"the cell {cell.label} cannot run: {error}") from error
    return max(map(_parameters, seen.models.values()))


def _check(config: RunConfig, seen: _Seen) -> None:
    """Run the checks of `assemble` on configuration, model and task, in its order, without reading weights."""
    require_trackers(config.logging)
    require_sound_levels(config)
    checked_algorithm(config, evaluating=False)
    sections = resolved_json(config)
    model = json.dumps(sections["model"])
    if model not in seen.models:
        seen.models[model] = describe_model(config.model)
    described = seen.models[model]
    check_model(described, config)
    require_stop_token(described, config.model)
    task = json.dumps([model, sections["task"], sections["sampling"]])
    if task not in seen.tasks:
        load_task(described, config).close()
        seen.tasks.add(task)
    checked_machine(config, described)
    if config.sweep.evaluate is not None:
        _check_evaluation(config, described)


def _check_evaluation(config: RunConfig, described: ModelDescription) -> None:
    """Refuse a `sweep.evaluate` in which the trained policy could not be evaluated, and name it."""
    evaluation = evaluation_config(config)
    try:
        checked_algorithm(evaluation, evaluating=True)
        check_model(described, evaluation)
    except InputError as error:
        raise InputError(f"its evaluation in sweep.evaluate={config.sweep.evaluate} cannot run: {error}") from error


def _parameters(described: ModelDescription) -> int:
    """Return the number of parameters of a model, from its configuration."""
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(described.hf_config)  # type: ignore[no-untyped-call]
    return sum(parameter.numel() for parameter in module.parameters())


def check_curves(names: Sequence[str]) -> None:
    """Refuse a name in `sweep.curves` that is not a metric.

    Raises:
        InputError: the message names the nearest metric.
    """
    for name in names:
        if not is_known(name):
            raise InputError(f"sweep.curves names {name!r}, which is no metric. Did you mean {nearest(name)!r}?")


def check_folders(folder: Path, cells: Sequence[Cell]) -> None:
    """Refuse a folder with other runs than those of the cells, or with runs of other settings.

    Runs of the same combinations with other seeds may stay: seeds can be left out and added again.

    Raises:
        InputError: the message names the run.
    """
    known, combinations = {cell.label: cell for cell in cells}, {cell.combination for cell in cells}
    for found in sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []:
        if found not in known:
            if combination_of(found) in combinations:
                continue
            raise InputError(
                f"{folder / found} is no cell of this sweep. Choose another run_dir=PATH, or add its values to the "
                "axes again."
            )
        run = RunDir(folder / found)
        if run.config.exists():
            require_same_config(run, known[found].config, how="Restore the settings in the sweep file")
