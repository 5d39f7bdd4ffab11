"""Regional compilation: torch.compile fuses the operations between the matrix products of each decoder layer.

A layer is compiled once, for packs of any size, and all layers share the code. Attention is not compiled, nor are
`CpuLinear`, whose cached FP32 weights torch would have to trace, and the layers of a mixture of experts, whose shapes
depend on the tokens. The compiler is told to keep every rounding to half that the module's operations make; it may
change the order of sums.
"""

from __future__ import annotations

from typing import Any

import torch

from betterhalf.errors import InputError
from betterhalf.precision.cpu_linear import CpuLinear
from betterhalf.precision.experts import Experts, Router


def compile_layers(decoder: Any, device: torch.device) -> None:
    """Set the layers of a transformers decoder up for compilation, which happens in the first pass.

    Raises:
        InputError: the device is a CPU and there is no C++ compiler.
    """
    if device.type == "cpu":
        _require_compiler()
    for layer in decoder.layers:
        for part in layer.modules():
            if isinstance(part, CpuLinear | Experts | Router):
                part.forward = torch.compiler.disable(part.forward)  # type: ignore[method-assign, no-untyped-call]
        layer.compile(dynamic=True, options={"emulate_precision_casts": True})


def _require_compiler() -> None:
    # Imported here: these modules load torch's compiler, which takes seconds.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError(
            "training.compile_layers needs a C++ compiler on a CPU, and none was found; install g++ or clang++, or set "
            "training.compile_layers=false"
        ) from error
