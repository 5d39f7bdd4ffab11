"""The trainer of one process, alone or as one of several ranks: scores, accumulates gradients, takes steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from betterhalf.algorithms.loss_stats import LossStats
from betterhalf.algorithms.policy_loss import policy_loss
from betterhalf.algorithms.presets import Algorithm
from betterhalf.batches import Denominators, LossInputs, MicroBatch, PackedSegment
from betterhalf.config.schema import RunConfig
from betterhalf.distributed.world import ONE_RANK, Collective
from betterhalf.errors import NumericsError, RunError
from betterhalf.models.attention import PackLayout
from betterhalf.models.compiled_layers import compile_layers
from betterhalf.models.loading import LoadedModel, SkeletonModel
from betterhalf.models.logits import logit_transform
from betterhalf.models.skeleton import to_device
from betterhalf.precision import coverage
from betterhalf.precision.contract import SideReport
from betterhalf.precision.cpu_linear import Widened
from betterhalf.precision.emulation import rounding_results
from betterhalf.precision.islands import has_post_norms
from betterhalf.precision.loss_scaler import LossScaler, build_loss_scaler
from betterhalf.precision.merge import MergeCount
from betterhalf.precision.products import has_native_matmul, packed
from betterhalf.precision.roles import Precision
from betterhalf.training.on_device import on_device
from betterhalf.training.reference import ReferencePolicy
from betterhalf.training.routing import Routing
from betterhalf.training.shards import ShardFile
from betterhalf.training.state_files import StateFiles, read_state, require_base
from betterhalf.training.support import SupportMask
from betterhalf.training.token_scores import (
    Head,
    LogitsWorkspace,
    logprobs_and_entropies,
    measure_tokens,
    token_logprobs,
)
from betterhalf.training.top_scores import top_logprobs
from betterhalf.training.trainer import OptimReport, TokenScores, TrainerState, WrittenState
from betterhalf.training.trainer_build import prepare_module
from betterhalf.training.trainer_report import side_report
from betterhalf.training.weights.outgoing import OutgoingWeights
from betterhalf.training.weights.replicated import ReplicatedWeights
from betterhalf.training.weights.store import StoreFactory
from betterhalf.wire import WeightStream


class PolicyTrainer:
    """The transformers module with FP32 masters, half compute, packing and loss scaling; implements `Trainer`."""

    def __init__(
        self,
        model: LoadedModel | SkeletonModel,
        *,
        config: RunConfig,
        precision: Precision,
        policy_version: int = 0,
        collective: Collective = ONE_RANK,
        store: StoreFactory = ReplicatedWeights,
        keep_reference: bool = False,
    ) -> None:
        """Take over `model.module`, whose parameters change dtype, and build optimizer and loss scaler.

        The parameters of a `SkeletonModel` get their values from the store that `sharded_over` makes. With
        `keep_reference`, a copy of the weights is kept as the reference policy. With several ranks, every method is
        called on all of them at the same time, with equally many packs (`training.split.empty_pack` fills up).

        Raises:
            InputError: the model has dropout, which would make pi random; it lacks an FP32 island of the
                configuration; it computes in half where no precision rule covers it; its layers are to be compiled
                and there is no compiler; or this processor cannot compute as `engine.rounding = "exact"` requires.
        """
        self.config = config
        self.precision = precision
        self.collective = collective
        self.policy_version = policy_version
        self.module = to_device(model.module, precision.device)
        self._results = rounding_results(precision.roles.compute_dtype)
        hf_config, post_norms = self.module.config, has_post_norms(self.module.config)
        self.islands = precision.islands(
            hf_config.num_hidden_layers, precision.roles.compute_dtype, post_norms=post_norms
        )
        prepared = prepare_module(self.module, config, precision, self.islands)
        self.attention, self._layers = prepared.attention, prepared.layers
        experts = getattr(self.module.config, "num_experts", 0)
        self._routing = Routing(prepared.routing, experts, replays=config.algorithm.routing_replay)
        self.weights = store(self.module, precision.roles.compute_dtype, self.islands)
        self.outgoing = OutgoingWeights(self.module, self.weights, precision.roles.compute_dtype, config.lora)
        coverage.require_covered_products(self.module, precision, lambda: self._few_hidden(2))
        if config.training.compile_layers:
            compile_layers(self.module.get_decoder(), precision.device)
        self.scaler: LossScaler = build_loss_scaler(config.precision.loss_scale, precision.roles.compute_dtype)
        self.optimizer = self._build_optimizer()
        self._head_parameter = self._make_head_parameter()
        self._head_wide = Widened(self._head_parameter)
        self._reference = ReferencePolicy(self.weights) if keep_reference else None
        self._kept: ReferencePolicy | None = None
        self._files = StateFiles(collective.rank, collective.world_size)
        self._workspace = LogitsWorkspace(logits=config.training.logits_mib * 2**18)

    def _build_optimizer(self) -> torch.optim.AdamW:
        settings = self.config.optimizer
        return torch.optim.AdamW(
            [master for _, master in self.weights.trainable()],
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    # -- scoring

    def _hidden_rows(self, micro: MicroBatch) -> Tensor:
        """Compute the final hidden states of the rows that predict completion tokens: [C, H]."""
        out = self.module.get_decoder()(
            input_ids=micro.token_ids_T.unsqueeze(0),
            position_ids=micro.position_ids_T.unsqueeze(0),
            layout=PackLayout(micro.segments),
            use_cache=False,
        )
        hidden_TH: Tensor = out.last_hidden_state[0]
        # An embedding lookup, because siblings repeat a row: its backward pass on a GPU sums in FP32, in a fixed order.
        return functional.embedding(micro.loss_rows_C, hidden_TH)

    def _make_head_parameter(self) -> Tensor:
        """Return the head's weight, [V, H]; a separate leaf if it is tied to the embedding."""
        weight: torch.nn.Parameter = self.module.get_output_embeddings().weight
        tied = weight is self.module.get_input_embeddings().weight
        return self.weights.second_use(weight) if tied else weight

    def head(self) -> Head:
        """Return the head's weight for each product; on a CPU, logits use a copy widened to FP32 after each update."""
        weight = self._head_parameter.detach()
        wide = weight if weight.is_cuda or weight.dtype == torch.float32 else self._head_wide()
        native = weight.is_cuda or (
            has_native_matmul(weight.dtype) and not self.precision.fp32_sums(self.precision.roles.compute_dtype)
        )
        tiled = packed(wide) if self.precision.exact else None
        return Head(
            weight=self._head_parameter,
            logits_weight=wide,
            grad_weight=weight if native else wide,
            tiled_weight=tiled,
            transform=logit_transform(self.module.config),
        )

    @torch.no_grad()
    def measure(self, packs: Sequence[MicroBatch], temperature: float | None = None) -> list[TokenScores]:
        """See `Trainer.measure`."""
        temperature = self.config.sampling.temperature if temperature is None else temperature
        with self._results:
            measured = [self._measure(micro, temperature) for micro in self._on_device(packs)]
        return [scores.on_host() for scores in measured]

    def measure_reference(self, packs: Sequence[MicroBatch]) -> list[TokenScores]:
        """See `Trainer.measure_reference`."""
        assert self._reference is not None, "the trainer was built without a reference policy"
        with self._reference.in_place():
            return self.measure(packs)

    def refresh_reference(self) -> None:
        """See `Trainer.refresh_reference`."""
        assert self._reference is not None, "the trainer was built without a reference policy"
        self._reference.refresh()

    def keep_version(self) -> None:
        """See `Trainer.keep_version`; the copy takes memory from the first call on."""
        if self._kept is None:
            self._kept = ReferencePolicy(self.weights)
        else:
            self._kept.refresh()

    def measure_kept(self, packs: Sequence[MicroBatch]) -> list[TokenScores]:
        """See `Trainer.measure_kept`."""
        assert self._kept is not None, "keep_version() comes first"
        with self._kept.in_place():
            return self.measure(packs)

    def _on_device(self, packs: Sequence[MicroBatch]) -> list[MicroBatch]:
        # All before the first pass: a copy from host memory waits for the passes launched before it.
        return [on_device(pack, self.precision.device) for pack in packs]

    def _measure(self, micro: MicroBatch, temperature: float) -> TokenScores:
        """Return the scores of a pack, on the device."""
        # Without gradients, compiled layers would be different code, with other rounding points.
        gradients = self.config.training.compile_layers
        with torch.set_grad_enabled(gradients), self._routing.of(micro), self._routing.recording() as found:
            hidden = self._hidden_rows(micro).detach()
        none = hidden.new_zeros(0).float()
        if not hidden.shape[0]:
            return TokenScores(logprobs_C=none, entropies_C=none)
        support, head = SupportMask.of(micro.support), self.head()
        logprobs, entropies = measure_tokens(hidden, head, micro.target_ids_C, temperature, self._workspace, support)
        experts, count = self._routing.chosen(found), self._routing.num_experts
        return TokenScores(logprobs_C=logprobs, entropies_C=entropies, experts_TLK=experts, num_experts=count)

    def score(self, micro: MicroBatch) -> Tensor:
        """Return the logprobs of each completion token, float32 [C], with a graph, for a pack on the device.

        They equal those of `measure` bit for bit.
        """
        with self._results, self._routing.of(micro):
            return self._score(self._hidden_rows(micro), micro)

    def _score(self, hidden_CH: Tensor, micro: MicroBatch) -> Tensor:
        """Return the logprobs of the completion tokens from their final hidden states, float32 [C], with a graph."""
        temperature = self.config.sampling.temperature
        support = SupportMask.of(micro.support)
        return token_logprobs(hidden_CH, self.head(), micro.target_ids_C, temperature, self._workspace, support)

    # -- learning

    def forward_backward(
        self, packs: Sequence[MicroBatch], algorithm: Algorithm, denominators: Denominators
    ) -> LossStats:
        """See `Trainer.forward_backward`; the half gradient of each pack is added to the FP32 sum immediately."""
        stats = LossStats.empty()
        with self._results:
            for micro in self._on_device(packs):
                # The backward pass repeats the forward pass with `activation_checkpointing`.
                with self._routing.of(micro):
                    stats += self._accumulate(micro, algorithm, denominators)
        return stats

    def _accumulate(self, micro: MicroBatch, algorithm: Algorithm, denominators: Denominators) -> LossStats:
        """Add the gradient of one pack to the sum, and return its statistics."""
        hidden_CH = self._hidden_rows(micro)
        if not hidden_CH.shape[0]:
            # An empty pass: only joins the collectives of the other ranks, in both directions.
            hidden_CH.float().sum().backward()  # type: ignore[no-untyped-call]
            return LossStats.empty()
        # Keeps the gradient, as large as the hidden states themselves, until the end of the backward pass.
        hidden_CH.retain_grad()
        output = policy_loss(algorithm, self._loss_inputs(hidden_CH, micro, algorithm), denominators)
        self.scaler.scale_loss(output.loss).backward()  # type: ignore[no-untyped-call]
        assert hidden_CH.grad is not None
        return output.stats.with_gradient(hidden_CH.grad)

    def _loss_inputs(self, hidden_CH: Tensor, micro: MicroBatch, algorithm: Algorithm) -> LossInputs:
        """Add to a pack the current logprobs of its tokens, and what else the loss reads."""
        temperature, more = self.config.sampling.temperature, dict[str, Tensor]()
        if algorithm.entropy_coefficient > 0:
            support = SupportMask.of(micro.support)
            logprobs_C, more["current_entropies_C"] = logprobs_and_entropies(
                hidden_CH, self.head(), micro.target_ids_C, temperature, self._workspace, support
            )
        else:
            logprobs_C = self._score(hidden_CH, micro)
        if micro.top_ids_CK is not None:
            more["current_top_logprobs_CK"] = top_logprobs(
                hidden_CH, self.head(), micro.top_ids_CK, temperature, self._workspace
            )
        return LossInputs.of(micro, logprobs_C, **more)

    def optim_step(self, learning_rate: float) -> OptimReport:
        """See `Trainer.optim_step`; the loss scale is updated last."""
        max_norm = self.config.optimizer.max_grad_norm
        found = self.scaler.unscale(self.weights.gradients(), self.collective, max_norm=max_norm)
        if not found.found_inf:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.weights.publish()
            self.policy_version += 1
        self.weights.zero_grad()
        self.scaler.update(found.found_inf)
        return OptimReport(
            skipped=found.found_inf,
            first_offender=found.first_offender,
            grad_norm=found.norm,
            subnormal_fraction=found.subnormal_fraction,
            zero_fraction=found.zero_fraction,
            overflow_fraction=found.overflow_fraction,
            loss_scale=self.scaler.scale,
            policy_version=self.policy_version,
        )

    def weight_stream(self) -> WeightStream:
        """See `Trainer.weight_stream`; read it before the next update, which changes the masters that it rounds."""
        return self.outgoing.stream(self.precision.roles, self.policy_version)

    def merge_count(self) -> MergeCount | None:
        """See `Trainer.merge_count`."""
        return self.outgoing.count

    def report(self) -> SideReport:
        """Report what the trainer really runs, read from its live tensors and a forward pass over a few tokens.

        Raises:
            NumericsError: the forward pass gives NaN or infinity, which are on no format's grid.
        """
        hidden, logits = self._probe()
        return side_report(
            module=self.module,
            weights=self.weights,
            outgoing=self.outgoing,
            precision=self.precision,
            optimizer=self.optimizer,
            layers=self._layers,
            hidden=hidden,
            logits=logits,
            facts={
                "attention": self.attention,
                "rounding": self._rounding(),
                "fp32_modules": self.islands.described(),
                **self.outgoing.facts(),
            },
        )

    def _rounding(self) -> str:
        if self.precision.exact:
            return "exact"
        return "transformers, compiled" if self.config.training.compile_layers else "transformers"

    @torch.no_grad()
    def _probe(self) -> tuple[Tensor, Tensor]:
        """Compute final hidden states and logits of the first few ids of the vocabulary."""
        hidden = self._few_hidden(8)
        if not bool(hidden.isfinite().all()):
            raise NumericsError(
                f"the trainer's hidden states are not finite in {self.precision.roles.compute_dtype}; check the "
                "model's files for NaN, train in a wider format (precision=bf16 or precision=fp32), or make the "
                "modules that overflow FP32 islands with precision.fp32_modules"
            )
        return hidden, self.head().logits(hidden)

    def _few_hidden(self, most: int) -> Tensor:
        """Compute final hidden states of the first ids of the vocabulary, at most `most`: [T, H]."""
        count = min(most, self.module.get_input_embeddings().weight.shape[0])
        ids = torch.arange(count, device=self.precision.device).unsqueeze(0)
        whole = PackLayout((PackedSegment(length=count),))
        with self._results:
            out = self.module.get_decoder()(input_ids=ids, position_ids=ids, layout=whole, use_cache=False)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def state(self) -> TrainerState:
        """See `Trainer.state`; a trainer of several ranks returns the rows of this rank."""
        optimizer: dict[str, Tensor] = {}
        for name, master in self.weights.trainable():
            for key, value in self.optimizer.state.get(master, {}).items():
                optimizer[f"{key}/{name}"] = value
        return TrainerState(
            model=self.weights.state(),
            optimizer=optimizer,
            loss_scaler=self.scaler.state_dict(),
            policy_version=self.policy_version,
            reference=self._reference.state() if self._reference else {},
            reference_digest=self._reference.digest() if self._reference else "",
            base_digest=self.outgoing.base_digest(),
        )

    def load(self, state: TrainerState) -> None:
        """See `Trainer.load`."""
        require_base(state, self.outgoing.base_digest())
        if self._reference is not None:
            self._reference.load(state.reference, state.reference_digest, state.source)
        self.weights.load(state.model, state.source)
        self.weights.zero_grad()
        # A state from before the first step holds no optimizer states; those of later steps must not outlive it.
        self.optimizer.state.clear()
        for name, master in self.weights.trainable():
            values = {
                key.removesuffix(f"/{name}"): value.to(master.device, copy=True)
                for key, value in state.optimizer.items()
                if key.endswith(f"/{name}")
            }
            if values:
                self.optimizer.state[master] = values
        self.scaler.load_state_dict(state.loss_scaler)
        self.policy_version = state.policy_version

    def write_state(self, folder: Path) -> WrittenState:
        """See `Trainer.write_state`."""
        return self._files.write(folder, self.state(), self.weights.ranges())

    def wait_written(self) -> tuple[ShardFile, ...]:
        """See `Trainer.wait_written`."""
        return self._files.wait()

    def read_state(self, folder: Path, written: WrittenState, source: str) -> None:
        """See `Trainer.read_state`."""
        self.load(read_state(folder, written, self.weights.ranges(), source))

    def restart(self) -> None:
        """Refuse: this trainer runs in the process of the run."""
        raise RunError("the trainer has no process of its own to restart; resume from a checkpoint")

    def close(self) -> None:
        """Do nothing: the memory is freed with the object."""
