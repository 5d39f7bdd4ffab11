"""Rules for every test: no access to the hub, and a reason for each skipped slow or GPU test.

Also small GGUF files, which tests in several folders read.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _interpret_triton() -> None:
    """Run kernels in Triton's interpreter without a GPU; Triton reads the variable when it is first imported."""
    if _cuda_available() or "TRITON_INTERPRET" in os.environ:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401
    del os.environ["TRITON_INTERPRET"]


def _take_time() -> None:
    """Let an example of Hypothesis take as long as it does: a loaded machine is no failure of what is tested."""
    with contextlib.suppress(ImportError):
        from hypothesis import HealthCheck, settings

        settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
        settings.load_profile("patient")


def pytest_configure() -> None:
    _take_time()
    # A shell starts background jobs (`scripts/test &`) with SIGINT ignored, and their children inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("RUN_SLOW") != "1":
        _skip(items, "slow", "slow; set RUN_SLOW=1 to run it")
    if any("gpu" in item.keywords for item in items) and not _cuda_available():
        _skip(items, "gpu", "needs a CUDA device")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    """Write a small GGUF file of a one-layer decoder: `_write_gguf`."""
    return _write_gguf


_SIZE, _WIDTH = 16, 32
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SPACE = "\u2581"

SENTENCEPIECE = ["<unk>", "<s>", "</s>", *_BYTES, _SPACE, "a", "b", "ab", f"{_SPACE}a", f"{_SPACE}ab"]
BYTE_LEVEL = ["<s>", "</s>", *(chr(code) for code in range(33, 127)), "\u0120", "ab"]


def _write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    tokenizer: str = "llama",
    pre: str = "default",
    flags: Mapping[str, bool] | None = None,
    tensors: bool = True,
    quantisation: str = "F32",
) -> Path:
    """Write a GGUF file; without `tensors`, only its header. Matrices have rows of 256 unless they are F32."""
    writer = pytest.importorskip("gguf").GGUFWriter(path, architecture)
    tokens = _sentencepiece(writer) if tokenizer == "llama" else _byte_level(writer)
    writer.add_tokenizer_pre(pre)
    for name, value in (flags or {}).items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.add_pad_token_id(0)
    size, width = (_SIZE, _WIDTH) if quantisation == "F32" else (256, 256)
    _sizes(writer, len(tokens), size, width)
    if tensors:
        _tensors(writer, len(tokens), size, width, quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _sentencepiece(writer: Any) -> list[str]:
    pieces = len(SENTENCEPIECE) - 3 - len(_BYTES)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(SENTENCEPIECE)
    writer.add_token_scores([0.0] * (3 + len(_BYTES)) + [-float(i) for i in range(pieces)])
    writer.add_token_types([2, 3, 3, *[6] * len(_BYTES), *[1] * pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    return SENTENCEPIECE


def _byte_level(writer: Any) -> list[str]:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(BYTE_LEVEL)
    writer.add_token_types([3, 3, *[1] * (len(BYTE_LEVEL) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    return BYTE_LEVEL


def _sizes(writer: Any, vocabulary: int, size: int, width: int) -> None:
    writer.add_context_length(64)
    writer.add_embedding_length(size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(size // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)


def _tensors(writer: Any, vocabulary: int, size: int, width: int, quantisation: str) -> None:
    import numpy as np

    draws = np.random.default_rng(0)
    shapes = {
        "token_embd": (vocabulary, size),
        "output": (vocabulary, size),
        "output_norm": (size,),
        "blk.0.attn_norm": (size,),
        "blk.0.ffn_norm": (size,),
        **{f"blk.0.attn_{name}": (size, size) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (width, size),
        "blk.0.ffn_up": (width, size),
        "blk.0.ffn_down": (size, width),
    }
    for name, shape in shapes.items():
        values = (draws.standard_normal(shape) * 0.1).astype(np.float32)
        if len(shape) == 1 or quantisation == "F32":
            writer.add_tensor(f"{name}.weight", values)
        else:
            _add_quantised(writer, f"{name}.weight", values, quantisation)


def _add_quantised(writer: Any, name: str, values: Any, quantisation: str) -> None:
    """Add values in a quantisation; where gguf cannot quantise, add random blocks whose scales are 2^-6."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[quantisation]
    try:
        data = gguf.quantize(values, kind)
    except NotImplementedError:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        draws = np.random.default_rng(1)
        data = draws.integers(0, 256, (values.shape[0], values.shape[1] // block, block_bytes), dtype=np.uint8)
        scale = np.frombuffer(np.float16(2.0**-6).tobytes(), np.uint8)
        for place in _SCALES.get(quantisation, (0,)):
            data[..., place : place + 2] = scale
        data = data.reshape(values.shape[0], -1)
    writer.add_tensor(name, data, raw_dtype=kind)


_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Bytes of a block at which FP16 scales begin; 0 for the other kinds."""


_interpret_triton()
