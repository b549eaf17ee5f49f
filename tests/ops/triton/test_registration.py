"""Which CUDA tensors run Triton's kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from peftcore import ops
from peftcore.ops import _triton
from peftcore.ops.cross_entropy import CrossEntropyRows
from peftcore.ops.gated import Gated
from peftcore.ops.swiglu import swiglu


def test_operators_have_them_for_cuda() -> None:
    names = ["cross_entropy_rows_", "gated", "gated_backward", "rms_norm", "rms_norm_backward", "swiglu"]
    assert sorted(_triton.KERNELS) == [*names, "swiglu_backward"]
    for name in _triton.KERNELS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peftcore::{name}", "CUDA")


class Operators(TorchDispatchMode):
    """Collects the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **kwargs or {})


def test_functions_call_the_operators_for_cuda_tensors() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(4, 6, device="cuda"), torch.empty(6, device="cuda")
        with Operators() as operators:
            results = ops.gated(x, x), ops.rms_norm(x, weight, 1e-5), swiglu(x)
    assert [result.device.type for result in results] == ["cuda"] * 3
    called = [name for name in operators.names if "peftcore" in name]
    assert called == ["peftcore.gated.default", "peftcore.rms_norm.default", "peftcore.swiglu.default"]


def test_the_reference_computes_float64_and_on_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = torch.randn(4, 6), torch.randn(4, 6)
    monkeypatch.setattr(_triton, "is_supported", lambda device: False)
    assert torch.equal(_triton.KERNELS["gated"](gate, up, 1.0, 0.0), Gated(gate, up, 1.0, 0.0).compute())
    monkeypatch.setattr(_triton, "is_supported", lambda device: True)
    logits, arguments = torch.randn(2, 5).double(), (torch.tensor([1, 4]), None, None, [0.0, 1.0, 0.0, 0.0], -100)
    rows = _triton.KERNELS["cross_entropy_rows_"](logits.clone(), *arguments)
    assert torch.equal(rows, CrossEntropyRows(logits, *arguments).compute())
