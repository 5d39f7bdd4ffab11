"""The run's side of vLLM: starts it in a child process, sends it requests, checks its answers.

vLLM is never imported here. A broken installation, a crash or a leak of vLLM stays in the child. When the child ends,
the run starts a new one, loads the weights and repeats its requests.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from betterhalf.config.schema import LoraConfig, SamplingConfig, VllmEngineConfig
from betterhalf.distributed.group import Membership
from betterhalf.errors import EngineDiedError, EngineError, EngineNumericsError
from betterhalf.models.context import context_length
from betterhalf.precision.contract import SideReport
from betterhalf.precision.formats import dtype_name
from betterhalf.precision.roles import Precision
from betterhalf.rollout.requests import check_requests, check_sequences, require_finite_scores, stop_ids
from betterhalf.rollout.sampler import sequence_key
from betterhalf.rollout.vllm import adapters, nccl, options, transfer
from betterhalf.rollout.vllm.process import ServerProcess
from betterhalf.rollout.weight_group import Layout
from betterhalf.types import Completion, GenerateRequest, TokenExperts, TransferName

_PROBE_TOKENS = 8


class VllmEngine:
    """Engine that samples with vLLM in its own process; implements `rollout.engine.RolloutEngine`.

    The process starts when it is first needed, because a start takes some 10 seconds, which bad input elsewhere would
    waste.
    """

    def __init__(
        self,
        hf_config: Any,
        *,
        precision: Precision,
        config: VllmEngineConfig,
        stop_token_ids: Iterable[int],
        seed: int = 0,
        lora: LoraConfig | None = None,
        transfer: TransferName = "object_store",
        shares_device: bool = True,
        module: str = "betterhalf.rollout.vllm.server",
    ) -> None:
        """Check everything that can be checked without starting vLLM.

        Args:
            hf_config: transformers configuration of the model.
            precision: dtype roles and device.
            config: configuration of the engine.
            stop_token_ids: tokens that end a completion.
            seed: vLLM's own seed; draws depend on the keys of the requests alone.
            lora: adapters to serve beside the weights; none by default.
            transfer: path of the weights from other processes than this one.
            shares_device: True if the trainer uses the same GPU.
            module: module that the child process runs.

        Raises:
            InputError: vLLM cannot do what is asked.
            MissingExtraError: it is not installed.
        """
        options.check_supported(precision)
        options.check_installed()
        if lora is not None:
            adapters.check_served(lora, config)
        self._lora = lora
        self._hf_config, self._precision, self._config, self._seed = hf_config, precision, config, seed
        self._stops = stop_ids(stop_token_ids, hf_config.vocab_size)
        self._transfer: TransferName = transfer
        self._shares_device = shares_device
        self._module = module
        self._context = context_length(hf_config)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: ServerProcess | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._died: str | None = None
        self._asleep = False
        self._policy_version: int | None = None
        self._wire: torch.dtype | None = None

    @property
    def pid(self) -> int | None:
        """Process id of vLLM; None while it does not run."""
        return self._process.pid if self._process else None

    # -- the process

    def _start(self) -> ServerProcess:
        """Return the process, started if necessary."""
        if self._died is not None:
            raise EngineDiedError(self._died)
        if self._process is None:
            self._folder = tempfile.TemporaryDirectory(prefix="betterhalf-vllm-")
            folder = Path(self._folder.name)
            try:
                options.write_model(folder, self._hf_config)
                variables = options.environment(self._config, self._precision)
                self._process = ServerProcess(self._module, variables, folder / "vllm.log")
                llm = options.llm_options(
                    folder,
                    self._hf_config,
                    self._config,
                    self._precision,
                    self._seed,
                    transfer=self._transfer,
                    shares_device=self._shares_device,
                    adapters=None if self._lora is None else adapters.llm_options(self._lora),
                )
                self._shapes = self._ask_started("start", seconds=self._config.start_seconds, options=llm)
            except EngineDiedError as error:
                # A restart would not help: it would fail for the same reason.
                self.close()
                self._died = None
                raise EngineError(f"vLLM does not start: {error}") from error
            except BaseException:
                self.close()
                raise
        return self._process

    def _ask(self, verb: str, **values: Any) -> Any:
        self._start()
        return self._ask_started(verb, **values)

    def _ask_started(self, verb: str, **values: Any) -> Any:
        assert self._process is not None
        try:
            return self._process.ask(verb, **values)
        except EngineDiedError as error:
            self._died = str(error)
            self._policy_version = None
            raise

    def restart(self) -> None:
        """End what is left of the old process and start a new one; see `RolloutEngine.restart`."""
        self.close()
        self._died = None
        self._start()

    def close(self) -> None:
        """End the process and delete its files."""
        self._policy_version, self._asleep = None, False
        if self._process is not None:
            self._process.close()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    # -- sampling and scoring

    def generate(self, requests: Sequence[GenerateRequest], sampling: SamplingConfig) -> list[tuple[Completion, ...]]:
        """Sample `group_size` completions for each request; see `RolloutEngine.generate`."""
        options.check_sampling(sampling)
        version = self._require_weights("generate")
        check_requests(requests, self._context, self._hf_config.vocab_size)
        places = [(index, sibling) for index, request in enumerate(requests) for sibling in range(request.group_size)]
        if not places:
            return [() for _ in requests]
        self.wake()
        sampled = self._ask(
            "generate",
            requests=[self._wanted(requests[index], sibling, sampling.max_tokens) for index, sibling in places],
            distribution=options.distribution(sampling),
            stop_token_ids=self._stops,
            with_experts=any(request.with_experts for request in requests),
        )
        found = {
            place: self._completion(requests[place[0]], *place, one, version)
            for place, one in zip(places, sampled, strict=True)
        }
        return [
            tuple(found[index, sibling] for sibling in range(request.group_size))
            for index, request in enumerate(requests)
        ]

    def _wanted(self, request: GenerateRequest, sibling: int, max_tokens: int) -> tuple[tuple[int, ...], int, int]:
        """Return prompt, length limit, and a seed of 63 bits, because vLLM reads -1 as no seed."""
        seed = sequence_key(request.key, request.first_sibling + sibling, request.first_position) & (2**63 - 1)
        return request.token_ids, request.limit(max_tokens, self._context), seed

    def _completion(
        self,
        request: GenerateRequest,
        index: int,
        sibling: int,
        sampled: tuple[tuple[int, ...], tuple[float, ...], bool, Any],
        version: int,
    ) -> Completion:
        token_ids, logprobs, stopped, experts = sampled
        label = f"{request.label(index)}, sibling {request.first_sibling + sibling}"
        if not token_ids:
            raise EngineError(f"{label}: vLLM returned no token; its log, above, may say why. Continue with --resume")
        bad = next((i for i, logprob in enumerate(logprobs) if not math.isfinite(logprob)), None)
        if bad is not None:
            raise EngineNumericsError(
                f"{label}: the logprob of completion token {bad} is not finite in "
                f"{self._precision.roles.rollout_dtype}; {_NOT_FINITE}"
            )
        return Completion(
            token_ids=token_ids,
            behavior_logprobs=logprobs,
            finish_reason="stop" if stopped else "length",
            policy_version=version,
            experts=None if experts is None else TokenExperts(experts_NLK=torch.from_numpy(experts)),
        )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Return log mu of each given token but the first; see `RolloutEngine.score`."""
        self._require_weights("score")
        check_sequences(sequences, self._context, self._hf_config.vocab_size)
        if not sequences:
            return []
        self.wake()
        scores: list[tuple[float, ...]] = self._ask("score", sequences=[tuple(ids) for ids in sequences])
        require_finite_scores(scores, self._precision.roles.rollout_dtype, lambda: _NOT_FINITE)
        return scores

    def _require_weights(self, verb: str) -> int:
        if self._died is not None:
            raise EngineDiedError(self._died)
        if self._policy_version is None:
            raise EngineError(f"the engine holds no weights; call load_weights before {verb}")
        return self._policy_version

    # -- weights

    @torch.no_grad()
    def load_weights(
        self, weights: Iterable[tuple[str, Tensor]], *, policy_version: int, partial: bool = False
    ) -> None:
        """Replace weights in place; see `RolloutEngine.load_weights`."""
        self._start()
        self.wake()
        held, self._policy_version = self._policy_version is not None, None
        arriving = self._without_adapters(transfer.checked(weights, self._expected(), held=partial and held))
        by_handle = options.transfer_backend(self._config, self._precision, self._transfer) == "ipc"
        if by_handle and self._lora is None:
            self._wire = transfer.send_handles(self._ask, arriving, self._precision.device)
        else:
            self._wire = transfer.send_file(self._ask, arriving) or self._wire
        if self._lora is not None:
            adapters.send_adapter(self._ask, self._arrived_adapters, self._lora)
        self._policy_version = policy_version

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of the weights, and of the adapters that are served beside them."""
        return self._shapes | ({} if self._lora is None else adapters.adapter_shapes(self._shapes, self._lora))

    def _without_adapters(self, arriving: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights, and set the adapters aside."""
        self._arrived_adapters: dict[str, Tensor] = {}
        for name, tensor in arriving:
            if name in self._shapes:
                yield name, tensor
            else:
                self._arrived_adapters[name] = tensor

    # -- weights from other processes; see `rollout.weight_group.WeightReceiver`

    def prepare(self, layout: Layout) -> None:
        """Start vLLM, and check names and shapes; see `WeightReceiver.prepare`."""
        self._start()
        self.wake()
        transfer.check_layout(layout, self._shapes)

    def join(self, membership: Membership) -> None:
        """Make every worker join the group; see `WeightReceiver.join`."""
        self._update("join_group", info=nccl.init_info(membership))

    def receive(self, layout: Layout, *, policy_version: int) -> None:
        """Receive in every worker, and load; see `WeightReceiver.receive`."""
        self.begin_update()
        self.update(nccl.update_info(layout))
        self.finish_update(layout[0].dtype, policy_version=policy_version)

    def begin_update(self) -> None:
        """Begin an update, whose parts arrive through `update`."""
        self.wake()
        self._policy_version = None
        self._update("begin_update")

    def update(self, info: dict[str, Any]) -> None:
        """Load one part, given as an update info of vLLM's weight-transfer API."""
        self._update("update", info=info)

    def finish_update(self, wire_dtype: torch.dtype, *, policy_version: int) -> None:
        """End an update in which every weight has arrived."""
        self._update("finish_update")
        self._wire, self._policy_version = wire_dtype, policy_version

    def abandon_update(self) -> None:
        """End vLLM, because an unfinished update leaves its model inconsistent; the next load starts it again."""
        self.close()

    def _update(self, verb: str, **values: Any) -> None:
        """Send one request of an update, and end vLLM if it fails: its model may be inconsistent, or a worker hang."""
        try:
            self._ask(verb, **values)
        except BaseException as error:
            self.close()
            self._died = None
            if isinstance(error, EngineDiedError):
                raise EngineError(str(error)) from error
            raise

    def leave(self) -> None:
        """See `WeightReceiver.leave`."""
        if self._process is not None:
            self._update("leave_group")

    def give_up(self) -> None:
        """Kill vLLM, because nothing else interrupts it in NCCL; see `WeightReceiver.give_up`."""
        process = self._process
        if process is not None:
            process.kill()

    def digests(self) -> dict[str, str]:
        """Return the digest of each weight that vLLM multiplies by; see `RolloutEngine.digests`."""
        self.wake()
        found: dict[str, str] = self._ask("digests")
        return found

    def report(self) -> SideReport:
        """Report what vLLM really runs, read in its process from live tensors during a pass of a few tokens.

        Raises:
            EngineNumericsError: it computes NaN or infinity, which no format's grid contains.
        """
        self.wake()
        count = min(_PROBE_TOKENS, self._hf_config.vocab_size, self._context)
        found = self._ask("report", token_ids=tuple(range(count)))
        if not found["finite"]:
            raise EngineNumericsError(
                f"the engine's hidden states are not finite in {self._precision.roles.rollout_dtype}; {_NOT_FINITE}"
            )
        wire = self._precision.roles.wire_dtype if self._wire is None else dtype_name(self._wire)
        facts = found["facts"] | {"kernels": "batch-invariant" if self._config.batch_invariant else "ordinary"}
        return SideReport(side="engine", dtypes=found["dtypes"] | {"wire": wire}, facts=facts, digests=found["digests"])

    # -- sharing a GPU

    def sleep(self) -> None:
        """Move weights to the host and drop the cache, on a GPU shared with the trainer; do nothing on a CPU."""
        shared = self._precision.device.type == "cuda" and self._shares_device and self._config.sleep == "auto"
        if shared and self._process is not None and not self._asleep and self._died is None:
            self._ask("sleep")
            self._asleep = True

    def wake(self) -> None:
        """Undo `sleep`; `generate`, `score`, `load_weights`, `digests` and `report` also do it themselves."""
        if self._asleep:
            self._ask("wake")
            self._asleep = False


_NOT_FINITE = (
    "values leave the range of the format; set precision=bf16 or precision=fp32, or check the model's files for NaN"
)
