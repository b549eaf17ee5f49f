"""Operators called directly, past the functions of `peftcore.ops`, which have gradients."""

import pytest
import torch

from peftcore import ops

X, G = torch.randn(4, 64), torch.randn(64)


def scaled(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.peftcore.scaled(x, G)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # of jvp
def test_a_gradient_that_would_be_lost_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.ops\.peftcore\.scaled has no gradient, and an argument"):
        scaled(X.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.func.grad(lambda x: scaled(x).sum())(X)
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.func.jvp(scaled, (X,), (X,))
    weight = [torch.randn(8, 64).requires_grad_()]  # in a list
    with pytest.raises(RuntimeError, match=r"torch\.ops\.peftcore\.linear_4bit has no gradient"):
        torch.ops.peftcore.linear_4bit(X, weight, [])


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
