"""dropout: the mask and factor of each element at every SIMD level, its gradient, and its checks."""

from __future__ import annotations

import pytest
import torch

from peftcore import ops
from peftcore.ops.dropout import Dropout

_OPS = torch.ops.peftcore
SEED = torch.tensor(12345678901234)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 66), (2, 4100), (7,)], ids=str)
def test_values_and_gradient(level: None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    y = ops.dropout(x, 0.5, SEED)
    keep = ops.keep_mask(x.shape[:-1].numel(), shape[-1], 0.5, SEED).view(shape)
    assert torch.equal(y, 2 * x * keep)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx, 2 * keep.to(dtype))


def test_seeds_follow_the_generator() -> None:
    x = torch.ones(200, 50)
    torch.manual_seed(3)
    one, other = ops.dropout(x, 0.1), ops.dropout(x, 0.1)
    torch.manual_seed(3)
    assert torch.equal(ops.dropout(x, 0.1), one) and not torch.equal(one, other)
    assert abs(float((one == 0).float().mean()) - 0.1) < 0.01
    assert torch.equal(torch.func.vmap(lambda x: ops.dropout(x, 0.0), randomness="same")(x), x)


def test_float64_and_gradients_of_gradients() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.dropout(x, 0.5, SEED), (x,))
    x = torch.randn(4, 6, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.dropout(x, 0.5, SEED).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    assert torch.equal(second, 8.0 * ops.keep_mask(4, 6, 0.5, SEED))


def test_checks() -> None:
    x = torch.randn(4, 6)
    torch.library.opcheck(_OPS.dropout, (x, 0.5, SEED))
    for call in (_OPS.dropout, Dropout):
        with pytest.raises(ValueError, match=r"dropout: dropout_p must be in \[0, 1\), found 1"):
            call(x, 1.0, SEED)
        with pytest.raises(ValueError, match="dropout: x must have at least one dimension, found a scalar"):
            call(torch.tensor(1.0), 0.5, SEED)
        with pytest.raises(TypeError, match="dropout: seed must be"):
            call(x, 0.5, torch.tensor(1.0))
