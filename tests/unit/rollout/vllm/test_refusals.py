"""Reasons of a failed start of vLLM in one sentence, each with a fix."""

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
        (AssertionError("All layers must slide alike"), Refusal, "by an assertion: All layers .*engine=native"),
        (RuntimeError("boom"), RuntimeError, "boom"),
    ],
)
def test_a_failed_start_is_explained(error: Exception, kind: type[Exception], words: str) -> None:
    found = start_error(error)
    assert type(found) is kind
    with pytest.raises(kind, match=words):
        raise found


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    """Return the error with the traceback of its raise."""
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_an_assertion_without_a_message_is_shown_by_its_source_and_place() -> None:
    def check(windows: set[int | None]) -> None:
        assert len(windows) == 1

    with pytest.raises(AssertionError) as failed:
        check({None, 4096})
    bare = AssertionError().with_traceback(failed.value.__traceback__)
    found = start_error(bare)
    assert type(found) is Refusal
    assert "`assert len(windows) == 1` (test_refusals.py, line " in str(found) and "engine=native" in str(found)


def test_an_assertion_behind_another_error_is_a_refusal_too() -> None:
    found = start_error(raised(RuntimeError("Engine core initialization failed"), AssertionError("mixed windows")))
    assert type(found) is Refusal and "mixed windows" in str(found)
