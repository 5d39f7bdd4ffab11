"""Every error that betterhalf raises on purpose.

    BetterhalfError
    +-- InputError          (ValueError)    exit 2   bad data, bad model, bad folder
    |   +-- ConfigError                     exit 2   bad key or value in a configuration
    |   +-- ContractError                   exit 2   trainer and engine disagree on precision at start
    |   +-- CheckpointError                 exit 2   a checkpoint that cannot be used
    +-- MissingExtraError   (ImportError)   exit 2   an optional dependency is not installed
    +-- RunError            (RuntimeError)  exit 3   failure while running
        +-- EngineError                     exit 3   the rollout engine failed or returned impossible values
        |   +-- EngineDiedError             exit 3   the engine's process ended; a new one can replace it
        |   +-- EngineNumericsError         exit 3   the engine's logits or logprobs are not finite
        +-- TrainerDiedError                exit 3   a rank of the trainer ended; the ranks can start again
        +-- ClusterError                    exit 3   the cluster was lost: its head, or the connection to it
        +-- RewardError                     exit 3   a reward is not a finite number, or the grader failed
        +-- WeightSyncError                 exit 3   the engine does not hold or use the weights it was sent
        +-- LossScaleError                  exit 3   the loss scale is at its floor and still overflows
        +-- NumericsError                   exit 3   the trainer's logprobs are not finite
        +-- WatchdogError                   exit 3   the watchdog stopped the run

Each message is one sentence that says what is wrong and one that says how to fix it. The command line prints the
message alone, without a traceback, and exits with `exit_code`.
"""


class BetterhalfError(Exception):
    """Root of all errors raised on purpose."""

    exit_code = 3


class InputError(BetterhalfError, ValueError):
    """The user's data, model or folder cannot be used; found before expensive work."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration key or value is wrong."""


class ContractError(InputError):
    """Trainer and rollout engine would run in different precisions, and the configuration does not allow it."""


class CheckpointError(InputError):
    """A checkpoint is missing, incomplete or corrupted, or it was made by another model or with other data."""


class MissingExtraError(BetterhalfError, ImportError):
    """An optional dependency is missing; the message names the extra that brings it."""

    exit_code = 2


class RunError(BetterhalfError, RuntimeError):
    """A run failed after it had started; what is already written is kept."""

    exit_code = 3


class EngineError(RunError):
    """The rollout engine failed or returned impossible values."""


class EngineDiedError(EngineError):
    """The engine's process ended or does not answer; `RolloutEngine.restart` starts a new one."""


class EngineNumericsError(EngineError):
    """The engine's logits, logprobs or hidden states are NaN or infinite: it left the range of its format."""


class TrainerDiedError(RunError):
    """A rank of the trainer ended or does not answer; the ranks can start again from the last checkpoint."""


class ClusterError(RunError):
    """The cluster was lost while the run used it; `--resume` continues the run on another one."""


class RewardError(RunError):
    """A reward is NaN or infinite, the number of rewards is wrong, or the grader itself failed or could not start."""


class WeightSyncError(RunError):
    """After a weight sync the engine holds other weights than the trainer sent, or does not compute with them."""


class LossScaleError(RunError):
    """The loss scale reached its floor and gradients still overflow."""


class NumericsError(RunError):
    """The trainer's logprobs are NaN or infinite: the forward pass left the range of its format."""


class WatchdogError(RunError):
    """A watchdog level with the action `stop` fired; the message names the level and the value."""


class PrecisionWarning(UserWarning):
    """Values were passed in a format that is too coarse for what is computed from them."""
