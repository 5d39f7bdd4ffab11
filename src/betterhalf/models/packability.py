"""Refusal of models that the trainer would not compute as transformers does, before their weights are read.

A model is trained over packed sequences: its positions may exchange information only through the registered attention
function, which has to understand everything that the model asks of it, and its logits are those of the LM head, up to
`models.logits`. The checks read the configuration and run the module once on the meta device, where tensors have shapes
but no data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from betterhalf.batches import PackedSegment
from betterhalf.errors import InputError
from betterhalf.models.attention import PackLayout, for_transformers
from betterhalf.models.context import rope_settings
from betterhalf.models.logits import transforms_logits

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
"""Rope scalings whose frequencies do not depend on the lengths of the sequences in a pack."""

_ATTENTION_TYPES = {"full_attention", "sliding_attention"}
"""Layer types whose only exchange between positions goes through the registered attention function."""

_OBSERVED = "betterhalf_observed"
"""Name of the attention that records its calls."""

_TOKENS = 4
"""Tokens of the pass on the meta device."""

_INSTEAD = "use a decoder such as llama, qwen3, gemma3_text, olmo2 or phi3 (docs/engines.md lists them all)"


@dataclass(slots=True)
class _Observed:
    """Facts of one pass on the meta device."""

    values: list[tuple[int, ...]] = field(default_factory=list)
    """Shape of the values of each call of the attention function."""
    queries: list[tuple[int, ...]] = field(default_factory=list)
    """Shape of the queries of each call."""
    head_input: Tensor | None = None
    """Hidden states that the LM head read."""
    head_output: Tensor | None = None
    """Logits that it returned."""
    last_hidden: Tensor | None = None
    """Result of the decoder."""


def require_packable(module: Any) -> None:
    """Refuse a model whose packed sequences or logprobs the trainer would not compute as transformers does.

    Args:
        module: transformers model on the meta device; the check changes it.

    Raises:
        InputError: the model has parts for images or sound; positions exchange information outside attention; attention
            has sinks or a mask of its own; rope depends on the length of the pack; the LM head has a bias,
            or something unknown follows it. The message names it, and what to use instead.
    """
    kind = module.config.model_type
    try:
        _require_text(module)
        _require_attention_only(module)
        _require_rope(module)
        _require_plain_head(module)
        _require_observed(module)
    except InputError as error:
        raise InputError(f"architecture {kind!r} cannot be trained: {error}; {_INSTEAD}") from error


def _require_text(module: Any) -> None:
    if module.config.get_text_config() is not module.config:
        raise InputError(
            "it has parts besides a text decoder (text_config in config.json); save its language model alone as a "
            "folder"
        )


def _require_attention_only(module: Any) -> None:
    """Refuse mixers other than attention, and layers of unknown kinds."""
    kinds = set(getattr(module.config, "layer_types", None) or ["full_attention"])
    unknown = sorted(kinds - _ATTENTION_TYPES)
    if unknown or not module._supports_attention_backend or _has_convolution(module):
        what = ", ".join(unknown) or "convolutions or an attention of its own"
        raise InputError(f"it mixes positions outside attention ({what}), so packed sequences would leak")
    frozen = next((name for name, parameter in module.named_parameters() if not parameter.requires_grad), None)
    if frozen is not None:
        raise InputError(f"it holds parameters that are never trained ({frozen})")
    if any(name.endswith(".sinks") for name, _ in module.named_parameters()):
        raise InputError("it has attention sinks, which attention over packed sequences does not compute")


def _has_convolution(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv1d | nn.Conv2d | nn.RNNBase) for part in module.modules())


def _require_rope(module: Any) -> None:
    for settings in rope_settings(module.config):
        kind = settings.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            why = "depends on the longest sequence of a pack" if kind == "dynamic" else "is not known"
            raise InputError(
                f"its rope scaling {kind!r} {why}; set rope_parameters in its config.json to one of "
                f"{', '.join(ROPE_TYPES)}"
            )


def _require_plain_head(module: Any) -> None:
    head = module.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise InputError(f"its LM head is no linear layer ({type(head).__name__})")
    if head.bias is not None:
        raise InputError("its LM head has a bias, which the chunked logprobs do not add")


def _require_observed(module: Any) -> None:
    """Run the model once on the meta device, and check what it asks of attention, and what follows the head."""
    decoder = module.get_decoder()
    if "position_ids" not in signature(decoder.forward).parameters:
        raise InputError("it counts positions by itself, so those of packed sequences would be wrong")
    seen = _observe(module, decoder)
    layers = module.config.num_hidden_layers
    if len(seen.queries) != layers:
        raise InputError(f"its {layers} layers call the attention function {len(seen.queries)} times")
    widths = {(q[-1], v[-1]) for q, v in zip(seen.queries, seen.values, strict=True)}
    if any(q != v for q, v in widths) or len(widths) > 1:
        raise InputError(
            "its heads of queries and of values differ in width, or between layers (multi-head latent attention), and "
            "attention over packed sequences does not compute that"
        )
    _require_known_logits(module, seen)


def _require_known_logits(module: Any, seen: _Observed) -> None:
    read, last = seen.head_input, seen.last_hidden
    if read is None or last is None or _memory(read) is not _memory(last):
        raise InputError("it changes the hidden states between decoder and LM head")


def _memory(x: Tensor) -> Tensor:
    """Return the tensor that `x` is a view of, or `x` itself."""
    return x if x._base is None else x._base


def _observe(module: Any, decoder: Any) -> _Observed:
    seen = _Observed()

    def record(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        seen.queries.append(tuple(q.shape))
        seen.values.append(tuple(v.shape))
        return v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])

    def after_decoder(_module: nn.Module, _args: Any, out: Any) -> None:
        seen.last_hidden = out.last_hidden_state

    def after_head(_module: nn.Module, args: Any, out: Tensor) -> None:
        seen.head_input, seen.head_output = args[0], out

    AttentionInterface.register(_OBSERVED, for_transformers(record))
    before = module.config._attn_implementation
    module.set_attn_implementation(_OBSERVED)
    _freeze_rope(module)
    _skip_experts(module)
    handles = [
        decoder.register_forward_hook(after_decoder),
        module.get_output_embeddings().register_forward_hook(after_head),
    ]
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    layout = PackLayout((PackedSegment(length=_TOKENS, prefix=None),))
    try:
        with torch.no_grad():
            out = module.eval()(input_ids=ids, position_ids=ids, layout=layout, use_cache=False)
    except InputError:
        raise
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"its forward pass cannot be checked without data ({first})") from error
    finally:
        # The module's configuration is the caller's.
        module.set_attn_implementation(before)
        for handle in handles:
            handle.remove()
    if out.logits is not seen.head_output and not transforms_logits(module.config):
        raise InputError("it changes its logits after the LM head in an unknown way")
    return seen


def _freeze_rope(module: nn.Module) -> None:
    """Keep rope from comparing positions with a limit, which needs data; `longrope` is limited by the context."""
    for part in module.modules():
        kinds = getattr(part, "rope_type", None)
        if isinstance(kinds, str):
            part.rope_type = "default"  # type: ignore[assignment]
        elif isinstance(kinds, dict):
            part.rope_type = dict.fromkeys(kinds, "default")  # type: ignore[assignment]


def _skip_experts(module: nn.Module) -> None:
    """Let experts return what they read: choosing among them needs data, and they do not mix positions."""
    for part in module.modules():
        if type(part).__name__.endswith("Experts"):
            part.forward = lambda hidden, *_args, **_kwargs: hidden
