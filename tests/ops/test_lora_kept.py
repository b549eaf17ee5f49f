"""What lora_linear keeps for the backward pass."""

import pytest
import torch

from peftcore.ops import lora_linear, quantize_4bit

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
