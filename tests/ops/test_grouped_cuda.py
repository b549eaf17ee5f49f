"""The operators of experts on a GPU against float64. tests/emulator/ runs the same kernels without one."""

import pytest
import torch

from peftcore import ops
from peftcore.ops.grouped_operators import GroupedLinear, GroupedLinearBackward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SEED = torch.tensor(0x123456789ABCDEF)
COUNTS = [(3, 0, 17, 1), (0, 70, 0), (150, 129), (33,), (0, 2) * 80, (0, 0)]


def normal(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found, wanted, roundings=4):
    """Within a few roundings of the largest value."""
    assert found.shape == wanted.shape
    limit = roundings * EPS[found.dtype] * wanted.abs().max() + 1e-6 * wanted.abs().max()
    assert (found.cpu().double() - wanted).abs().max() <= limit


def case(counts, width, out, rank, dtype, packed, transposed):
    """(x, offsets, weight, the same in float64, bias, a, b); two rows belong to none."""
    experts, rows = len(counts), sum(counts) + 2
    w = normal(experts, *((width, out) if transposed else (out, width)), seed=4, dtype=torch.float32)
    weight = ops.quantize_4bit(w, blocksize=32, double_quant=True) if packed else w.to(dtype)
    dense = ops.dequantize_4bit(weight, dtype) if packed else weight
    x, bias = normal(rows, width, seed=0, dtype=dtype), normal(experts, out, seed=1, dtype=dtype)
    a = normal(experts, rank, width, seed=2, dtype=torch.float32) / width**0.5
    b = normal(experts, out, rank, seed=3, dtype=torch.float32)
    return x, torch.tensor(counts).cumsum(0).to(torch.int32), weight, dense.double(), bias, a, b


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=range(len(COUNTS)))
def test_forward_and_gradients(counts, dtype, p, packed, transposed):
    width, out, rank = [(96, 64, 8), (75, 96, 3), (288, 128, 70)][sum(counts) % 3]
    x, offsets, weight, dense, bias, a, b = case(counts, width, out, rank, dtype, packed, transposed)
    factors, seed = [a.double(), b.double()], SEED if p else None
    shared = transposed, 1.5, p, seed
    y, s = GroupedLinear(x.double(), offsets, [dense], [], bias.double(), factors, *shared).compute()
    grad = normal(len(x), out, seed=5, dtype=dtype)
    backward = GroupedLinearBackward(
        grad.double(), x.double(), offsets, [dense], [], [*factors, s], transposed, [True] * 3, *shared[1:]
    )
    leaves = [t.cuda().requires_grad_() for t in (x, bias, a, b)]

    def run():
        found = ops.grouped_lora_linear(leaves[0], offsets.cuda(), weight.to("cuda"), *leaves[1:], *shared)
        return found.detach(), *torch.autograd.grad(found, leaves, grad.cuda())

    found, dx, _, da, db = once = run()
    near(found, y)
    for ours, theirs in zip((dx, da, db), backward.compute(), strict=True):
        near(ours, theirs, 8)
    assert all(map(torch.equal, once, run()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_factors(dtype, packed):
    x, offsets, weight, dense, bias, _, _ = case((5, 0, 20), 96, 64, 1, dtype, packed, False)
    y, _ = GroupedLinear(x.double(), offsets, [dense], [], bias.double(), []).compute()
    near(ops.grouped_linear(x.cuda(), offsets.cuda(), weight.to("cuda"), bias.cuda()), y, 1)


def test_offsets_that_do_not_rise_give_nan():
    x, _, weight, _, bias, a, b = (t.cuda() for t in case((5, 0, 20), 96, 64, 4, torch.half, False, False))
    for ends in ((5, 4, 20), (-1, 5, 20), (5, 5, 2**30)):
        offsets = torch.tensor(ends, dtype=torch.int32, device="cuda")
        assert ops.grouped_lora_linear(x, offsets, weight, bias, a, b).isnan().all()


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="PyTorch's product of experts waits for the device there",
)
def test_nothing_waits_for_the_device():
    """A capture of a graph refuses whatever would."""
    x, offsets, weight, dense, _, a, b = case((5, 0, 20), 96, 64, 4, torch.bfloat16, True, False)
    x, offsets, weight, a, b = (t.to("cuda") for t in (x, offsets, weight, a, b))
    ops.grouped_lora_linear(x, offsets, weight, None, a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.grouped_lora_linear(x, offsets, weight, None, a, b)
    offsets.copy_(torch.tensor([20, 22, 25], dtype=torch.int32))
    graph.replay()
    factors = [a.cpu().double(), b.cpu().double()]
    near(y, GroupedLinear(x.cpu().double(), offsets.cpu(), [dense], [], None, factors).compute()[0])
