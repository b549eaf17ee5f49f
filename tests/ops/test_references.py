"""The reference of an operator stands where a backend has no kernel: how a card too old for this build gets it."""

import pytest
import torch

from peftcore import ops

pytestmark = pytest.mark.skipif(ops.extension is None, reason="no _C: everything is a reference")
# A backend without kernels of ours: csrc/common/cuda_support.h leads through its table.
OTHER = torch._C.DispatchKeySet(torch._C.DispatchKey.HPU)


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def cases():
    x, w = values(5, 64), values(32, 64)
    a, b = values(4, 64), values(32, 4)
    four = ops.quantize_4bit(w)
    _, s = torch.ops.peftcore.lora_linear(x, [w], [], None, a, b, 1.0, 0.0, None)
    index = torch.zeros(5, dtype=torch.int64)
    experts, offsets = values(3, 32, 64), torch.tensor([2, 2, 4], dtype=torch.int32)
    many = [values(3, 4, 64), values(3, 32, 4)]
    of_experts = (x, offsets, [experts], [], None, many, False, 1.0, 0.0, None)
    pairs, shares = torch.tensor([[2, 0], [1, 2]]), values(2, 2)
    many_s = torch.ops.peftcore.grouped_linear(*of_experts)[1]
    attended = values(1, 2, 7, 32), values(1, 2, 7, 32), values(1, 2, 7, 32)
    of_forward = torch.ops.peftcore.attention(*attended, None, True, 0.5)
    return {
        "grouped_linear": of_experts,
        "grouped_linear_backward": (values(5, 32), x, offsets, [experts], [], [*many, many_s], False, [True] * 3),
        "quantize_4bit": (w, ops.NF4, 64),
        "quantize_mxfp4": (w,),
        "quantize_absmax": (four.absmax, ops.DYNAMIC8, 256),
        "dequantize_4bit": (*four.operands(), torch.float32),
        "dense_linear": (x, w),
        "linear_4bit": (x, *four.operands()),
        "linear_4bit_backward": (values(5, 32), *four.operands()),
        "lora_linear": (x, [w], [], None, a, b, 1.0, 0.0, None),
        "lora_linear_backward": (values(5, 32), x, s, [w], [], a, b, [True] * 3, 1.0, 0.0, None),
        "row_norms": ([w], [], a, b, 0.5),
        "scaled": (x, values(64)),
        "scaled_backward": (values(5, 64), x, values(64), [True] * 2),
        "routed": (pairs, 3),
        "gathered": (x, torch.arange(10), 2),
        "combined": (x, shares, pairs),
        "combined_backward": (values(2, 64), values(4, 64), shares, torch.arange(4), [True] * 2),
        "rms_norm": (x, values(64), 1e-5, 1.0, True),
        "rms_norm_backward": (values(5, 64), x, values(64), values(5).abs(), 1.0, True, [True] * 2),
        "gated": (x, values(5, 64), 1.0, 0.1),
        "gated_backward": (values(5, 64), x, values(5, 64), 1.0, 0.1),
        "activated": (x, True, 1.0, 0.0),
        "activated_backward": (values(5, 64), x, True, 1.0, 0.0),
        "dropout": (x, 0.5, torch.tensor(5)),
        "linear_cross_entropy_rows": (x, w, None, torch.arange(5), None, None, [0.0, 1.0, 0.0, 0.1]),
        "attention": (*attended, None, True, 0.5),
        "attention_backward": (attended[0], *attended, *of_forward, None, True, 0.5),
        "swiglu": (x,),
        "swiglu_backward": (values(5, 32), x),
        "lora_linear_per_sample": (x[:, None], [w], [], None, [a], [b], [1.0], index),
    }


@pytest.mark.parametrize("name", cases())
def test_the_reference_is_reached_past_the_kernel(name):
    operator = getattr(torch.ops.peftcore, name).default
    arguments = cases()[name]
    expected = operator(*arguments)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        operator(*arguments)
    assert not any(call.startswith("aten.") for call in seen)  # the compiled kernel: one call
    with Watch():
        found = operator.redispatch(OTHER, *arguments)
    assert any(call.startswith("aten.") for call in seen)  # the reference, of PyTorch's operators
    for one, other in zip(*(r if isinstance(r, (tuple, list)) else [r] for r in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear_4bit", "lora_linear", "lora_linear_backward"])
def test_autocast_does_not_reach_into_a_reference(name):
    """Arguments were cast before; what is kept for the backward pass is float32."""
    operator, arguments = getattr(torch.ops.peftcore, name).default, cases()[name]
    wanted = operator.redispatch(OTHER, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = operator.redispatch(OTHER, *arguments)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
