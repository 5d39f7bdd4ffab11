"""The native rollout engine: continuous batching over our own decoder, seeded draws, behavior logprobs in FP32."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from betterhalf import ops
from betterhalf.config.schema import NativeEngineConfig, SamplingConfig
from betterhalf.errors import EngineError, InputError
from betterhalf.kernels import has_triton
from betterhalf.precision.contract import SideReport, weights_digests
from betterhalf.precision.formats import dtype_name
from betterhalf.precision.roles import Precision
from betterhalf.rollout import sampler
from betterhalf.rollout.engine import stop_ids
from betterhalf.rollout.native.config import decoder_config
from betterhalf.rollout.native.cuda_graphs import DecodeGraphs, batch_bucket
from betterhalf.rollout.native.decoder import Decoder
from betterhalf.rollout.native.kv_cache import KVCache
from betterhalf.rollout.native.pending_step import PendingStep
from betterhalf.rollout.native.queue import PromptQueue
from betterhalf.rollout.native.report import engine_report
from betterhalf.rollout.native.rounding import Rounding
from betterhalf.rollout.native.slots import ActiveSequence, Sampled, SlotTable
from betterhalf.rollout.native.weights import DecoderWeights, Storage
from betterhalf.types import Completion, GenerateRequest

_MAX_LOGITS = 2**26
"""FP32 logits held at once (256 MiB); more rows are sampled in parts."""
_LENGTH_MULTIPLE = 16
"""Cache lengths are rounded up to this: fewer lengths mean fewer allocations."""


class NativeEngine:
    """Samples completions from its own copy of the policy; implements `rollout.engine.RolloutEngine`."""

    def __init__(
        self,
        hf_config: Any,
        *,
        precision: Precision,
        config: NativeEngineConfig,
        stop_token_ids: Iterable[int],
    ) -> None:
        """Allocate weights for the architecture of a transformers configuration; they arrive by `load_weights`.

        Raises:
            InputError: the architecture is not one the engine computes, or lacks an FP32 island of the configuration;
                a stop token is not in its vocabulary; or there is no Triton for a GPU.
        """
        require_kernels(precision.device)
        self._precision = precision
        self._config = config
        self._shape = decoder_config(hf_config)
        self._rounding = _rounding(precision, config)
        islands = precision.islands(self._shape.num_layers, precision.roles.rollout_dtype)
        self._weights = DecoderWeights(self._shape, _storage(precision), islands)
        self._decoder = Decoder(self._shape, self._weights, self._rounding, islands)
        self._stop_lookup = torch.zeros(self._shape.vocab_size, dtype=torch.bool, device=precision.device)
        self._stop_lookup[list(stop_ids(stop_token_ids, self._shape.vocab_size))] = True
        self._policy_version: int | None = None
        self._table: SlotTable | None = None
        self._graphs: DecodeGraphs | None = None

    @property
    def decoder(self) -> Decoder:
        """The decoder itself, whose `tap` sees every operation."""
        return self._decoder

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, policy_version: int) -> None:
        """Replace all weights in place; see `RolloutEngine.load_weights`."""
        self._policy_version = None
        self._weights.load(weights)
        self._policy_version = policy_version

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """log mu of each given token but the first; see `RolloutEngine.score`."""
        if self._policy_version is None:
            raise EngineError("the engine holds no weights; call load_weights before score")
        return [self._score_one(index, tuple(token_ids)) for index, token_ids in enumerate(sequences)]

    def _score_one(self, index: int, token_ids: tuple[int, ...]) -> tuple[float, ...]:
        if not 1 < len(token_ids) <= self._shape.max_positions:
            raise InputError(
                f"sequence {index} has {len(token_ids)} tokens; the engine scores 2 to {self._shape.max_positions}, "
                "the model's context; shorten or drop it"
            )
        self._decoder.reserve(len(token_ids))
        tokens = torch.tensor(token_ids, device=self._precision.device)
        hidden = self._decoder.hidden_rows(tokens, (len(token_ids),))[:-1]
        rows = max(1, _MAX_LOGITS // self._shape.vocab_size)
        parts = zip(torch.split(hidden, rows), torch.split(tokens[1:], rows), strict=True)
        logprobs = torch.cat([ops.token_logprobs(self._decoder.logits(part), taken) for part, taken in parts])
        if not bool(logprobs.isfinite().all()):
            raise EngineError(
                f"sequence {index}: its logprobs are not finite in {dtype_name(self._rounding.dtype)}: "
                f"{self._weights.why_not_finite()}"
            )
        return tuple(logprobs.tolist())

    def digests(self) -> dict[str, str]:
        """Digest of each weight as held; see `RolloutEngine.digests`."""
        return weights_digests(self._weights.narrowed())

    def report(self) -> SideReport:
        """What the engine really runs, read from its tensors."""
        return engine_report(self._decoder, self._precision, self._config)

    def sleep(self) -> None:
        """Nothing: cache and graphs are small beside the trainer's activations, and making them anew costs more."""

    def wake(self) -> None:
        """Nothing; see `sleep`."""

    def restart(self) -> None:
        """Refused: this engine lives in the run's own process."""
        raise EngineError("the native engine has no process of its own to start again; resume from a checkpoint")

    def close(self) -> None:
        """Release the cache and the graphs; weights stay, so the engine can still be used."""
        self._graphs = None
        self._table = None

    @torch.inference_mode()
    def generate(self, requests: Sequence[GenerateRequest], sampling: SamplingConfig) -> list[tuple[Completion, ...]]:
        """Sample `group_size` completions for each request; see `RolloutEngine.generate`."""
        if self._policy_version is None:
            raise EngineError("the engine holds no weights; call load_weights before generate")
        sequences = self._sequences(requests, sampling.max_tokens)
        if not sequences:
            return [() for _ in requests]
        table = self._reserve(sequences)
        queue = PromptQueue(self._decoder, requests, sequences, self._precision.device)
        wanted = _distribution(sampling)
        found: list[Sampled] = []
        pending: deque[PendingStep] = deque()
        try:
            while queue or table.active:
                while queue and table.free:
                    found += self._retire(table, self._admit(queue, table, wanted))
                if table.active:
                    pending.append(self._step(table, wanted))
                while len(pending) > (self._lag if table.active else 0):
                    found += self._retire(table, pending.popleft())
        except BaseException:
            # Non-finite keys and values must not outlive the sequence that made them.
            self.close()
            raise
        return self._completions(requests, found)

    def _sequences(self, requests: Sequence[GenerateRequest], max_tokens: int) -> list[ActiveSequence]:
        context, vocabulary = self._shape.max_positions, self._shape.vocab_size
        sequences = []
        for index, request in enumerate(requests):
            length = len(request.token_ids)
            if not 0 < length < context:
                raise InputError(
                    f"{request.label(index)} has {length} tokens, but the model's context of {context} must hold it "
                    "and one token more; shorten or drop it"
                )
            if not 0 <= min(request.token_ids) <= max(request.token_ids) < vocabulary:
                raise InputError(
                    f"{request.label(index)} holds a token outside the model's vocabulary of {vocabulary}; "
                    "use the model's own tokenizer"
                )
            sequences += [
                ActiveSequence(
                    request=index,
                    label=request.label(index),
                    sibling=sibling,
                    prompt_length=length,
                    max_tokens=min(max_tokens, context - length),
                    key=sampler.sequence_key(request.key, sibling),
                )
                for sibling in range(request.group_size)
            ]
        return sequences

    def _reserve(self, sequences: list[ActiveSequence]) -> SlotTable:
        """A table and cache that are large enough; the last ones if they are, so that graphs survive."""
        slots = self._slots(len(sequences))
        length = max(s.prompt_length + s.max_tokens for s in sequences)
        length = -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        tokens = max(s.max_tokens for s in sequences)
        table = self._table
        if table is None or table.cache.slots < slots or table.cache.max_length < length or table.max_tokens < tokens:
            self.close()
            table = self._allocate(slots, length, tokens)
        table.clear()
        return table

    def _slots(self, sequences: int) -> int:
        """Of a cache for so many sequences. On a GPU a whole bucket, so that the buckets of later steps, which round
        differently, do not depend on how large earlier calls were."""
        most = self._config.max_concurrent
        return batch_bucket(sequences, most) if self._precision.device.type == "cuda" else min(most, sequences)

    def _allocate(self, slots: int, length: int, tokens: int) -> SlotTable:
        device = self._precision.device
        dtype = torch.float32 if device.type == "cpu" else self._precision.kv_dtype
        cache = KVCache(self._shape, slots=slots, max_length=length, dtype=dtype, device=device)
        self._decoder.reserve(length)
        self._table = SlotTable(cache, tokens, self._stop_lookup)
        if self._config.cuda_graphs and device.type == "cuda":
            self._graphs = DecodeGraphs(self._decoder, self._table)
        return self._table

    @property
    def _lag(self) -> int:
        """Steps that are launched before the host looks at an earlier one: a graph would else wait for it. Sequences
        that have ended stand still meanwhile."""
        return 0 if self._graphs is None else 1

    def _admit(self, queue: PromptQueue, table: SlotTable, wanted: sampler.Distribution) -> PendingStep:
        """Fill the free slots from the queue and sample the first token of each new sequence."""
        admitted, hidden = queue.take(table.free, table.cache, table.active)
        slots = table.admit(admitted)
        return PendingStep(self._draw(table, slots, hidden, wanted), admitted)

    def _step(self, table: SlotTable, wanted: sampler.Distribution) -> PendingStep:
        """One token for every active sequence."""
        if self._graphs is not None:
            events = self._graphs.run(self._decode, wanted)
        else:
            attended = min(table.longest + 1, table.cache.max_length)
            events = self._decode(table, table.active, attended, wanted)
        table.advance()
        return PendingStep(events, list(table.sequences))

    def _decode(self, table: SlotTable, count: int, attended: int, wanted: sampler.Distribution) -> Tensor:
        """One token for the first `count` slots, all of it on the device: what `SlotTable.record` says of each."""
        slots = slice(0, count)
        hidden = self._decoder.decode(table.tokens[slots], table.lengths[slots], table.cache, attended)
        table.appended(slots)
        return self._draw(table, slots, hidden, wanted)

    def _draw(self, table: SlotTable, slots: slice, hidden: Tensor, wanted: sampler.Distribution) -> Tensor:
        """Draw a token for each of these slots, a part of them at a time when their logits would take much memory."""
        keys, positions = table.keys[slots], table.positions[slots]
        rows, events = max(1, _MAX_LOGITS // self._shape.vocab_size), []
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            draw = sampler.draw_at(self._decoder.logits(hidden[part]), keys[part], positions[part], wanted)
            where = slice(slots.start + start, min(slots.start + start + rows, slots.stop))
            events.append(table.record(where, draw))
        return torch.cat(events) if len(events) > 1 else events[0]

    def _retire(self, table: SlotTable, pending: PendingStep) -> list[Sampled]:
        """Take out the sequences that ended in a step."""
        ended, broken = pending.result()
        if broken:
            self._refuse(table, broken[0])
        return [table.retire(ended)] if ended else []

    def _refuse(self, table: SlotTable, sequence: ActiveSequence) -> None:
        """Say of which token the logits were not finite."""
        (slot,) = [slot for slot, other in enumerate(table.sequences) if other is sequence]
        position = int(table.positions[slot]) - 1
        raise EngineError(
            f"{sequence.label}, sibling {sequence.sibling}: the logits of completion token {position} are "
            f"not finite in {dtype_name(self._rounding.dtype)}: {self._weights.why_not_finite()}"
        )

    def _completions(self, requests: Sequence[GenerateRequest], found: list[Sampled]) -> list[tuple[Completion, ...]]:
        version = self._policy_version
        assert version is not None
        stops = set(self._stop_lookup.nonzero().squeeze(1).tolist())
        by_place: dict[tuple[int, int], Completion] = {}
        for some in found:
            rows = (some.sequences, some.counts.tolist(), some.token_ids.tolist(), some.logprobs.tolist())
            for sequence, count, token_ids, logprobs in zip(*rows, strict=True):
                by_place[sequence.request, sequence.sibling] = Completion(
                    token_ids=tuple(token_ids[:count]),
                    behavior_logprobs=tuple(logprobs[:count]),
                    finish_reason="stop" if token_ids[count - 1] in stops else "length",
                    policy_version=version,
                )
        return [
            tuple(by_place[index, sibling] for sibling in range(request.group_size))
            for index, request in enumerate(requests)
        ]


def require_kernels(device: torch.device) -> None:
    """Refuse a GPU without Triton."""
    if device.type == "cuda" and not has_triton():
        raise InputError(
            "the native engine computes on a GPU with Triton, which is not installed; pip install triton, or sample "
            "with engine=vllm"
        )


def _distribution(sampling: SamplingConfig) -> sampler.Distribution:
    return sampler.Distribution(
        temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p
    )


def _rounding(precision: Precision, config: NativeEngineConfig) -> Rounding:
    widened = precision.fp32_sums(precision.roles.rollout_dtype)
    return Rounding(
        mode=config.rounding,
        dtype=precision.rollout_dtype,
        container=torch.float32 if widened else precision.rollout_dtype,
        kv_dtype=precision.kv_dtype,
    )


def _storage(precision: Precision) -> Storage:
    """On a CPU the head is FP32, for its products are; projections are too where half products have FP32 sums."""
    widened = precision.fp32_sums(precision.roles.rollout_dtype)
    return Storage(
        grid=precision.rollout_dtype,
        linear=torch.float32 if widened else precision.rollout_dtype,
        head=torch.float32 if precision.device.type == "cpu" else precision.rollout_dtype,
        device=precision.device,
    )
