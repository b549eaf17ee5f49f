"""dense_linear beside float64 at every SIMD level, for as many rows as the kernel takes and more, and its checks."""

from __future__ import annotations

import pytest
import torch
from support.levels import LEVELS, at_level
from torch import Tensor

from peftcore import ops

_OP = torch.ops.peftcore.dense_linear
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def values(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 96), (130, 77), (1030, 2112)], ids=str)
@pytest.mark.parametrize("leading", [(), (1, 1), (2,), (3, 1), (4,), (5,), (2, 9)], ids=str)
def test_beside_float64(leading: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype, level: str) -> None:
    x, w = values(*leading, shape[1], dtype=dtype), values(*shape, dtype=dtype, seed=1)
    bias = values(shape[0], dtype=dtype, seed=2) if len(leading) % 2 else None
    exact = x.double() @ w.double().T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ w.double().abs().T + 1
    with at_level(level):
        found = ops.dense_linear(x, w, bias)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= exact.abs() * EPS[dtype] + magnitude * 2.0**-18).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("leading", [(1,), (2, 9), (70,)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_beside_float64(transposed: bool, leading: tuple[int, ...], dtype: torch.dtype, level: str) -> None:
    x, w, bias, dy = (values(*shape, dtype=dtype) for shape in ((*leading, 77), (130, 77), (130,), (*leading, 130)))
    if transposed:
        w = w.T.contiguous().T
    inputs, weight = (x.requires_grad_(), bias.requires_grad_()), w
    with at_level(level):
        found = torch.autograd.grad(ops.dense_linear(x, weight, bias), inputs, dy)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = torch.autograd.grad(torch.nn.functional.linear(wide[0], w.double(), wide[1]), wide, dy.double())
    magnitude = dy.double().abs() @ w.double().abs()
    assert ((found[0].double() - exact[0]).abs() <= exact[0].abs() * EPS[dtype] + magnitude * 2.0**-18).all()
    torch.testing.assert_close(found[1], exact[1].to(dtype), rtol=4 * EPS[dtype], atol=8 * EPS[dtype])


def test_gradients_without_rows_of_the_weight() -> None:
    x, bias = values(3, 4).requires_grad_(), values(0).requires_grad_()
    dx, dbias = torch.autograd.grad(ops.dense_linear(x, values(0, 4), bias).sum(), (x, bias))
    assert (dx == 0).all() and dbias.shape == (0,)


def test_a_gradient_can_be_differentiated() -> None:
    x, w = values(3, 64).requires_grad_(), values(32, 64)
    (dx,) = torch.autograd.grad((ops.dense_linear(x, w).float() ** 2).sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(dx.float().sum(), x)
    torch.testing.assert_close(found, (2 * w.T @ w).sum(0).expand(3, 64), rtol=0.05, atol=2)


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_without_products_of_a_dtype_beats_the_library_in_it(level: str) -> None:
    with at_level(level):
        assert ops.extension.beats_library("torch.float32") == (level.startswith("avx") or level == "amx")
        if level in ("avx2", "avx512"):
            assert ops.extension.beats_library("torch.bfloat16")
        if level in ("portable", "avx512bf16", "amx"):
            assert not ops.extension.beats_library("torch.bfloat16")


@pytest.mark.parametrize("w", [values(96, 64).T, values(64, 192)[:, ::2], values(96, 64)[:0], values(64, 0)])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_weights_that_lie_otherwise_and_nothing(w: Tensor, rows: int) -> None:
    x = values(w.shape[1], rows).T
    torch.testing.assert_close(ops.dense_linear(x, w), (x.float() @ w.float().T).bfloat16())


def test_no_bit_depends_on_the_threads() -> None:
    x, w, before, found = values(3, 512), values(4099, 512), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ops.dense_linear(x, w))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_is_no_number_stays_so() -> None:
    x, w = values(2, 70), values(9, 70)
    x[0, 69], w[4, 3] = float("inf"), float("nan")
    found = ops.dense_linear(x, w)
    assert not found[0].isfinite().any()
    assert found[1].isnan().nonzero().tolist() == [[4]]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # of jvp
def test_derivatives_along_a_direction_are_pytorch_s() -> None:
    x, w, direction = values(2, 64), values(32, 64), values(2, 64, seed=3)
    wanted = direction @ w.T
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        found = torch.autograd.forward_ad.unpack_dual(ops.dense_linear(dual, w)).tangent
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.func.jvp(lambda x: ops.dense_linear(x, w), (x,), (direction,))[1], wanted)
    torch.testing.assert_close(torch.vmap(ops.dense_linear, (0, None))(x[:, None], w)[:, 0], x @ w.T)


@pytest.mark.parametrize("rows", [1, 9])
def test_opcheck(rows: int) -> None:
    torch.library.opcheck(_OP.default, (values(rows, 64), values(32, 64), values(32)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((values(2, 63), values(32, 64)), ValueError, r"x must be \[.., 64\]"),
        ((values(2, 64), values(32, 64, dtype=torch.float32)), TypeError, "weight must be"),
        ((values(2, 64), values(32, 64), values(31)), ValueError, r"bias must be \[32\]"),
        ((values(2, 64), values(2, 32, 64)), ValueError, r"weight must be \[out, in\]"),
        ((values(2, 64).int(), values(32, 64).int()), TypeError, "only"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_arguments_that_do_not_fit(
    device: str, arguments: tuple[Tensor, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.dense_linear(*(t.to(device) for t in arguments))


def test_long_sums_in_fp32_are_chains(level: str) -> None:
    """Sums of 4,096 positive numbers, as LoRA's kernel adds them: in one chain the error is 8.6e-7."""
    draw = torch.Generator().manual_seed(0)
    x, w = torch.rand(64, 4096, generator=draw), torch.rand(64, 4096, generator=draw)
    y = ops.lora_linear(x, w, None, torch.zeros(8, 4096), torch.zeros(64, 8), 1.0, 0.0)
    exact = x.double() @ w.double().T
    assert (y - exact).abs().max() < 5e-7 * exact.max()
