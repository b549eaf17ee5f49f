"""`device`: where operators run Triton's kernels, a GPU, or the CPU by Triton's interpreter.

`tests/conftest.py` selects the interpreter where there is no GPU, before triton is imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

import peftcore.ops.swiglu  # noqa: F401  it defines the operator
from peftcore.ops import _triton


def pytest_runtest_setup() -> None:
    if find_spec("triton") is None:
        pytest.skip("no triton")


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with pytest.MonkeyPatch.context() as patch, torch.library._scoped_library("peftcore", "IMPL") as library:
        round_to_nearest(patch)
        patch.setattr(_triton, "is_supported", lambda device: True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they replace the extension's kernels
            for name, kernel in _triton.KERNELS.items():
                library.impl(name, kernel, "CPU", allow_override=True)
        yield torch.device("cpu")


def round_to_nearest(patch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round fp32 to bf16 as GPUs do; it truncates."""
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
            return interpreter.TensorHandle(bits.numpy(), tl.bfloat16)
        return cast(self, source, dtype)

    patch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)
    for name in ("create_fp_trunc", "create_fp_ext"):
        patch.setattr(interpreter.InterpreterBuilder, name, rounded)
