"""Dropout of a decoder is refused by its key; that of other heads does not matter."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, LlamaConfig, OPTConfig, Phi3Config, Starcoder2Config

from betterhalf.errors import InputError
from betterhalf.training.model_limits import require_no_dropout


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (LlamaConfig(attention_dropout=0.1), "attention_dropout=0.1"),
        (GPT2Config(embd_pdrop=0.0, attn_pdrop=0.0), "resid_pdrop=0.1"),
        (OPTConfig(dropout=0.0, layerdrop=0.2), "layerdrop=0.2"),
        (Starcoder2Config(residual_dropout=0.1), "residual_dropout=0.1"),
    ],
)
def test_dropout_is_refused_by_its_key(config: object, key: str) -> None:
    with pytest.raises(InputError, match=key):
        require_no_dropout(config)


def test_the_dropout_of_a_classifier_does_not_matter() -> None:
    require_no_dropout(Phi3Config(classifier_dropout=0.1, pad_token_id=None))
