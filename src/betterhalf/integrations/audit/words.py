"""Values that several frameworks have in common."""

from __future__ import annotations

from betterhalf.integrations.audit.records import Depends, Like

CHECKPOINT = Depends("the checkpoint's dtype")
"""vLLM's and SGLang's `auto`: the format of a half checkpoint; for one in FP32, BF16 or FP16, depending on the engine,
its version and the device."""

AUTO_ENGINE = {"auto": CHECKPOINT}
"""Words for the dtype of an engine."""

AUTO_KV = {"auto": Like("engine"), "model": Like("engine")}
"""Words for the dtype of a KV cache."""
