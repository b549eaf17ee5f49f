"""`ops.cross_entropy` of rows of logits, against PyTorch's in float64."""

import pytest
import torch
from torch.nn import functional as F

from peftcore import ops


def call(function, logits, labels):
    logits = logits.clone().requires_grad_()
    losses = function(logits, labels)
    weights = torch.linspace(-1, 2, losses.numel(), dtype=losses.dtype).view(losses.shape)
    (losses * weights).sum().backward()
    return losses.detach(), logits.grad


def exact(logits, labels):
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ignored", [0, 5, 42])
def test_losses_and_gradients_are_those_of_float64(dtype, ignored):
    logits = torch.randn(2, 21, 20_011, generator=torch.Generator().manual_seed(0)).to(dtype)  # 4 pieces of 13 rows
    labels = torch.arange(42).mul(7).view(2, 21)
    labels.view(-1)[torch.arange(ignored) * 2 % 42 + torch.arange(ignored) // 21] = -100
    losses, grad = call(ops.cross_entropy, logits, labels)
    wanted, wanted_grad = call(exact, logits.double(), labels)
    assert (labels == -100).sum() == ignored
    assert losses.dtype == (dtype if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(losses.double(), wanted, rtol=2e-6 if dtype is not torch.float64 else 1e-12, atol=1e-6)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=tolerance, atol=6e-8)


def test_a_view_of_logits_and_a_second_backward_pass():
    logits = torch.randn(5, 40, requires_grad=True)
    labels = torch.tensor([1, 2, -100, 3])
    loss = ops.cross_entropy(logits[1:, ::2], labels).sum()
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    again = torch.autograd.grad(loss, logits)[0]
    wanted = torch.autograd.grad(exact(logits[None, 1:, ::2], labels[None]).sum(), logits)[0]
    assert torch.equal(first, again)
    torch.testing.assert_close(first, wanted)


def test_what_cannot_be_computed_is_an_error():
    logits = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(ValueError, match=r"labels must be \[3\], found \[2\]"):
        ops.cross_entropy(logits, torch.zeros(2, dtype=torch.long))
    with pytest.raises(IndexError, match="labels must be from 0 to 4, or ignore_index -100, found 5"):
        ops.cross_entropy(logits, torch.tensor([0, 5, -100]))
    with pytest.raises(TypeError, match=r"labels must be torch\.int64"):
        ops.cross_entropy(logits, torch.zeros(3, dtype=torch.int32))
    for shape in ((3, 0), ()):
        with pytest.raises(ValueError, match=rf"logits must be \[..., classes\], found \{list(shape)}"):
            ops.cross_entropy(torch.zeros(shape), torch.zeros(shape[:-1], dtype=torch.long))


def test_second_derivatives() -> None:
    logits, labels = torch.randn(4, 9, dtype=torch.float64, requires_grad=True), torch.tensor([0, 8, -100, 3])
    assert torch.autograd.gradgradcheck(lambda t: ops.cross_entropy(t, labels), logits)
    wanted, found = (second_gradient(function, logits.detach(), labels) for function in (exact, ops.cross_entropy))
    in_fp32 = second_gradient(ops.cross_entropy, logits.detach().float(), labels)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(in_fp32.double(), wanted, rtol=1e-5, atol=1e-6)


def second_gradient(function, logits, labels):
    logits = logits.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(logits, labels).square().sum(), logits, create_graph=True)
    return torch.autograd.grad(first.square().sum(), logits)[0]


def test_transforms_and_compiled_code_take_pytorchs():
    logits, labels = torch.randn(4, 9), torch.tensor([0, 8, -100, 3])
    wanted = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(torch.func.vmap(ops.cross_entropy)(logits[None], labels[None])[0], wanted)
    assert ops.cross_entropy(logits.to("meta"), labels.to("meta")).shape == (4,)
    torch.testing.assert_close(
        torch.compile(ops.cross_entropy, backend="eager", fullgraph=True)(logits, labels), wanted
    )
