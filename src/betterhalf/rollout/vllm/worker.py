"""Extension of vLLM's workers (`worker_extension_cls`): load weights, and read back those that vLLM really holds.

Runs inside vLLM, once on each rank. vLLM mixes this class into its worker, so its names must not clash with vLLM's.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from betterhalf.precision.contract import weights_digests
from betterhalf.precision.formats import dtype_name, narrowest_format
from betterhalf.rollout.vllm import adapters, experts, weights
from betterhalf.rollout.vllm.routes import RouteRecorder


class BetterhalfWorker:
    """Methods for `LLM.collective_rpc`."""

    vllm_config: Any
    model_runner: Any
    betterhalf_served: adapters.Served | None = None

    def betterhalf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return Hugging Face name -> shape of every weight, over all ranks."""
        return weights.expected_shapes(self._betterhalf_model())

    def betterhalf_load(self, path: str) -> None:
        """Load every weight of a safetensors file in place."""
        with safe_open(path, framework="pt") as file:
            names = frozenset(file.keys())
            pairs = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (not a dictionary)
            self.reload_weights(weights_iterator=pairs)  # type: ignore[attr-defined]
        self.betterhalf_loaded(names)

    def betterhalf_loaded(self, names: frozenset[str] | None = None) -> None:
        """Update vLLM's own copies of weights after a load of these names; None for all."""
        weights.after_load(self._betterhalf_model(), names, routes_in_fp32=self._betterhalf_eager())

    def betterhalf_record_experts(self) -> None:
        """Record the experts of every token from now on."""
        self._betterhalf_routes = RouteRecorder(self.model_runner, self._betterhalf_model())

    def betterhalf_experts(self) -> dict[str, Any]:
        """Stop recording, and return request -> its experts; see `RouteRecorder.stop`."""
        return self._betterhalf_routes.stop()

    def betterhalf_watch(self) -> None:
        """Record the hidden states and logits of the next forward passes, for `betterhalf_report`."""
        model = self._betterhalf_model()
        compute_logits = type(model).compute_logits
        seen: list[tuple[Tensor, Tensor]] = []

        def spy(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
            logits: Tensor | None = compute_logits(model, hidden, *args, **kwargs)
            # Where logits are gathered on rank 0, other ranks have none; only the report of rank 0 is read.
            seen.append((hidden.detach().clone(), hidden if logits is None else logits))
            return logits

        model.compute_logits = spy
        self._betterhalf_seen = seen

    def betterhalf_report(self) -> dict[str, Any]:
        """Stop recording, and return formats read from live tensors, facts and digests."""
        model = self._betterhalf_model()
        del model.compute_logits
        hidden, logits = (torch.cat(parts) for parts in zip(*self._betterhalf_seen, strict=True))
        finite = bool(hidden.isfinite().all())
        attention = self._betterhalf_attention()
        norm, rope = weights.norm_weight(model), weights.rope_table(model)
        return {
            "finite": finite,
            "dtypes": {
                "weights": dtype_name(weights.projection_dtype(model)),
                "compute": narrowest_format(hidden),
                "kv": dtype_name(attention.kv_cache.dtype),
                "lm_head": dtype_name(logits.dtype),
                "rope": dtype_name(rope.dtype if rope is not None else hidden.dtype),
                "norm": dtype_name(norm.dtype),
            },
            "facts": self._betterhalf_facts(attention),
            "digests": self.betterhalf_digests(),
        }

    def betterhalf_digests(self) -> dict[str, str]:
        """Return Hugging Face name -> digest of the weight that vLLM holds."""
        model, served = self._betterhalf_model(), self.betterhalf_served
        beside = () if served is None else adapters.held_adapters(model, served)
        return weights_digests(chain(weights.held(model), beside))

    def betterhalf_serve(self, served: adapters.Served) -> None:
        """Record which adapter has been loaded, so that it can be read back."""
        self.betterhalf_served = served

    def _betterhalf_facts(self, attention: Any) -> dict[str, str]:
        config = self.vllm_config
        cache = config.cache_config
        routers = experts.routers(self._betterhalf_model())
        fp32 = self._betterhalf_eager()
        return {
            **({"router": dtype_name(torch.float32 if fp32 else routers[0].weight.dtype)} if routers else {}),
            "attention": f"vLLM {attention.attn_backend.get_name()}",
            "matmul": weights.product_names(self._betterhalf_model()),
            "logprobs": config.model_config.logprobs_mode,
            "head_dtype": dtype_name(config.model_config.head_dtype),
            "kv_block": f"{cache.block_size} tokens, shape {'x'.join(map(str, attention.kv_cache.shape[1:]))}",
            "prefix_caching": "on" if cache.enable_prefix_caching else "off",
            "compile": config.compilation_config.mode.name.lower(),
            "device": str(next(self._betterhalf_model().parameters()).device),
        }

    def _betterhalf_eager(self) -> bool:
        """Return whether passes run eagerly, so that a layer's `forward` can be replaced."""
        return bool(self.vllm_config.compilation_config.mode.name == "NONE")

    def _betterhalf_model(self) -> Any:
        return self.model_runner.get_model()

    def _betterhalf_attention(self) -> Any:
        return weights.attention_layer(self.vllm_config)
