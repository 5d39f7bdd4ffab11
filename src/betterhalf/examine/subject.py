"""Model under examination by `probe` or `doctor`: its weights and prompts, with trainer and engine in any precision.

Nothing here trains. Each trainer works on a copy of the weights, so that the next one starts from the same numbers.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from betterhalf.config.sampling import require_whole_distribution
from betterhalf.config.schema import RunConfig
from betterhalf.errors import InputError
from betterhalf.models.adapters import add_adapters, plain_weights
from betterhalf.models.description import describe_model
from betterhalf.models.expert_names import unfused
from betterhalf.models.loading import LoadedModel, load_weights
from betterhalf.precision.contract import verify_sync, weights_digests
from betterhalf.precision.device import choose_device
from betterhalf.precision.roles import Precision, build_precision
from betterhalf.process import freed_memory_kept
from betterhalf.rollout.build import build_engine, reports_experts, require_engine
from betterhalf.rollout.engine import RolloutEngine, require_version
from betterhalf.run_dir import RunDir
from betterhalf.setup.data import load_task
from betterhalf.setup.model_checks import check_model, show_notes, why_not_sampled
from betterhalf.setup.trained_policy import load_policy
from betterhalf.tasks.task import Task
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, DtypeName, GenerateRequest, LoraMerge, Prompt

POLICY_VERSION = 0
"""Policy version of the examined weights; it never changes, since nothing is trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Model under examination, with its task and settings."""

    target: str
    """MODEL or RUN, as the user wrote it."""
    config: RunConfig
    """Settings; each trainer and engine gets its own precision in place of the configured one."""
    model: LoadedModel
    """Model with FP32 weights, which are never changed."""
    task: Task
    """Source of prompts and, for gradients, of rewards."""
    unsampled: str | None = None
    """Reason why the engine cannot sample from the model; None if it can, or if no engine is wanted."""

    def close(self) -> None:
        """Stop the task's worker processes."""
        self.task.close()

    def prompts(self, count: int) -> list[Prompt]:
        """Return the first `count` prompts of the task, or all if it has fewer."""
        return [self.task.prompt(index) for index in range(min(count, len(self.task)))]


@contextmanager
def open_subject(
    target: str,
    config: RunConfig,
    *,
    prompts: int | None = None,
    samples: bool = True,
    grades: bool = False,
    any_decoder: bool = False,
) -> Iterator[Subject]:
    """Load a model, or the newest checkpoint of a run (then `config` is the run's own).

    Args:
        target: MODEL or RUN.
        config: settings of the examination.
        prompts: number of prompts of the task that will be used; None for all.
        samples: True if the engine will sample; else it need not support the model.
        grades: True if completions will be graded; else the grader's worker processes need not start.
        any_decoder: True to accept a model that trainer or engine cannot run; `Subject.unsampled` then says why.

    Raises:
        InputError: truncated sampling, an unknown or damaged model, no tokenizer, a row of the data that cannot be
            used, or FP32 islands that the model does not have.
        MissingExtraError: the model or the data needs a package that is not installed.
    """
    with freed_memory_kept():
        yield from _open(target, config, prompts=prompts, samples=samples, grades=grades, any_decoder=any_decoder)


def _open(
    target: str, config: RunConfig, *, prompts: int | None, samples: bool, grades: bool, any_decoder: bool
) -> Iterator[Subject]:
    require_whole_distribution(config.sampling)
    is_run = RunDir(Path(target)).configured
    if is_run:
        config = config.model_copy(update={"lora": config.lora.without_start()})
    else:
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": target})})
    described = describe_model(config.model, packed=not any_decoder)
    unsampled = why_not_sampled(described, config) if any_decoder and samples else None
    samples = samples and unsampled is None
    check_model(described, config, samples=samples)
    task = load_task(described, config, rows=prompts, will_grade=grades)
    try:
        device = choose_device(config)
        if samples:
            require_engine(config, device)
        trained = load_policy(target) if is_run else None
        model = load_weights(described)
        show_notes(model, config.logging.console, config.lora)
        add_adapters(model.module, config.lora, config.seed)
        if trained is not None:
            trained.copy_into(model.module)
        yield Subject(target=target, config=config, model=model, task=task, unsampled=unsampled)
    finally:
        task.close()


def config_in(subject: Subject, dtype: DtypeName) -> RunConfig:
    """Return the subject's settings with every role in one format; overrides of individual roles are dropped."""
    roles = dict.fromkeys(("compute_dtype", "rollout_dtype", "wire_dtype", "kv_dtype"))
    precision = subject.config.precision.model_copy(update={"preset": dtype, **roles})
    return subject.config.model_copy(update={"precision": precision})


def precision_in(subject: Subject, dtype: DtypeName) -> Precision:
    """Return the precision with every role in one format, on the configured device."""
    config = config_in(subject, dtype)
    return build_precision(config.precision, choose_device(config), exact=config.exact)


def trainer_in(subject: Subject, dtype: DtypeName, *, hooked: bool = False) -> PolicyTrainer:
    """Build a trainer in `dtype` with its own copy of the weights.

    Set `hooked` if modules will get hooks: compiled layers would not call them, so layers are then not compiled.

    Raises:
        InputError: the trainer cannot compute the model in this format.
    """
    if subject.model.unpackable:
        raise InputError(subject.model.unpackable)
    config = config_in(subject, dtype)
    if hooked:
        config = config.model_copy(update={"training": config.training.model_copy(update={"compile_layers": False})})
    model = dataclasses.replace(subject.model, module=copy.deepcopy(subject.model.module))
    return PolicyTrainer(model, config=config, precision=precision_in(subject, dtype))


@contextmanager
def engine_in(subject: Subject, dtype: DtypeName) -> Iterator[RolloutEngine]:
    """Run the configured engine in `dtype` with the subject's weights, verified by digest; close it at the end.

    Raises:
        InputError: the engine does not support the architecture or the format.
        WeightSyncError: the engine holds other weights than those it was sent.
    """
    precision = precision_in(subject, dtype)
    model = subject.model
    engine = build_engine(config_in(subject, dtype), model.hf_config, model.stop_token_ids, precision)
    try:
        merge = subject.config.lora.merge
        engine.load_weights(rounded_weights(model, precision.roles.wire_dtype, merge), policy_version=POLICY_VERSION)
        sent = rounded_weights(model, precision.roles.rollout_dtype, merge)
        verify_sync(weights_digests(sent), engine.digests())
        yield engine
    finally:
        engine.close()


def sample_groups_of(
    subject: Subject, engine: RolloutEngine, prompts: Sequence[Prompt], group_size: int
) -> list[tuple[Completion, ...]]:
    """Sample `group_size` completions of each prompt; every engine and precision uses the same random numbers."""
    requests = [
        GenerateRequest(
            token_ids=prompt.token_ids,
            group_size=group_size,
            key=(subject.config.seed, 0, index),
            prompt_id=prompt.prompt_id,
            with_experts=reports_experts(subject.config, subject.model),
        )
        for index, prompt in enumerate(prompts)
    ]
    siblings = engine.generate(requests, subject.config.sampling)
    require_version(siblings, POLICY_VERSION)
    return siblings


def rounded_weights(model: LoadedModel, name: DtypeName, merge: LoraMerge = "weights") -> Iterable[tuple[str, Tensor]]:
    """Yield (unfused Hugging Face name, FP32 weight rounded to a format, adapters merged or beside), one at a time.

    The base of adapters is rounded first, as in a trainer that computes in that format.
    """
    return unfused(plain_weights(model.module, name, name, merge))
