"""Logprobs of the tokens that transformers' `generate` draws, noted as they are drawn.

TRL calls `generate` for the tokens alone. Its forward passes run with a KV cache, one token at a time, and multiply
matrices of other shapes than the trainer's pass over whole sequences: so in half precision the two differ, as a rollout
engine and a trainer do.

Axes: B rows, V vocabulary, L positions of the completion.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from betterhalf import ops
from betterhalf.integrations.trl.watch import ComputeWatch, Drawn


class DrawnLogprobs(LogitsProcessor):
    """Processor that changes no logits and notes the logprob of each token, under the distribution it is drawn from."""

    def __init__(self, temperature: float) -> None:
        """`temperature` is that of the sampling, which transformers applies after this processor."""
        self._temperature = temperature
        self._logits_BV: Tensor | None = None
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Note the token drawn last, and keep the logits of the next one."""
        self._note(input_ids)
        self._logits_BV = scores
        return scores

    def logprobs(self, sequences_BL: Tensor) -> Tensor:
        """Return the logprob of every token drawn, FP32 [B, L]; `generate` returned `sequences_BL`."""
        self._note(sequences_BL)
        self._logits_BV = None
        return torch.stack(self._columns, dim=1)

    def _note(self, input_ids: Tensor) -> None:
        if self._logits_BV is not None:
            self._columns.append(ops.token_logprobs(self._logits_BV, input_ids[:, -1], self._temperature))


class GenerateRecorder:
    """Replacement of a model's `generate` that notes the logprobs of its latest call."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        """Change nothing yet; `temperature` is that of the sampling."""
        self._model: Any = model
        self._temperature = temperature
        self._inner: Any = None
        self.logprobs_BL: Tensor | None = None
        """Logprobs of the tokens that the latest call drew; those after a stop token have no meaning."""
        self.drawn: Drawn | None = None
        """Formats of the first call."""

    def install(self) -> None:
        """Replace `model.generate`."""
        self._inner = self._model.generate
        self._model.generate = self._generate

    def remove(self) -> None:
        """Restore `model.generate`."""
        del self._model.generate

    def _generate(self, *args: Any, **keywords: Any) -> Tensor:
        drawn = DrawnLogprobs(self._temperature)
        processors = LogitsProcessorList([*(keywords.pop("logits_processor", None) or ()), drawn])
        keywords["generation_config"] = config = copy(keywords["generation_config"])
        config.return_dict_in_generate = True
        watch = ComputeWatch(self._model) if self.drawn is None else None
        found = self._inner(*args, logits_processor=processors, **keywords)
        if watch is not None:
            self.drawn = Drawn(compute=watch.close(), kv=found.past_key_values.layers[0].keys.dtype)
        self.logprobs_BL = drawn.logprobs(found.sequences)
        sequences: Tensor = found.sequences
        return sequences
