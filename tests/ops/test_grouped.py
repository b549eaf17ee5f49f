"""Linear layers of experts, by rows sorted by expert."""

import pytest
import torch
from torch.nn import functional as F

from peftcore import ops


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0, 4), (1, 1, 1), (0, 0, 0)])
def test_equals_a_loop_over_experts_with_its_gradients(counts, transposed):
    rows, width, out, r = sum(counts) + 2, 6, 4, 3
    x, bias = values(rows, width), values(3, out, seed=2)
    w, a, b = values(3, out, width, seed=1), values(3, r, width, seed=3), values(3, out, r, seed=4)
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)

    def by_loop(x, bias, a, b):
        parts, begin = [], 0
        for e, count in enumerate(counts):
            rows_of = x[begin : begin + count]
            parts.append(F.linear(rows_of, w[e], bias[e]) + 0.5 * rows_of @ a[e].T @ b[e].T)
            begin += count
        return torch.cat([*parts, x.new_zeros(2, out)])

    stored = w.mT.contiguous() if transposed else w
    inputs = [t.requires_grad_() for t in (x, bias, a, b)]
    y = ops.grouped_lora_linear(x, offsets, stored, bias, a, b, transposed, 0.5)
    torch.testing.assert_close(y, by_loop(*inputs))
    grad = values(rows, out, seed=5)
    wanted = torch.autograd.grad(by_loop(*inputs), inputs, grad, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, grad), wanted)
