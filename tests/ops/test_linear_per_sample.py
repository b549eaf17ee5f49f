"""lora_linear_per_sample against float64: an adapter for each sample, threads, and an index that does not fit."""

import pytest
import torch
from support.operands import near, packed, values

from peftcore.ops import lora_linear_per_sample
from peftcore.ops.linear_per_sample import LoraLinearPerSample

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 64), (5, 3, 64), (5, 11, 64)])
@pytest.mark.parametrize("quantized", [False, True])
def test_an_adapter_for_each_sample(level, dtype, shape, quantized):
    if quantized and dtype is torch.float64:
        pytest.skip("4 bits become 32 at most")
    weight, dense = packed(9, 64)
    x, w = values(shape, dtype), dense.to(dtype)
    a, b = [values((r, 64), seed=r) for r in (2, 8, 1)], [values((9, r), seed=r + 20) for r in (2, 8, 1)]
    index, scales = torch.tensor([2, 0, -1, 2, 1]), [0.5, 1.0, 2.0]
    found = lora_linear_per_sample(x, weight if quantized else w, values((9,), dtype), a, b, scales, index)
    assert found.dtype == dtype and found.shape == (*shape[:-1], 9)
    for i, which in enumerate(index.tolist()):
        exact = x[i].double() @ w.double().T + values((9,), dtype).double()
        magnitude, base = x[i].double().abs() @ w.double().T.abs() + 3, exact.abs()
        base = magnitude if quantized else base
        if which >= 0:
            factors = a[which].double(), b[which].double()
            exact = exact + scales[which] * (x[i].double() @ factors[0].T) @ factors[1].T
            magnitude = magnitude + scales[which] * (x[i].double().abs() @ factors[0].T.abs()) @ factors[1].T.abs()
        near(found[i], exact, magnitude, base)


@pytest.mark.parametrize("rows", [2, 9, 300])  # straight from the factors; one thread for each adapter; all for each
def test_adapters_of_samples_do_not_depend_on_threads(level, rows):
    x, w = values((6, rows, 40), torch.bfloat16), values((33, 40), torch.bfloat16)
    a, b = [values((r, 40), seed=r) for r in (3, 17, 5)], [values((33, r), seed=r + 20) for r in (3, 17, 5)]
    index, before, found = torch.tensor([2, 0, 1, -1, 2, 0]), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(lora_linear_per_sample(x, w, None, a, b, [0.5, 1.0, 2.0], index))
    finally:
        torch.set_num_threads(before)
    for which, scale in enumerate((0.5, 1.0, 2.0)):
        mine = index == which
        factors = [a[which]], [b[which]], [scale], torch.zeros(int(mine.sum()), dtype=torch.long)
        alone = lora_linear_per_sample(x[mine], w, None, *factors)
        torch.testing.assert_close(found[0][mine].float(), alone.float(), rtol=0.01, atol=0.05)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.tensor([0, 1]), ValueError, r"index must be \[3\], one for each sample of x, found \[2\]"),
        (torch.tensor([0.0, 1.0, 0.0]), TypeError, "index must be"),
        (torch.tensor([0, 1, 0]), ValueError, r"index must be -1 \(none\) to 0, found 1"),
    ],
)
def test_an_index_that_does_not_fit(index, error, message):
    x, weight, a, b = torch.ones(3, 64), torch.ones(8, 64), torch.ones(4, 64), torch.ones(8, 4)
    with pytest.raises(error, match=message):
        lora_linear_per_sample(x, weight, None, [a], [b], [1.0], index)


@pytest.mark.parametrize("operator", [torch.ops.peftcore.lora_linear_per_sample, LoraLinearPerSample])
def test_x_without_samples_is_refused(operator):
    x, weight, a, b = torch.ones(8), torch.ones(4, 8), torch.ones(2, 8), torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"x must be \[samples, \.\., in\], found \[8\]"):
        operator(x, [weight], [], None, [a], [b], [1.0], torch.zeros(8, dtype=torch.long))


def test_no_columns(level):
    x, weight, a, b = torch.ones(3, 40, 0).bfloat16(), torch.ones(4, 0).bfloat16(), torch.ones(2, 0), torch.ones(4, 2)
    y = lora_linear_per_sample(x, weight, None, [a], [b], [1.0], torch.zeros(3, dtype=torch.long))
    assert y.shape == (3, 40, 4) and not y.any()
