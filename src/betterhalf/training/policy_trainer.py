"""The trainer of one process: scores tokens, accumulates gradients, takes optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from betterhalf.algorithms.loss_stats import LossStats
from betterhalf.algorithms.policy_loss import policy_loss
from betterhalf.algorithms.presets import Algorithm
from betterhalf.batches import Denominators, LossInputs, MicroBatch, PackedSegment
from betterhalf.config.schema import RunConfig
from betterhalf.distributed.world import ONE_RANK, Collective
from betterhalf.errors import NumericsError
from betterhalf.models import tiled_attention
from betterhalf.models.attention import PackLayout, attention_name, use_packed_attention
from betterhalf.models.compiled_layers import compile_layers
from betterhalf.models.loading import LoadedModel
from betterhalf.precision import coverage, tiled_products
from betterhalf.precision.contract import SideReport, weights_digests
from betterhalf.precision.cpu_embedding import use_cpu_embedding
from betterhalf.precision.cpu_linear import Widened, use_cpu_linear
from betterhalf.precision.cpu_silu import use_cpu_silu
from betterhalf.precision.emulation import emulation_facts, rounding_results
from betterhalf.precision.formats import held_format, narrowest_format
from betterhalf.precision.island_hooks import use_islands
from betterhalf.precision.loss_scaler import LossScaler, build_loss_scaler
from betterhalf.precision.products import has_native_matmul, packed
from betterhalf.precision.roles import Precision
from betterhalf.token_support import PackedSupport
from betterhalf.training.model_limits import head_dim_of, require_no_dropout
from betterhalf.training.reference import ReferencePolicy
from betterhalf.training.support import SupportMask
from betterhalf.training.token_scores import (
    Head,
    LogitsWorkspace,
    logprobs_and_entropies,
    measure_tokens,
    token_logprobs,
)
from betterhalf.training.top_scores import top_logprobs
from betterhalf.training.trainer import OptimReport, TokenScores, TrainerState, WireWeights
from betterhalf.training.weights.replicated import ReplicatedWeights
from betterhalf.training.weights.store import StoreFactory


class PolicyTrainer:
    """The transformers module with FP32 masters, half compute, packing and loss scaling; implements `Trainer`."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        config: RunConfig,
        precision: Precision,
        policy_version: int = 0,
        collective: Collective = ONE_RANK,
        store: StoreFactory = ReplicatedWeights,
        keep_reference: bool = False,
    ) -> None:
        """Take over `model.module`, whose parameters change dtype, and build optimizer and loss scaler.

        With `keep_reference`, a copy of the weights is kept as the reference policy.

        Raises:
            InputError: the model has dropout, which would make pi random; it lacks an FP32 island of the
                configuration; it computes in half where no precision rule covers it; or its layers are to be compiled
                and there is no compiler.
        """
        self.config = config
        self.precision = precision
        self.collective = collective
        self.policy_version = policy_version
        self.module = model.module.to(precision.device)
        require_no_dropout(self.module.config)
        self._results = rounding_results(precision.roles.compute_dtype)
        self.islands = precision.islands(self.module.config.num_hidden_layers, precision.roles.compute_dtype)
        self.weights = store(self.module, precision.roles.compute_dtype, self.islands)
        use_cpu_linear(self.module, precision)
        use_cpu_embedding(self.module, precision)
        if precision.exact:
            use_cpu_silu(self.module)
            self._require_exact()
        # After the replacements, which would lose the hooks of an island's linear layer.
        use_islands(self.module, self.islands, precision.compute_dtype)
        coverage.require_covered(self.module, precision)
        sums = precision.fp32_sums(precision.roles.compute_dtype)
        head_dim = head_dim_of(self.module.config)
        self.attention = attention_name(precision.device, head_dim, fp32_sums=sums, exact=precision.exact)
        use_packed_attention(self.module, self.attention, compiled=config.training.compile_layers)
        if config.training.activation_checkpointing:
            self.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.module.train()
        coverage.require_no_half_products(self.module, precision, lambda: self._few_hidden(2))
        if config.training.compile_layers:
            compile_layers(self.module.get_decoder(), precision.device)
        self.scaler: LossScaler = build_loss_scaler(config.precision.loss_scale, precision.roles.compute_dtype)
        self.optimizer = self._build_optimizer()
        self._head_parameter = self._make_head_parameter()
        self._head_wide = Widened(self._head_parameter)
        self._reference = ReferencePolicy(self.weights) if keep_reference else None
        self._workspace = LogitsWorkspace(logits=config.training.logits_mib * 2**18)

    def _require_exact(self) -> None:
        """Check that this processor computes head and attention independently of the batch, as `CpuLinear` does.

        Raises:
            InputError: it does not.
        """
        vocabulary, hidden = self.module.get_output_embeddings().weight.shape
        tiled_products.block_sizes(vocabulary, hidden, torch.get_num_threads())
        tiled_attention.block_sizes(head_dim_of(self.module.config), torch.get_num_threads())

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
        )

    @torch.no_grad()
    def measure(self, packs: Sequence[MicroBatch], temperature: float | None = None) -> list[TokenScores]:
        """See `Trainer.measure`."""
        temperature = self.config.sampling.temperature if temperature is None else temperature
        with self._results:
            measured = [self._measure(micro, temperature) for micro in self._on_device(packs)]
        return [TokenScores(logprobs_C=logprobs.cpu(), entropies_C=entropies.cpu()) for logprobs, entropies in measured]

    def measure_reference(self, packs: Sequence[MicroBatch]) -> list[TokenScores]:
        """See `Trainer.measure_reference`."""
        assert self._reference is not None, "the trainer was built without a reference policy"
        with self._reference.in_place():
            return self.measure(packs)

    def refresh_reference(self) -> None:
        """See `Trainer.refresh_reference`."""
        assert self._reference is not None, "the trainer was built without a reference policy"
        self._reference.refresh()

    def _on_device(self, packs: Sequence[MicroBatch]) -> list[MicroBatch]:
        # All before the first pass: a copy from host memory waits for the passes launched before it.
        return [on_device(pack, self.precision.device) for pack in packs]

    def _measure(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Return logprobs and entropies, float32 [C], on the device."""
        # Without gradients, compiled layers would be different code, with other rounding points.
        with torch.set_grad_enabled(self.config.training.compile_layers):
            hidden = self._hidden_rows(micro).detach()
        support = SupportMask.of(micro.support)
        return measure_tokens(hidden, self.head(), micro.target_ids_C, temperature, self._workspace, support)

    def score(self, micro: MicroBatch) -> Tensor:
        """Return the logprobs of each completion token, float32 [C], with a graph, for a pack on the device.

        They equal those of `measure` bit for bit.
        """
        with self._results:
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
        """See `Trainer.forward_backward`; each pack's half gradient is added to the FP32 sum at once."""
        stats = LossStats.empty()
        with self._results:
            for micro in self._on_device(packs):
                hidden_CH = self._hidden_rows(micro)
                # Keeps the gradient, as large as the hidden states themselves, until the end of the backward pass.
                hidden_CH.retain_grad()
                output = policy_loss(algorithm, self._loss_inputs(hidden_CH, micro, algorithm), denominators)
                self.scaler.scale_loss(output.loss).backward()  # type: ignore[no-untyped-call]
                assert hidden_CH.grad is not None
                stats += output.stats.with_gradient(hidden_CH.grad)
        return stats

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

    # -- weights for the engine, and the report

    def wire_weights(self) -> WireWeights:
        """See `Trainer.wire_weights`."""
        tensors = self.weights.on_the_wire(self.precision.roles.wire_dtype)
        return WireWeights(policy_version=self.policy_version, tensors=tensors)

    def report(self) -> SideReport:
        """Report what the trainer really runs, read from its live tensors and a forward pass over a few tokens.

        Raises:
            NumericsError: the forward pass gives NaN or infinity, which are on no format's grid.
        """
        hidden, logits = self._probe()
        layers = coverage.linear_layers(self.module, self.module.get_output_embeddings())
        computing = dict(self.weights.computing())
        _, wired = next(self.wire_weights().tensors)
        _, gradient = next(self.weights.gradients())
        _, master = next(self.weights.trainable())
        norms = [value for name, value in computing.items() if "norm" in name]
        buffers = [value for name, value in self.module.named_buffers() if "inv_freq" in name]
        compute, wire = self.precision.roles.compute_dtype, self.precision.roles.wire_dtype
        kinds: dict[str, Tensor] = {
            "weights": next(iter(computing.values())),
            "compute": hidden,
            "lm_head": logits,
            "rope": buffers[0] if buffers else hidden,
            "norm": norms[0] if norms else hidden,
            "master": master,
            "gradients": gradient,
            "optimizer": next((state["exp_avg"] for state in self.optimizer.state.values()), master),
        }
        return SideReport(
            side="trainer",
            dtypes={region: held_format(tensor, compute) for region, tensor in kinds.items()}
            | {"compute": narrowest_format(hidden), "wire": held_format(wired, wire)},
            facts={
                "attention": self.attention,
                "linear_layers": coverage.described(layers),
                "matmul_sums": coverage.layers_sum(layers),
                "rounding": self._rounding(),
                **emulation_facts(compute),
                "fp32_modules": self.islands.described(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "device": str(self.precision.device),
            },
            digests=weights_digests(self.weights.computing()),
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

    # -- state

    def state(self) -> TrainerState:
        """See `Trainer.state`."""
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
        )

    def load(self, state: TrainerState) -> None:
        """See `Trainer.load`."""
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

    def close(self) -> None:
        """Do nothing: the memory is freed with the object."""


def on_device(pack: MicroBatch, device: torch.device) -> MicroBatch:
    """Return the pack with its tensors on `device`; the same object if they are there already."""
    if pack.token_ids_T.device == device:
        return pack
    moved = replace(pack, **_tensors_on(pack, device))
    if pack.support is not None:
        moved = replace(moved, support=replace(pack.support, **_tensors_on(pack.support, device)))
    return moved


def _tensors_on(record: MicroBatch | PackedSupport, device: torch.device) -> dict[str, Any]:
    """Return the tensor fields of a record, moved to the device."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
