"""Checks of all cells of a sweep before the first one runs: what `train` would refuse is refused here, by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from betterhalf.config.grid import Cell, combination_of
from betterhalf.config.load import resolved_json
from betterhalf.config.schema import ModelConfig, RunConfig
from betterhalf.errors import InputError, MissingExtraError
from betterhalf.metrics.names import is_known, nearest
from betterhalf.models.description import ModelDescription, describe_model
from betterhalf.run_dir import RunDir
from betterhalf.runs.assembly import (
    check_before_weights,
    check_described,
    checked_algorithm,
    close_data,
    load_data,
)
from betterhalf.runs.sweep_cell import evaluation_config
from betterhalf.runs.train import check_settings, require_same_config


class _Seen:
    """Models and data that earlier cells have read already."""

    def __init__(self) -> None:
        self.models: dict[str, ModelDescription] = {}
        self._data: set[str] = set()

    def describe(self, model: ModelConfig) -> ModelDescription:
        """Return the description of a model; its files are read once."""
        key = model.model_dump_json()
        if key not in self.models:
            self.models[key] = describe_model(model)
        return self.models[key]

    def check_data(self, described: ModelDescription, config: RunConfig) -> None:
        """Check the task and the data sets to evaluate, unless an earlier cell has the same."""
        sections = resolved_json(config)
        read = ("model", "task", "sampling", *(("evaluate",) if config.evaluate.every else ()))
        key = json.dumps([sections[name] for name in read])
        if key not in self._data:
            close_data(*load_data(described, config))
            self._data.add(key)


def check_cells(cells: Sequence[Cell]) -> int:
    """Check every cell, and return the number of parameters of the largest model.

    Raises:
        InputError: a cell cannot run; the message names it.
    """
    seen = _Seen()
    for cell in cells:
        try:
            _check(cell.config, seen)
        except (InputError, MissingExtraError) as error:
            raise InputError(f"the cell {cell.label} cannot run: {error}") from error
    return max(map(_parameters, seen.models.values()))


def _check(config: RunConfig, seen: _Seen) -> None:
    """Run the checks of `train`, without reading weights."""
    check_settings(config)
    described = check_before_weights(config, describe=seen.describe, check_data=seen.check_data)
    if config.sweep.evaluate is not None:
        _check_evaluation(config, described)


def _check_evaluation(config: RunConfig, described: ModelDescription) -> None:
    """Refuse a `sweep.evaluate` in which the trained policy could not be evaluated, and name it."""
    evaluation = evaluation_config(config)
    try:
        checked_algorithm(evaluation, evaluating=True)
        check_described(described, evaluation, starts=False)
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
