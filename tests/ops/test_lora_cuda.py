"""lora_linear's CUDA kernels on a GPU against float64. tests/emulator/ runs the same kernels without one."""

import pytest
import torch

from peftcore import ops
from peftcore.ops import lora_linear, lora_linear_per_sample
from peftcore.ops.lora import LoraLinear, LoraLinearBackward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SEED = torch.tensor(0x123456789ABCDEF)


def normal(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found, wanted, roundings=3):
    """Within a few roundings of the largest value: bias + s Bᵀ is rounded on the way."""
    assert found.shape == wanted.shape
    limit = roundings * EPS[found.dtype] * wanted.abs().max() + 1e-6 * wanted.abs().max()
    assert (found.cpu().double() - wanted).abs().max() <= limit


def case(rows, columns, out, rank, dtype, factor_dtype, packed):
    """(x, weight on the GPU, the same in float64, bias, a, b)."""
    x, bias = normal(rows, columns, seed=0, dtype=dtype), normal(out, seed=1, dtype=dtype)
    a = normal(rank, columns, seed=2, dtype=factor_dtype) / columns**0.5
    b, w = normal(out, rank, seed=3, dtype=factor_dtype), normal(out, columns, seed=4, dtype=torch.float32)
    if not packed:
        return x, w.to(dtype).cuda(), w.to(dtype).double(), bias, a, b
    four = ops.quantize_4bit(w, double_quant=True)
    return x, four.to("cuda"), ops.dequantize_4bit(four, dtype).double(), bias, a, b


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "out", "rank"), [(1, 96, 70, 8), (33, 75, 64, 3), (300, 1056, 136, 100)])
def test_forward_and_gradients(rows, columns, out, rank, dtype, p, packed):
    x, weight, dense, bias, a, b = case(rows, columns, out, rank, dtype, torch.float32, packed)
    seed = SEED if p else None
    factors = [t.double() for t in (a, b)]
    y, s = LoraLinear(x.double(), [dense], [], bias.double(), *factors, 1.5, p, seed).compute()
    grad = normal(rows, out, seed=5, dtype=dtype)
    backward = LoraLinearBackward(grad.double(), x.double(), s, [dense], [], *factors, [True] * 3, 1.5, p, seed)
    wanted = backward.compute()
    leaves = [t.cuda().requires_grad_() for t in (x, bias, a, b)]
    found = lora_linear(leaves[0], weight, *leaves[1:], 1.5, p, seed)
    near(found.detach(), y)
    dx, dbias, da, db = torch.autograd.grad(found, leaves, grad.cuda())
    assert da.dtype == db.dtype == torch.float32
    near(dbias, grad.double().sum(0))
    for ours, theirs in zip((dx, da, db), wanted, strict=True):
        near(ours, theirs, 8)
    again = torch.autograd.grad(lora_linear(leaves[0], weight, *leaves[1:], 1.5, p, seed), leaves, grad.cuda())
    assert all(map(torch.equal, (dx, dbias, da, db), again))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 20])
def test_an_adapter_for_each_sample(dtype, rows, packed):
    x, weight, dense, bias, _, _ = case(5 * rows, 96, 70, 1, dtype, dtype, packed)
    ranks = [4, 100, 1]
    a = [normal(r, 96, seed=i, dtype=dtype) / 10 for i, r in enumerate(ranks)]
    b = [normal(70, r, seed=9 + i, dtype=dtype) for i, r in enumerate(ranks)]
    index, scales = torch.tensor([1, -1, 2, 0, 3]), [1.0, 0.5, 2.0]
    x = x.view(5, rows, 96)
    given = [[t.cuda() for t in factors] for factors in (a, b)]
    found = lora_linear_per_sample(x.cuda(), weight, bias.cuda(), *given, scales, index.cuda())
    assert found[4].isnan().all()  # no such adapter
    for i, adapter in enumerate(index[:4].tolist()):
        wanted = x[i].double() @ dense.T + bias.double()
        if adapter >= 0:
            wanted += scales[adapter] * (x[i].double() @ a[adapter].double().T) @ b[adapter].double().T
        near(found[i], wanted)


def test_only_the_gradients_that_are_needed():
    x, weight, _, _, a, b = (t.cuda() for t in case(40, 64, 72, 8, *DTYPES[1:], False))
    operators = torch.ops.peftcore
    _, s = operators.lora_linear(x, [weight], [], None, a, b, 1.0)
    grad = torch.ones(40, 72, device="cuda", dtype=x.dtype)
    all_three = operators.lora_linear_backward(grad, x, s, [weight], [], a, b, [True] * 3, 1.0)
    for needs in ([True, False, False], [False, True, False], [False, False, True]):
        found = operators.lora_linear_backward(grad, x, s, [weight], [], a, b, needs, 1.0)
        for one, whole, needed in zip(found, all_three, needs, strict=True):
            if needed:
                near(one, whole.cpu().double())
            else:
                assert one.shape == (0,)
