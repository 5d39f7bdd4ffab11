"""betterhalf: reinforcement-learning fine-tuning of language models in one proven precision.

The names below are the public Python API; docs/api.md describes each. A module is imported when one of its names is
first used, so that `import betterhalf` takes no time and loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from betterhalf.algorithms.loss_stats import policy_metrics as policy_metrics
    from betterhalf.algorithms.policy_loss import LossOutput as LossOutput
    from betterhalf.api.rows import Rows as Rows
    from betterhalf.api.run import Run as Run
    from betterhalf.api.run import load_run as load_run
    from betterhalf.api.sides import contract as contract
    from betterhalf.api.sides import side_report as side_report
    from betterhalf.api.tensors import fit_budget as fit_budget
    from betterhalf.api.tensors import mismatch_metrics as mismatch_metrics
    from betterhalf.api.tensors import mismatch_profile as mismatch_profile
    from betterhalf.api.tensors import policy_loss as policy_loss
    from betterhalf.api.verbs import compare as compare
    from betterhalf.api.verbs import doctor as doctor
    from betterhalf.api.verbs import evaluate as evaluate
    from betterhalf.api.verbs import plan as plan
    from betterhalf.api.verbs import probe as probe
    from betterhalf.api.verbs import sanity as sanity
    from betterhalf.api.verbs import train as train
    from betterhalf.batches import Denominators as Denominators
    from betterhalf.config.load import configuration_of as configuration_of
    from betterhalf.config.schema import LossScaleConfig as LossScaleConfig
    from betterhalf.config.schema import RunConfig as RunConfig
    from betterhalf.diagnostics.budget import Budget as Budget
    from betterhalf.diagnostics.budget import predict_ess as predict_ess
    from betterhalf.errors import BetterhalfError as BetterhalfError
    from betterhalf.errors import ConfigError as ConfigError
    from betterhalf.errors import ContractError as ContractError
    from betterhalf.errors import EngineError as EngineError
    from betterhalf.errors import EngineNumericsError as EngineNumericsError
    from betterhalf.errors import InputError as InputError
    from betterhalf.errors import LossScaleError as LossScaleError
    from betterhalf.errors import MissingExtraError as MissingExtraError
    from betterhalf.errors import NumericsError as NumericsError
    from betterhalf.errors import PrecisionWarning as PrecisionWarning
    from betterhalf.errors import RewardError as RewardError
    from betterhalf.errors import RunError as RunError
    from betterhalf.errors import WatchdogError as WatchdogError
    from betterhalf.ops import token_logprobs as token_logprobs
    from betterhalf.precision.contract import Contract as Contract
    from betterhalf.precision.contract import SideReport as SideReport
    from betterhalf.precision.loss_scaler import LossScaler as LossScaler
    from betterhalf.precision.loss_scaler import build_loss_scaler as build_loss_scaler
    from betterhalf.runs.compare import Comparison as Comparison

__all__ = [
    "BetterhalfError",
    "Budget",
    "Comparison",
    "ConfigError",
    "Contract",
    "ContractError",
    "Denominators",
    "EngineError",
    "EngineNumericsError",
    "InputError",
    "LossOutput",
    "LossScaleConfig",
    "LossScaleError",
    "LossScaler",
    "MissingExtraError",
    "NumericsError",
    "PrecisionWarning",
    "RewardError",
    "Rows",
    "Run",
    "RunConfig",
    "RunError",
    "SideReport",
    "WatchdogError",
    "__version__",
    "build_loss_scaler",
    "compare",
    "configuration_of",
    "contract",
    "doctor",
    "evaluate",
    "fit_budget",
    "load_run",
    "mismatch_metrics",
    "mismatch_profile",
    "plan",
    "policy_loss",
    "policy_metrics",
    "predict_ess",
    "probe",
    "sanity",
    "side_report",
    "token_logprobs",
    "train",
]

__version__ = "0.1.0"

_MODULES = {
    "betterhalf.api.verbs": ("train", "sanity", "probe", "doctor", "evaluate", "plan", "compare"),
    "betterhalf.api.run": ("Run", "load_run"),
    "betterhalf.api.rows": ("Rows",),
    "betterhalf.runs.compare": ("Comparison",),
    "betterhalf.config.load": ("configuration_of",),
    "betterhalf.config.schema": ("LossScaleConfig", "RunConfig"),
    "betterhalf.api.tensors": ("fit_budget", "mismatch_metrics", "mismatch_profile", "policy_loss"),
    "betterhalf.algorithms.loss_stats": ("policy_metrics",),
    "betterhalf.algorithms.policy_loss": ("LossOutput",),
    "betterhalf.diagnostics.budget": ("Budget", "predict_ess"),
    "betterhalf.batches": ("Denominators",),
    "betterhalf.ops": ("token_logprobs",),
    "betterhalf.precision.loss_scaler": ("LossScaler", "build_loss_scaler"),
    "betterhalf.precision.contract": ("Contract", "SideReport"),
    "betterhalf.api.sides": ("contract", "side_report"),
    "betterhalf.errors": (
        *("BetterhalfError", "ConfigError", "ContractError", "EngineError", "EngineNumericsError", "InputError"),
        *(
            "LossScaleError",
            "MissingExtraError",
            "NumericsError",
            "PrecisionWarning",
            "RewardError",
            "RunError",
            "WatchdogError",
        ),
    ),
}
"""Module -> its public names."""

_SOURCES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module that has a public name, and return the object."""
    if name not in _SOURCES:
        raise AttributeError(f"module 'betterhalf' has no attribute {name!r}")
    found = getattr(import_module(_SOURCES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_SOURCES})
