"""The CUDA kernels of rms_norm, gated and swiglu on the emulator, against the references."""

from ctypes import Structure, c_bool, c_float, c_int, c_int64, c_void_p

import pytest
import torch
from emulator.structs import DTYPES, address
from hypothesis import given, settings, strategies as st

from peftcore.ops.gated import ACTIVATIONS, Gated, GatedBackward
from peftcore.ops.rms_norm import RmsNorm, RmsNormBackward
from peftcore.ops.swiglu import Swiglu, SwigluBackward

STEP = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class RmsNormCall(Structure):
    """csrc/norms/cuda/rms_norm_cuda.h"""

    _fields_ = [
        *((name, c_int) for name in ("dtype", "weight_dtype")),
        *((name, c_int64) for name in ("rows", "columns")),
        *((name, c_void_p) for name in ("x", "weight")),
        *((name, c_float) for name in ("eps", "offset")),
        ("rounded", c_bool),
        *((name, c_void_p) for name in ("y", "scale", "dy", "dx", "sums")),
    ]


class GatedCall(Structure):
    """csrc/elementwise/cuda/gated_cuda.h"""

    _fields_ = [
        ("dtype", c_int),
        *((name, c_void_p) for name in ("gate", "up")),
        *((name, c_int64) for name in ("rows", "columns", "stride")),
        *((name, c_float) for name in ("linear", "cubic")),
        ("rounded", c_bool),
        *((name, c_void_p) for name in ("y", "dy", "dgate", "dup")),
    ]


def values(*shape, dtype, seed, offset=0):
    """Return normal numbers, `offset` values behind an aligned address."""
    count = torch.Size(shape).numel()
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return torch.empty(count + offset, dtype=dtype)[offset:].copy_(numbers).view(shape)


def norm(emulated, x, weight, grad, offset, rounded, seed=0):
    """Return y, scale, dx and dweight in fp32."""
    rows, columns = x.shape
    y, dx, scale = torch.empty_like(x), torch.empty_like(x), torch.full((rows,), torch.nan)
    emulated.library.peftcore_rms_norm_groups.restype = c_int64
    sums = torch.full((emulated.library.peftcore_rms_norm_groups(c_int64(rows)), columns), torch.nan)
    dtypes = DTYPES.index(x.dtype), DTYPES.index(weight.dtype)
    pointers = [address(t) for t in (y, scale, grad, dx, sums)]
    call = RmsNormCall(*dtypes, rows, columns, address(x), address(weight), 1e-5, offset, rounded, *pointers)
    for name in ("peftcore_rms_norm", "peftcore_rms_norm_dx", "peftcore_rms_norm_dweight"):
        emulated(name)(call, seed=seed)
    return y, scale, dx, sums.sum(0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 70),
    columns=st.one_of(st.integers(1, 300), st.integers(1, 40).map(lambda n: 8 * n)),
    dtype=st.sampled_from(DTYPES),
    weights=st.sampled_from(DTYPES),
    kind=st.sampled_from([(0.0, True), (1.0, False)]),
    moved=st.integers(0, 1),
    seed=st.integers(0, 10**6),
)
def test_rms_norm(emulated, rows, columns, dtype, weights, kind, moved, seed):
    compare_norm(emulated, rows, columns, dtype, weights, kind, moved, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(3, 2048), (2, 9000), (2, 1029)])
def test_rows_of_a_block_of_threads(emulated, rows, columns, dtype):  # held, and longer than a block holds
    compare_norm(emulated, rows, columns, dtype, dtype, (0.0, True), 0, columns)


def compare_norm(emulated, rows, columns, dtype, weights, kind, moved, seed):
    x, grad = (values(rows, columns, dtype=dtype, seed=seed + i, offset=moved) for i in range(2))
    weight = values(columns, dtype=weights, seed=seed + 2)
    y, scale, dx, dweight = norm(emulated, x, weight, grad, *kind, seed=seed)
    step = STEP[dtype]
    wanted, wanted_scale = RmsNorm(x, weight, 1e-5, *kind).compute()
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(y, wanted, rtol=step, atol=step / 64)
    # From the kernel's own r, so that both round alike.
    wide = weight.float()
    wanted_dx, wanted_dweight = RmsNormBackward(grad, x, wide, scale, *kind, [True, True]).compute()
    torch.testing.assert_close(dx, wanted_dx, rtol=step, atol=step / 8 + 2e-6)
    torch.testing.assert_close(dweight, wanted_dweight, rtol=1e-4, atol=1e-4)


def test_every_order_of_threads_gives_the_same_bits(emulated):
    x, grad = (values(70, 1100, dtype=torch.float32, seed=i) for i in range(2))
    weight = values(1100, dtype=torch.float32, seed=3)
    first = norm(emulated, x, weight, grad, 0.0, True)
    for seed in range(1, 5):
        again = norm(emulated, x, weight, grad, 0.0, True, seed=seed)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def gate(emulated, gate, up, grad, powers, rounded, rows=1, stride=0):
    """Return y and the gradients of gate and up."""
    y, dgate, dup = torch.empty_like(grad), torch.empty_like(gate), torch.empty_like(gate)
    sizes = rows, grad.numel() // rows, stride
    pointers = [address(t) for t in (y, grad, dgate, dup)]
    call = GatedCall(DTYPES.index(gate.dtype), address(gate), address(up), *sizes, *powers, rounded, *pointers)
    emulated("peftcore_gated")(call)
    emulated("peftcore_gated_backward")(call)
    return y, dgate, dup


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 3000),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from([*ACTIVATIONS]),
    moved=st.integers(0, 1),
    scale=st.sampled_from([1, 30, 1000]),
    seed=st.integers(0, 10**6),
)
def test_gated(emulated, count, dtype, name, moved, scale, seed):
    g, up, grad = (values(count, dtype=dtype, seed=seed + i, offset=moved) for i in range(3))
    g *= scale
    powers, step = ACTIVATIONS[name], STEP[dtype]
    y, dgate, dup = gate(emulated, g, up, grad, powers, True)
    torch.testing.assert_close(y, Gated(g, up, *powers).compute(), rtol=step, atol=step / 8 + 2e-6)
    wanted = GatedBackward(grad, g, up, *powers).compute()
    torch.testing.assert_close((dgate, dup), wanted, rtol=step, atol=step / 8 + 2e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates_far_out(emulated, name):
    """Where powers or exponentials would overflow, values are those of the limits; NaN stays NaN."""
    g = torch.tensor([0.0, 1e-30, 90.0, -90.0, 3e4, -3e4, 3e38, -3e38, torch.nan])
    one = torch.ones_like(g)
    y, dgate, dup = gate(emulated, g, one, one, ACTIVATIONS[name], True)
    limits = torch.where(g > 0, g, 0.0) * (g.abs() > 1)
    torch.testing.assert_close(y[:-1], limits[:-1], rtol=1e-6, atol=1e-18)
    torch.testing.assert_close(dup[:-1], limits[:-1], rtol=1e-6, atol=1e-18)
    torch.testing.assert_close(dgate[2:-1], (g[2:-1] > 0).float(), rtol=1e-5, atol=1e-5)
    assert dgate[0] == 0.5 and all(t[-1].isnan() for t in (y, dgate, dup))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(6, 75), (3, 96), (1, 40), (300, 8)])
def test_swiglu(emulated, rows, columns, dtype):
    x = values(rows, 2 * columns, dtype=dtype, seed=1)
    grad, dx, y = values(rows, columns, dtype=dtype, seed=2), torch.empty_like(x), torch.empty(rows, columns).to(dtype)
    addresses = [x.data_ptr(), x.data_ptr() + columns * x.element_size()]
    slopes = [dx.data_ptr(), dx.data_ptr() + columns * x.element_size()]
    sizes = rows, columns, 2 * columns
    call = GatedCall(DTYPES.index(dtype), *addresses, *sizes, 1.0, 0.0, False, address(y), address(grad), *slopes)
    emulated("peftcore_gated")(call)
    emulated("peftcore_gated_backward")(call)
    step = STEP[dtype]
    torch.testing.assert_close(y, Swiglu(x).compute(), rtol=step, atol=step / 8 + 2e-6)
    torch.testing.assert_close(dx, SwigluBackward(grad, x).compute(), rtol=step, atol=step / 8 + 2e-6)


@pytest.mark.nightly
def test_stays_within_its_memory(sanitized):
    done = sanitized("norms", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases agree" in done.stdout
