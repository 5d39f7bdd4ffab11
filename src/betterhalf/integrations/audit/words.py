"""Values that several frameworks have in common."""

from __future__ import annotations

from betterhalf.integrations.audit.records import Depends, Like

CHECKPOINT = Depends("the checkpoint's dtype")
"""vLLM's and SGLang's `auto`: BF16 for a BF16 checkpoint, FP16 for one in FP16 or FP32."""

AUTO_ENGINE = {"auto": CHECKPOINT}
"""Words for the dtype of an engine."""

AUTO_KV = {"auto": Like("engine"), "model": Like("engine")}
"""Words for the dtype of a KV cache."""
