"""Tokens that end a completion, and the token with which a chat template ends a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from betterhalf.errors import ConfigError, InputError
from betterhalf.models.files import ModelSource
from betterhalf.models.generation import FILE
from betterhalf.models.gguf import declares_end_token

_QUESTION, _ANSWER = "betterhalf question", "betterhalf answer"
"""Contents of the conversation that is rendered to see how a template ends a turn."""

_SETTING = "model.stop_tokens"
"""Source of the tokens that the configuration names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopToken:
    """Token that ends a completion."""

    token_id: int
    """Id in the model's vocabulary."""
    source: str
    """Setting or file that declares it, for messages."""


def declared_stop_tokens(source: ModelSource, hf_config: Any, generation: Any, tokenizer: Any) -> tuple[StopToken, ...]:
    """Return the end-of-sequence tokens that the model's files declare, sorted by id.

    The files are the generation configuration, the configuration and the tokenizer's. `hf_config` counts only if the
    file has the key: for some architectures transformers has a default, 2 for Llama, whatever token that is.
    """
    in_config = getattr(hf_config, "eos_token_id", None) if _config_declares(source) else None
    places = (
        (FILE, getattr(generation, "eos_token_id", None), "eos_token_id"),
        (source.named("config.json"), in_config, "eos_token_id"),
        (source.named("tokenizer_config.json"), tokenizer.eos_token_id, f"eos_token {tokenizer.eos_token!r}"),
    )
    found: dict[int, StopToken] = {}
    for file, value, key in places:
        ids = () if value is None else (value,) if isinstance(value, int) else tuple(value)
        for token_id in map(int, ids):
            found.setdefault(token_id, StopToken(token_id=token_id, source=f"{key} in {file}"))
    return tuple(found[token_id] for token_id in sorted(found))


def _config_declares(source: ModelSource) -> bool:
    if source.gguf is not None:
        return declares_end_token(source.gguf)
    raw, _ = PretrainedConfig.get_config_dict(source.location, **source.arguments)
    return "eos_token_id" in raw or "eos_token_id" in (raw.get("text_config") or {})


def chosen_stop_tokens(tokens: Sequence[str | int], tokenizer: Any) -> tuple[StopToken, ...]:
    """Return the tokens that `model.stop_tokens` names by text or id, sorted by id.

    Raises:
        ConfigError: a text is not a single token of the tokenizer.
    """
    chosen = (StopToken(token_id=_token_id(token, tokenizer), source=_SETTING) for token in tokens)
    return tuple(sorted({token.token_id: token for token in chosen}.values(), key=lambda token: token.token_id))


def _token_id(token: str | int, tokenizer: Any) -> int:
    if isinstance(token, int):
        return token
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        return int(vocabulary[token])
    if token.isdecimal():
        return int(token)
    # Byte-level vocabularies spell text in their own alphabet: a newline is not an entry, but it is one token.
    token_ids = tokenizer.encode(token, add_special_tokens=False)
    if len(token_ids) == 1:
        return int(token_ids[0])
    raise ConfigError(
        f"model.stop_tokens names {token!r}, which the tokenizer splits into {len(token_ids)} tokens; name one token "
        "of its vocabulary, by text or by id"
    )


def require_in_vocabulary(name: str, stops: Sequence[StopToken], vocabulary: int) -> None:
    """Refuse a stop token that the model cannot sample.

    Raises:
        InputError: an id is outside the vocabulary; the message names the id, its source and the vocabulary's size.
    """
    for stop in stops:
        if not 0 <= stop.token_id < vocabulary:
            fix = "set" if stop.source == _SETTING else "fix that file, or set"
            raise InputError(
                f"model {name!r} cannot sample its stop token {stop.token_id} ({stop.source}): its vocabulary has "
                f"{vocabulary} tokens; {fix} model.stop_tokens to the right tokens"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnEnd:
    """Token with which a chat template ends the assistant's turn."""

    token_id: int
    """Id in the model's vocabulary."""
    text: str
    """Text of the token."""


def turn_end(tokenizer: Any) -> TurnEnd | None:
    """Render a conversation and return the first special token after the answer; None without one.

    None is also returned for a template that cannot be rendered; the task that uses it reports the error.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        token_ids = tokenizer.encode(text.rpartition(_ANSWER)[2], add_special_tokens=False)
    except Exception:  # a template can raise anything
        return None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    first = next((int(token_id) for token_id in token_ids if token_id in special), None)
    return None if first is None else TurnEnd(token_id=first, text=tokenizer.decode([first]))
