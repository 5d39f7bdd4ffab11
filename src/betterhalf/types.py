"""The records that flow through one training step, and the names that configuration files use.

No torch at run time: tensors are named in annotations only. Axis letters in field names:

    _P prompts   _G siblings of a group   _S sequences   _T packed tokens   _C completion tokens   _V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from betterhalf.token_support import TokenSupport, TopTokens

HardwareDtype = Literal["fp16", "bf16", "fp32"]
"""Formats that processors compute in."""

EmulatedDtype = Literal["e8m2", "e8m3", "e8m4", "e8m5", "e8m6"]
"""Emulated formats: eight exponent bits as in BF16, and fewer stored mantissa bits."""

DtypeName = Literal[HardwareDtype, EmulatedDtype]
"""Names of the formats, as used in configuration files, contracts and reports."""

PresetName = Literal[
    "grpo",
    "grpo_std",
    "grpo_token_tis",
    "grpo_seq_tis",
    "grpo_seq_mis",
    "gspo",
    "pg_seq_is",
    "pg_seq_tis",
    "pg_seq_mis",
    "reinforce",
    "rloo",
    "dapo",
    "cispo",
    "icepop",
    "geo_mask",
    "dppo_tv",
]
"""Names of the algorithm presets; `config.presets` holds the choices behind each."""

AdvantageKind = Literal["group_mean", "group_standardised", "leave_one_out", "raw"]
"""Ways to compute advantages from the rewards of a group."""

AggregationKind = Literal["constant_length", "sequence_mean", "token_mean"]
"""Reductions of token losses to one number."""

DenominatorKind = Literal["all", "kept"]
"""Tokens that the denominator of the loss counts: all, or those that no mask rejects before the first update."""

RatioLevel = Literal["none", "token", "sequence", "geometric_mean"]
"""Levels of an importance ratio; `none` is the constant 1."""

RatioName = Literal["current/proximal", "current/behavior", "proximal/behavior"]
"""Numerator and denominator of an importance ratio."""

RatioTreatment = Literal["raw", "truncate", "mask", "clip"]
"""Treatments of a ratio outside its bounds."""

KlPlace = Literal["loss", "reward"]
"""Places of the KL penalty to the reference policy."""

KlEstimator = Literal["k1", "k2", "k3"]
"""Estimators of a KL divergence from sampled tokens."""

RatioGradient = Literal["ratio", "logprob"]
"""Factor of the surrogate that is differentiated: the ratio, or log pi with the ratio held constant."""

RoundingMode = Literal["engine", "aligned", "exact"]
"""Rounding points of the native engine: those of production engines, or those of the trainer; `exact` also makes every
product and sum independent of the batch, on both sides."""

HeadDtype = Literal["fp32", "model"]
"""Precision of the LM head's product in vLLM; `model` is the rollout dtype."""

SleepMode = Literal["auto", "never"]
"""Use of vLLM's sleep mode while the trainer works."""

HalfMatmul = Literal["auto", "native", "fp32_sums"]
"""Ways to compute a half-precision matrix product on a CPU."""

PairSelection = Literal["full", "matched"]
"""Named sets of (trainer dtype, rollout dtype) pairs."""

ArithmeticStyle = Literal["running_sum", "word_problem", "auto"]
"""Wordings of the arithmetic task."""

PromptTemplate = Literal["chat", "r1_distill", "qwen_math", "none"]
"""Templates that turn a maths problem into a prompt."""

DataPart = Literal["train", "held_out", "all"]
"""Parts of a data set: the rows to train on, those held out from training, or both."""

AnswerExtraction = Literal["tags", "last_line", "last_word", "last_number", "all"]
"""Part of a completion that is its answer: the text inside the last <answer> tags, the last line, the last word without
punctuation, the last number, or all of it."""

BadRowAction = Literal["refuse", "skip"]
"""Actions on a row that cannot be used."""

RewardNormalisation = Literal["none", "group"]
"""Normalisations of the rewards of a `python` task before they are added up."""

RewardErrorAction = Literal["score", "stop"]
"""Actions on a completion whose reward failed: give it a fixed reward, or stop the run."""

RewardFailure = Literal["timeout", "crash", "exception", "not_finite", "wrong_type", "wrong_length", "too_large"]
"""Ways in which a user's reward function can fail."""

SchedulerName = Literal["constant", "linear", "cosine"]
"""Shapes of the learning rate after the warm-up."""

WatchdogAction = Literal["warn", "mask", "halve_learning_rate", "stop"]
"""Actions of a watchdog rule that fires."""

LearningOutcome = Literal["learned", "dips", "flat", "damaged", "collapsed", "short"]
"""Words for the course of a run's reward; see `diagnostics.course`."""

DeviceName = Literal["auto", "cpu", "cuda"]
"""Devices of a run; `auto` takes a GPU if there is one."""

BackendName = Literal["local", "ray"]
"""Mechanisms that start the processes of a run: none, or Ray."""

BestName = Literal["highest", "lowest"]
"""Which value of a metric is the best: its highest or its lowest."""

LoraMerge = Literal["weights", "adapter"]
"""Forms of a LoRA adapter in the engine: merged into the weights, or served beside them."""

PlacementName = Literal["separate", "colocated"]
"""Placements of the engines: on devices of their own, or on those of the trainer's ranks."""

TransferName = Literal["nccl", "ipc", "object_store"]
"""Paths of weights from ranks to engines: a broadcast by rank 0, handles of GPU memory, or the object store."""

TransferChoice = Literal["auto", "nccl", "ipc", "object_store"]
"""Values of `cluster.transfer`; `auto` takes the fastest path that the placement allows."""

ConsoleMode = Literal["auto", "live", "lines", "quiet"]
"""Forms of the terminal output that a configuration can choose."""

TrackerName = Literal["wandb", "trackio", "mlflow", "tensorboard", "prometheus"]
"""Names of the trackers that a run can be sent to."""

TrackerMode = Literal["online", "offline", "disabled"]
"""Modes of W&B: send the run, only write its files, or do neither."""

JobKind = Literal["arm", "cell"]
"""Kinds of runs that are parts of another: an arm of a sanity run, or a cell of a sweep."""

RunKind = Literal["train", JobKind]
"""Kinds of training runs: one of its own, or a part of another."""

RunStatus = Literal["finished", "stopped", "failed", "interrupted"]
"""Ways in which a run ends; `stopped` by the watchdog."""

Reduction = Literal["sum", "mean", "max", "last"]
"""Ways to combine the values of several micro-batches, optimizer steps or ranks; see `reduction`."""

FinishReason = Literal["stop", "length"]
"""Reason why sampling ended: a stop token (itself part of the completion), or the length limit."""

EpisodeEnd = Literal["done", "turn_limit", "length", "failed"]
"""Reason why an episode of several turns ended: the environment ended it, `task.max_turns`, the length limit, or an
environment that raised or ran out of time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One problem, ready for the model."""

    prompt_id: str
    """Stable name within the data set; also names the prompt in `rollouts.jsonl`."""
    text: str
    """Text that the model reads, with the chat template applied."""
    token_ids: tuple[int, ...]
    """Tokens of `text`, special tokens included."""
    answer: str
    """Reference answer, with which the reward compares a completion; empty if the data has none."""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Fields of the data row, as JSON values, for the user's reward functions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Request to the engine for the siblings of one prompt."""

    token_ids: tuple[int, ...]
    """Tokens of the prompt."""
    group_size: int
    """Number of completions wanted."""
    key: tuple[int, int, int]
    """(seed, step, prompt index): with sibling and position it determines every random draw."""
    prompt_id: str = ""
    """Name of the prompt in messages; empty if it has none."""
    with_support: bool = False
    """True if completions must come with their `support` where the sampling settings truncate the distribution."""
    with_experts: bool = False
    """True if completions of a mixture of experts must come with their `experts`."""
    first_sibling: int = 0
    """Index of the first completion among the siblings of the prompt."""
    first_position: int = 0
    """Number of tokens that were sampled before, in earlier turns of the same completion."""
    max_tokens: int | None = None
    """Maximum number of tokens to sample, below that of the sampling settings; None for theirs."""

    def limit(self, max_tokens: int, context_length: int) -> int:
        """Return the maximum number of tokens to sample, given the settings' limit and the model's context."""
        wanted = max_tokens if self.max_tokens is None else min(max_tokens, self.max_tokens)
        return min(wanted, context_length - len(self.token_ids))

    def label(self, index: int) -> str:
        """Return the prompt's name for a message; without one, its index among the requests."""
        return f"prompt {self.prompt_id or index}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenExperts:
    """Experts that the engine chose, in a mixture of experts, for each token that it read of a completion."""

    experts_NLK: Tensor
    """uint8 [N, L, K], or int16 beyond 256 experts, in host memory: indices of the K experts of each of the N tokens in
    each of the L layers that have experts. The tokens are those of the prompt and all of the completion, observations
    included, but its last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Tokens that an environment put between two turns of a completion. They are context: they carry no loss."""

    before: int
    """Index of the sampled token that follows; at least 1."""
    token_ids: tuple[int, ...]
    """Tokens of the observation, with those that the chat template puts around it; may be empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """Output of the engine for one sibling; with an environment, all its turns."""

    token_ids: tuple[int, ...]
    """Sampled tokens, the stop token included when there is one; at least one token."""
    behavior_logprobs: tuple[float, ...]
    """log mu of each sampled token, in nats, FP32, under the distribution sampled from. Where top-p, top-k or min-p
    truncate that distribution, the rest is normalised to 1."""
    finish_reason: FinishReason
    """Reason why sampling ended."""
    policy_version: int
    """Number of applied updates in the weights that sampled it."""
    top: TopTokens | None = None
    """Most likely tokens at each position, for `algorithm.score_centering`; None without it."""
    support: TokenSupport | None = None
    """Tokens that could be drawn in place of each sampled token; None if that is every token, or was not asked for."""
    experts: TokenExperts | None = None
    """Experts that computed its tokens; None if that was not asked for, or without experts."""
    observations: tuple[Observation, ...] = ()
    """Observations between its turns, in order; empty for a single turn."""

    @property
    def truncated(self) -> bool:
        """True if it ended at the length limit, without a stop token."""
        return self.finish_reason == "length"

    def with_observations(self) -> tuple[int, ...]:
        """Return the tokens as the model reads them: the sampled ones, with the observations inserted."""
        if not self.observations:
            return self.token_ids
        token_ids: list[int] = []
        done = 0
        for observation in self.observations:
            token_ids += (*self.token_ids[done : observation.before], *observation.token_ids)
            done = observation.before
        return (*token_ids, *self.token_ids[done:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A completion and its reward."""

    prompt: Prompt
    completion: Completion
    text: str
    """Decoded completion, without its stop token if that is a special token; observations included."""
    reward: float
    episode_end: EpisodeEnd | None = None
    """Reason why its episode ended; None without an environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """The siblings sampled for one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    """In sibling order; `group_size` of them."""

    @property
    def rewards(self) -> tuple[float, ...]:
        """Rewards in sibling order."""
        return tuple(rollout.reward for rollout in self.rollouts)
