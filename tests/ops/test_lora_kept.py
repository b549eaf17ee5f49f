"""What lora_linear keeps for the backward pass."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from peftcore.ops import activated, lora_linear, quantize_4bit

X, W, A, B = (4, 3, 64), (32, 64), (8, 64), (32, 8)


def call(frozen_a, packed, p=0.0):
    """(how much of x's size is kept, the gradients of x and B)."""
    torch.manual_seed(0)
    x, w, a, b = (torch.randn(shape) for shape in (X, W, A, B))
    weight = quantize_4bit(w) if packed else w
    a.requires_grad_(not frozen_a)
    x.requires_grad_()
    b.requires_grad_()
    kept = []
    seed = torch.tensor([7]) if p else None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lora_linear(x, weight, None, a, b, 2.0, p, seed)
    y.square().sum().backward()
    assert (a.grad is None) == frozen_a
    return sum(t.untyped_storage().data_ptr() == x.data_ptr() for t in kept), x.grad, b.grad


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("packed", [False, True])
def test_x_is_not_kept_for_a_frozen_a(packed, p):
    kept, *wanted = call(False, packed, p)
    kept_beside_frozen, *found = call(True, packed, p)
    assert (kept, kept_beside_frozen) == (1, 0)
    for gradient, other in zip(found, wanted, strict=True):
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("packed", [False, True])
def test_an_activation_is_computed_again(packed):
    """LoRA keeps the activation's input, which is kept anyway; a result that was changed since is kept itself."""
    torch.manual_seed(0)
    x, w, a, b = (torch.randn(shape, requires_grad=shape is not W) for shape in (X, W, A, B))
    weight = quantize_4bit(w) if packed else w
    found = []
    for read in (activated, lambda t: activated(t).clone()):
        between = read(x)
        storage = StorageWeakRef(between.untyped_storage())
        y = lora_linear(between, weight, None, a, b, 2.0)
        del between
        assert storage.expired() == (read is activated)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, a, b])])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    y = lora_linear(activated(x), w, None, a, b, 2.0)
    (slope,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    if not packed:
        torch.testing.assert_close(slope, found[0][2], rtol=1e-4, atol=1e-3)
    assert torch.autograd.grad(slope.sum(), x)[0].isfinite().all()


def test_an_activation_that_was_changed_or_freed_is_kept():
    torch.manual_seed(0)
    x, w, a, b = (torch.randn(shape, requires_grad=shape is not W) for shape in (X, W, A, B))
    for change in (lambda t: t.mul_(2), lambda t: t.detach().mul_(2), lambda t: t.sum().backward()):
        between = activated(x)
        change(between)
        value = between.detach().clone()
        grads = torch.autograd.grad(lora_linear(between, w, None, a, b, 2.0).square().sum(), [a, b])
        wanted = torch.autograd.grad(lora_linear(value, w, None, a, b, 2.0).square().sum(), [a, b])
        assert all(torch.equal(one, other) for one, other in zip(grads, wanted, strict=True))
