"""Names of LoRA adapters: in a module of PEFT, in PEFT's files, and in engines.

PEFT wraps a linear layer `X` and names its parts `X.base_layer`, `X.lora_A.default` and `X.lora_B.default`. Outside the
trainer a weight goes by the name that it has without adapters, and an adapter by PEFT's name without `default`.
"""

from __future__ import annotations

NAME = "default"
"""PEFT's name of the only adapter."""
DOWN, UP, BASE = f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight", ".base_layer"
"""Parts of the names of A, B and the frozen layer in a module."""


def plain_name(parameter: str) -> str:
    """Return the name of a parameter of the base in the model without adapters."""
    return parameter.replace(f"{BASE}.", ".")


def served_name(parameter: str) -> str:
    """Return the name of an adapter's parameter in files and engines: PEFT's, without its prefix."""
    return parameter.replace(f".{NAME}.", ".")
