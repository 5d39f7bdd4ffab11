"""vLLM's reasons in one sentence, each with a cure."""

from __future__ import annotations

import pytest

from betterhalf.rollout.vllm.refusals import NotInstalled, Refusal, start_error

PYDANTIC = """1 validation error for ModelConfig
  Value error, The model type 'gemma2' does not support float16. Reason: Numerical instability. Use bfloat16. [type=val
    For further information visit https://errors.pydantic.dev/2.14/v/value_error"""


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ValueError(PYDANTIC), Refusal, "'gemma2' does not support float16.*precision=bf16 or precision=fp32"),
        (ValueError("To serve one request, 9 GiB KV cache is needed"), Refusal, "Raise engine.kv_cache_gib"),
        (NotImplementedError("head size 33"), Refusal, "head size 33. Choose another precision.*engine=native"),
        (RuntimeError("operator torchvision::nms does not exist"), NotInstalled, "pip uninstall torchvision"),
        (ImportError("libcuda.so.1: cannot open"), NotInstalled, r"libcuda.so.1.*betterhalf\[vllm\]"),
        (RuntimeError("boom"), RuntimeError, "boom"),
    ],
)
def test_a_failed_start_is_explained(error: Exception, kind: type[Exception], words: str) -> None:
    found = start_error(error)
    assert type(found) is kind
    with pytest.raises(kind, match=words):
        raise found
