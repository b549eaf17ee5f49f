"""No gradient is lost in silence, in operators called directly or in the functions of `peftcore.ops`."""

import pytest
import torch

from peftcore import ops

X, G = torch.randn(4, 64), torch.randn(64)


def scaled(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.peftcore.scaled(x, G)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # of jvp
def test_a_gradient_that_would_be_lost_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.ops\.peftcore\.scaled computes no gradient, but an argument"):
        scaled(X.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="computes no gradient"):
        torch.func.grad(lambda x: scaled(x).sum())(X)
    with pytest.raises(RuntimeError, match="computes no gradient"):
        torch.func.jvp(scaled, (X,), (X,))
    weight = [torch.randn(8, 64).requires_grad_()]  # in a list
    with pytest.raises(RuntimeError, match=r"torch\.ops\.peftcore\.linear_4bit computes no gradient"):
        torch.ops.peftcore.linear_4bit(X, weight, [])
    with pytest.raises(RuntimeError, match="linear_4bit computes no gradient"):  # in an optional tensor
        torch.ops.peftcore.linear_4bit(X, [torch.randn(8, 64)], [], torch.randn(8).requires_grad_())
    packed = ops.quantize_4bit(torch.randn(8, 64)).operands()
    with pytest.raises(RuntimeError, match=r"torch\.ops\.peftcore\.dequantize_4bit\.out computes no gradient"):
        torch.ops.peftcore.dequantize_4bit.out(*packed, out=torch.empty(8, 64).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_that_requires_grad_is_refused_where_it_gets_none(dtype: torch.dtype) -> None:
    x, a, b, weight = (torch.randn(size, dtype=dtype) for size in ((4, 64), (2, 64), (8, 2), (8, 64)))
    weight.requires_grad_()
    offsets = torch.tensor([4], dtype=torch.int32)
    calls = [
        lambda: ops.dense_linear(x, weight),
        lambda: ops.lora_linear(x, weight, None, a, b),
        lambda: ops.lora_linear_per_sample(x, weight, None, [a], [b], [1.0], torch.zeros(4, dtype=torch.long)),
        lambda: ops.grouped_linear(x, offsets, weight[None]),
        lambda: ops.grouped_lora_linear(x, offsets, weight[None], None, a[None], b[None]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"weight requires grad, but this product computes no gradient for it"):
            call()
        if dtype is torch.float32:
            with torch.no_grad():
                call()
    ops.linear_cross_entropy(x, weight, torch.zeros(4, dtype=torch.long)).backward()
    assert weight.grad is not None


def test_without_gradients_it_computes() -> None:
    with torch.no_grad():
        torch.testing.assert_close(scaled(X.clone().requires_grad_()), X * G)
    x = X.clone().requires_grad_()
    ops.scaled(x, G).sum().backward()
    torch.testing.assert_close(x.grad, G.expand(4, 64))


@pytest.mark.parametrize("inference", [False, True])
def test_dequantize_refuses_its_own_input_as_output(inference: bool) -> None:
    with torch.inference_mode(inference):
        memory, weight = torch.zeros(4 * 8 * 64, dtype=torch.uint8), ops.quantize_4bit(torch.randn(8, 64))
        codes = memory[: weight.codes.numel()].view(weight.codes.shape)
        weight = weight._replace(codes=codes.copy_(weight.codes))
        with pytest.raises(ValueError, match="out shares memory with the weight"):
            ops.dequantize_4bit(weight, out=memory.view(torch.float32).view(8, 64))
        ops.dequantize_4bit(weight, out=torch.empty(8, 64))
    if not inference:
        with pytest.raises(ValueError, match="out shares memory with the weight"):
            torch.ops.peftcore.dequantize_4bit.out(*weight.operands(), out=memory.view(torch.float32).view(8, 64))
