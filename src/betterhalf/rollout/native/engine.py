"""The native rollout engine: continuous batching over its own decoder, seeded draws, behavior logprobs in FP32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.config.schema import LoraConfig, NativeEngineConfig, SamplingConfig
from betterhalf.errors import EngineError, InputError
from betterhalf.kernels import has_triton
from betterhalf.precision.contract import SideReport, weights_digests
from betterhalf.precision.islands import has_post_norms
from betterhalf.precision.roles import Precision
from betterhalf.rollout import sampler
from betterhalf.rollout.native.config import DecoderConfig, decoder_config
from betterhalf.rollout.native.cuda_graphs import DecodeGraphs, batch_bucket
from betterhalf.rollout.native.decoder import Decoder
from betterhalf.rollout.native.expert_log import ExpertLog
from betterhalf.rollout.native.kv_cache import KVCache
from betterhalf.rollout.native.queue import PromptQueue
from betterhalf.rollout.native.report import engine_report
from betterhalf.rollout.native.rounding import Rounding
from betterhalf.rollout.native.running_batch import RunningBatch, rows_at_once
from betterhalf.rollout.native.scheduler import Capacity, Limits, Scheduler
from betterhalf.rollout.native.slots import Sampled, SlotTable
from betterhalf.rollout.native.weights import DecoderWeights, Storage
from betterhalf.rollout.requests import check_requests, check_sequences, require_finite_scores, stop_ids
from betterhalf.types import Completion, GenerateRequest

_LENGTH_MULTIPLE = 16
"""Cache lengths are rounded up to a multiple of this: fewer lengths mean fewer allocations."""


class NativeEngine:
    """Engine with its own copy of the policy, in this process; implements `rollout.engine.RolloutEngine`."""

    def __init__(
        self,
        hf_config: Any,
        *,
        precision: Precision,
        config: NativeEngineConfig,
        stop_token_ids: Iterable[int],
        top_tokens: int = 0,
        lora: LoraConfig | None = None,
    ) -> None:
        """Allocate weights for the architecture of a transformers configuration; `load_weights` fills them.

        Args:
            hf_config: transformers configuration of the model.
            precision: dtype roles and device.
            config: configuration of the engine.
            stop_token_ids: tokens that end a completion.
            top_tokens: number of most likely tokens that completions report at each position.
            lora: adapters to serve beside the weights; none by default.

        Raises:
            InputError: the engine does not compute the architecture, or the model lacks an FP32 island of the
                configuration; a stop token is not in its vocabulary; or there is no Triton for a GPU.
        """
        require_kernels(precision.device)
        assert precision.exact == (config.rounding == "exact"), "see `RunConfig.exact`"
        self._precision = precision
        self._config = config
        self._shape = decoder_config(hf_config)
        _require_computed_on(precision.device, self._shape)
        self._top_tokens = min(top_tokens, self._shape.vocab_size)
        self._rounding = _rounding(precision, config)
        post_norms = has_post_norms(hf_config)
        islands = precision.islands(self._shape.num_layers, precision.roles.rollout_dtype, post_norms=post_norms)
        self._weights = DecoderWeights(self._shape, _storage(precision), islands, lora)
        self._decoder = Decoder(self._shape, self._weights, self._rounding, islands)
        self._stop_lookup = torch.zeros(self._shape.vocab_size, dtype=torch.bool, device=precision.device)
        self._stop_lookup[list(stop_ids(stop_token_ids, self._shape.vocab_size))] = True
        self._policy_version: int | None = None
        self._table: SlotTable | None = None
        self._graphs: DecodeGraphs | None = None

    @property
    def decoder(self) -> Decoder:
        """Forward pass of the engine; its `tap` sees the result of every operation."""
        return self._decoder

    @torch.no_grad()
    def load_weights(
        self, weights: Iterable[tuple[str, Tensor]], *, policy_version: int, partial: bool = False
    ) -> None:
        """Replace weights in place; see `RolloutEngine.load_weights`."""
        held, self._policy_version = self._policy_version is not None, None
        self._weights.load(weights, held=partial and held)
        self._policy_version = policy_version

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Return log mu of each given token but the first; see `RolloutEngine.score`."""
        self._require_weights("score")
        check_sequences(sequences, self._shape.max_positions, self._shape.vocab_size)
        scores = [self._score_one(tuple(token_ids)) for token_ids in sequences]
        require_finite_scores(scores, self._rounding.format, self._weights.why_not_finite)
        return scores

    def _score_one(self, token_ids: tuple[int, ...]) -> tuple[float, ...]:
        self._decoder.reserve(len(token_ids))
        tokens = torch.tensor(token_ids, device=self._precision.device)
        hidden = self._decoder.hidden_rows(tokens, (len(token_ids),))[:-1]
        rows = rows_at_once(self._shape.vocab_size)
        parts = zip(torch.split(hidden, rows), torch.split(tokens[1:], rows), strict=True)
        logprobs = torch.cat([ops.token_logprobs(self._decoder.logits(part), taken) for part, taken in parts])
        return tuple(logprobs.tolist())

    def digests(self) -> dict[str, str]:
        """Return the digest of each weight that the engine holds; see `RolloutEngine.digests`."""
        return weights_digests(self._weights.narrowed())

    def report(self) -> SideReport:
        """Report what the engine really runs, read from its tensors."""
        return engine_report(self._decoder, self._precision, self._config)

    def sleep(self) -> None:
        """Do nothing: cache and graphs are small beside the trainer's activations, and slow to build again."""

    def wake(self) -> None:
        """Do nothing; see `sleep`."""

    def restart(self) -> None:
        """Refuse: this engine runs in the process of the run."""
        raise EngineError("the native engine has no process of its own to restart; resume from a checkpoint")

    def close(self) -> None:
        """Release the cache and the graphs; weights stay, so the engine can still be used."""
        self._graphs = None
        self._table = None

    @torch.inference_mode()
    def generate(self, requests: Sequence[GenerateRequest], sampling: SamplingConfig) -> list[tuple[Completion, ...]]:
        """Sample `group_size` completions for each request; see `RolloutEngine.generate`."""
        version, limits = self._require_weights("generate"), self._limits(sampling)
        check_requests(requests, limits.context, limits.vocabulary)
        if not any(request.group_size for request in requests):
            return [() for _ in requests]
        with_support = any(request.with_support for request in requests)
        with_experts = any(request.with_experts for request in requests)
        capacity = Capacity.of(requests, limits)
        scheduler = self.scheduler(sampling, capacity, with_support=with_support, with_experts=with_experts)
        for request in requests:
            scheduler.add(request)
        found: list[Sampled] = []
        while scheduler.unfinished:
            found += scheduler.step()
        return self._completions(requests, found, version)

    @torch.inference_mode()
    def scheduler(
        self, sampling: SamplingConfig, capacity: Capacity, *, with_support: bool = False, with_experts: bool = False
    ) -> Scheduler:
        """Return an empty scheduler that samples step by step, in place of any earlier one.

        Args:
            sampling: distribution and length limit of all its completions.
            capacity: room to reserve; a request that needs more is refused when it is added.
            with_support: record the tokens that could be drawn, if `sampling` truncates the distribution.
            with_experts: record the experts that are chosen, if the model has any.

        Raises:
            EngineError: the engine holds no weights.
        """
        self._require_weights("scheduler")
        table = self._reserve(capacity)
        wanted = _distribution(sampling, self._top_tokens, with_support=with_support)
        mixture = self._shape.mixture
        log = ExpertLog(mixture, self._decoder.tape) if with_experts and mixture is not None else None
        batch = RunningBatch(self._decoder, table, self._graphs, wanted, log)
        queue = PromptQueue(self._decoder, self._precision.device, log)
        return Scheduler(batch, queue, self._limits(sampling), abandon=self.close)

    def _limits(self, sampling: SamplingConfig) -> Limits:
        shape = self._shape
        return Limits(context=shape.max_positions, vocabulary=shape.vocab_size, max_tokens=sampling.max_tokens)

    def _require_weights(self, verb: str) -> int:
        if self._policy_version is None:
            raise EngineError(f"the engine holds no weights; call load_weights before {verb}")
        return self._policy_version

    def _reserve(self, capacity: Capacity) -> SlotTable:
        """Return an empty table and cache that are large enough: the last ones if possible, so that graphs survive.

        They are not used again if the table still has active sequences: a scheduler that was abandoned half-way may
        have left non-finite keys and values.
        """
        slots, tokens = self._slots(capacity.sequences), capacity.tokens
        length = -(-capacity.length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        table = self._table
        if (
            table is None
            or table.active
            or table.cache.slots < slots
            or table.cache.max_length < length
            or table.max_tokens < tokens
        ):
            self.close()
            table = self._allocate(slots, length, tokens)
        table.clear()
        return table

    def _slots(self, sequences: int) -> int:
        """Return the slots of a cache for this number of sequences.

        On a GPU they are a whole bucket, so that the buckets of later steps, which round differently, do not depend on
        the size of earlier calls.
        """
        most = self._config.max_concurrent
        return batch_bucket(sequences, most) if self._precision.device.type == "cuda" else min(most, sequences)

    def _allocate(self, slots: int, length: int, tokens: int) -> SlotTable:
        device = self._precision.device
        dtype = torch.float32 if device.type == "cpu" else self._precision.kv_dtype
        tiled = self._rounding.tiled
        cache = KVCache(self._shape, slots=slots, max_length=length, dtype=dtype, device=device, tiled=tiled)
        # The whole cache, which tiles may round up: a later call may use all of it.
        self._decoder.reserve(cache.max_length)
        self._table = SlotTable(cache, tokens, self._stop_lookup, self._top_tokens)
        if self._config.cuda_graphs and device.type == "cuda":
            self._graphs = DecodeGraphs(self._decoder, self._table)
        return self._table

    def _completions(
        self, requests: Sequence[GenerateRequest], found: list[Sampled], version: int
    ) -> list[tuple[Completion, ...]]:
        """Return completions in request and sibling order."""
        stops = frozenset(self._stop_lookup.nonzero().squeeze(1).tolist())
        by_place: dict[tuple[int, int], Completion] = {}
        for some in found:
            for sequence, completion in zip(some.sequences, some.completions(stops, version), strict=True):
                by_place[sequence.request, sequence.sibling] = completion
        return [
            tuple(by_place[index, request.first_sibling + sibling] for sibling in range(request.group_size))
            for index, request in enumerate(requests)
        ]


def require_kernels(device: torch.device) -> None:
    """Refuse a GPU without Triton.

    Raises:
        InputError: the device is a GPU and Triton is not installed.
    """
    if device.type == "cuda" and not has_triton():
        raise InputError(
            "the native engine computes on a GPU with Triton, which is not installed; pip install triton, or sample "
            "with engine=vllm"
        )


def _require_computed_on(device: torch.device, shape: DecoderConfig) -> None:
    """Refuse parts of a model that this engine computes on a CPU only.

    Raises:
        InputError: the device is a GPU, and the model has experts or soft-capped scores.
    """
    parts = {"experts": shape.mixture is not None, "soft-capped scores of attention": shape.attention_cap is not None}
    found = [part for part, present in parts.items() if present]
    if found and device.type != "cpu":
        raise InputError(
            f"the native engine computes {' and '.join(found)} on a CPU only, and the model ({shape.architecture}) has "
            "them; set engine=vllm, or device=cpu"
        )


def _distribution(sampling: SamplingConfig, top_tokens: int, *, with_support: bool) -> sampler.Distribution:
    return sampler.Distribution(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        top_tokens=top_tokens,
        reports_support=with_support and sampling.truncates,
    )


def _rounding(precision: Precision, config: NativeEngineConfig) -> Rounding:
    widened = precision.fp32_sums(precision.roles.rollout_dtype)
    return Rounding(
        mode=config.rounding,
        format=precision.roles.rollout_dtype,
        container=torch.float32 if widened else precision.rollout_dtype,
        kv_format=precision.roles.kv_dtype,
    )


def _storage(precision: Precision) -> Storage:
    """Choose the dtypes of the weights' tensors.

    On a CPU the head is FP32, because its products are; so are projections where half products are summed in FP32.
    """
    widened = precision.fp32_sums(precision.roles.rollout_dtype)
    return Storage(
        format=precision.roles.rollout_dtype,
        wire=precision.roles.wire_dtype,
        linear=torch.float32 if widened else precision.rollout_dtype,
        head=torch.float32 if precision.device.type == "cpu" else precision.rollout_dtype,
        device=precision.device,
        apart=precision.exact,
    )
