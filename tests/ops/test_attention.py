"""attention and its gradients against float64 and PyTorch's operator, at every SIMD level, and its checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore import ops
from peftcore.ops.attention import Attention, AttentionBackward, has_attention_kernel

_OPS = torch.ops.peftcore
# batch, heads, key heads, queries, keys, size
SHAPES = [(2, 4, 2, 61, 61, 32), (1, 3, 3, 97, 130, 64), (1, 2, 1, 1, 5, 96), (2, 2, 2, 50, 33, 256)]
STEP = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[Tensor]:
    """Return q, k, v and the gradient of the output; q as models have it, a transposed [batch, tokens, heads, size]."""
    batch, heads, key_heads, queries, keys, size = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, queries, heads, size), *[(batch, key_heads, keys, size)] * 2, (batch, heads, queries, size)]
    q, *rest = (torch.randn(*each, generator=generator).to(dtype) for each in sizes)
    return [q.transpose(1, 2), *rest]


def mask_of(shape: tuple[int, ...]) -> Tensor:
    """Return a mask with a query that sees no key."""
    batch, _, _, queries, keys, _ = shape
    mask = torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[0, :, 0] = False
    return mask


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, factors: Any = 1.0) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1).nan_to_num(0) * factors) @ v.repeat_interleave(groups, 1)


def errors(function: Any, given: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Return errors of the output and the gradients, relative to their norms."""
    inputs = [t.detach().requires_grad_() for t in given[:3]]
    y = function(*inputs)
    found = [y.detach(), *torch.autograd.grad(y, inputs, given[3])]
    assert all(t.dtype is given[0].dtype for t in found)
    norms = [max(float(w.norm()), 0.1 * w.numel() ** 0.5) for w in wanted]  # gradients of a single key are 0
    return [float((t.double() - w).norm()) / n for t, w, n in zip(found, wanted, norms, strict=True)]


def in_float64(given: list[Tensor], mask: Tensor | None, causal: bool, factors: Any = 1.0) -> list[Tensor]:
    wide = [t.double().requires_grad_() for t in given[:3]]
    y = exact(*wide, mask, causal, factors)  # type: ignore[call-arg]
    return [y.detach(), *torch.autograd.grad(y, wide, given[3].double())]


@pytest.mark.parametrize("dtype", STEP, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(level: str, shape: Any, causal: bool, masked: bool, dtype: torch.dtype) -> None:
    given, mask = operands(shape, dtype), mask_of(shape) if masked else None
    wanted = in_float64(given, mask, causal)
    found = errors(lambda q, k, v: ops.attention(q, k, v, mask, causal=causal), given, wanted)
    assert max(found) < 3 * STEP[dtype]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 6])
def test_single_queries(heads: int, causal: bool) -> None:
    """Heads of q that share a key head are multiplied together, each with its own row of the mask."""
    q, k, v, _ = operands((2, 6, 2, 1, 37, 64))
    mask = torch.rand(2, heads, 1, 37, generator=torch.Generator().manual_seed(2)) > 0.5
    mask[..., 0], mask[1, -1] = True, False
    wanted = exact(q.double(), k.double(), v.double(), mask, causal)
    assert (ops.attention(q, k, v, mask, causal=causal) - wanted).norm() < 3 * STEP[torch.bfloat16] * wanted.norm()
    _, lse = _OPS.attention(q, k, v, mask, causal, 0.125)
    _, other = Attention(q, k, v, mask, causal, 0.125).compute()
    torch.testing.assert_close(lse, other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_against_float64(level: str, shape: Any, dtype: torch.dtype) -> None:
    given, mask, seed = operands(shape, dtype), mask_of(shape), torch.tensor(987654321987)
    batch, heads, _, queries, keys, _ = shape
    keep = ops.keep_mask(batch * heads * queries, keys, 0.25, seed).view(batch, heads, queries, keys)
    wanted = in_float64(given, mask, False, keep.double() / 0.75)
    found = errors(lambda q, k, v: ops.attention(q, k, v, mask, dropout_p=0.25, seed=seed), given, wanted)
    assert max(found) < 3 * STEP[dtype]


def test_seeds_of_dropout_follow_the_generator() -> None:
    q, k, v, _ = operands((1, 2, 2, 40, 40, 32))
    torch.manual_seed(3)
    one, other = (ops.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(ops.attention(q, k, v, dropout_p=0.5), one) and not torch.equal(one, other)


@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.5, "seed": torch.tensor(5)}], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_at_each_level(level: str, dtype: torch.dtype, dropout: dict[str, Any]) -> None:
    """It computes the formula where there is no kernel, too."""
    *given, grad = operands(SHAPES[0], dtype)
    arguments = (*given, mask_of(SHAPES[0]), True, 0.3, *dropout.values())
    out, lse = _OPS.attention(*arguments)
    found = out, lse, *_OPS.attention_backward(grad, *given, out, lse, *arguments[3:])
    wanted = *Attention(*arguments).compute(), *AttentionBackward(grad, *given, out, lse, *arguments[3:]).compute()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=4 * STEP[dtype], atol=4 * STEP[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 4, 128, 128, 64), (1, 2, 2, 300, 300, 32)], ids=str)
def test_not_less_exact_than_pytorch(level: str, shape: Any, dtype: torch.dtype) -> None:
    given = operands(shape, dtype, seed=2)
    wanted = in_float64(given, None, True)
    ours = errors(lambda q, k, v: ops.attention(q, k, v, causal=True), given, wanted)
    theirs = errors(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), given, wanted)
    assert all(one <= 1.1 * other for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_of_whole_queries(level: str, dtype: torch.dtype) -> None:
    """One byte of the mask is for all keys of a query."""
    q, k, v, grad = operands((2, 2, 1, 33, 50, 32), dtype)
    queries = torch.arange(33)[:, None] % 3 > 0
    found = []
    for mask in (queries, queries.expand(33, 50).contiguous()):
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        y = ops.attention(*inputs, mask)
        found.append([y, *torch.autograd.grad(y, inputs, grad)])
    assert not found[0][0][:, :, ::3].any() and found[0][0][:, :, 1::3].all()
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_that_are_not_finite(level: str, dtype: torch.dtype) -> None:
    q, k, v, _ = operands((1, 1, 1, 4, 40, 32), dtype)
    k[0, 0, 39, 0] = torch.nan
    mask = torch.ones(1, 1, 4, 40, dtype=torch.bool)
    mask[..., 1:, 39] = False
    y, lse = _OPS.attention(q, k, v, mask, False, 1.0)
    assert y[0, 0, 0].isnan().all() and lse[0, 0, 0].isnan() and y[0, 0, 1:].isfinite().all()
    dq, _, _ = _OPS.attention_backward(torch.ones_like(y), q, k, v, y, lse, mask, False, 1.0)
    assert dq[0, 0, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_a_scale_that_is_not_a_number(level: str, dtype: torch.dtype) -> None:
    q, k, v, grad = operands((1, 1, 1, 4, 4, 32), dtype)
    y, lse = _OPS.attention(q, k, v, None, False, 1.0)
    found = _OPS.attention_backward(grad, q, k, v, y, lse, None, False, torch.nan)
    assert all(each.isnan().all() for each in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lse", [-torch.inf, torch.nan])
def test_gradients_of_an_lse_that_is_not_finite(level: str, lse: float, dtype: torch.dtype) -> None:
    q, k, v, grad = operands((1, 1, 1, 4, 4, 32), dtype)
    y, sums = _OPS.attention(q, k, v, None, False, 1.0)
    found = _OPS.attention_backward(grad, q, k, v, y, torch.full_like(sums, lse), None, False, 1.0)
    assert not any(each.isfinite().any() for each in found)


def test_threads_and_layouts_give_the_same_bits() -> None:
    if not (ops.extension and ops.extension.has_attention("torch.bfloat16")):
        pytest.skip("PyTorch's operator is used at this level")
    q, k, v, grad = operands((3, 4, 2, 70, 70, 64))
    found = []
    for threads, change in ((1, Tensor.contiguous), (2, lambda t: t), (2, lambda t: t.mT.contiguous().mT)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            inputs = [change(t).detach().requires_grad_() for t in (q, k, v)]
            y = ops.attention(*inputs, causal=True)
            found.append([y, *torch.autograd.grad(y, inputs, grad)])
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    out, lse = _OPS.attention(q, k, v, None, True, 0.125)
    with_gaps = torch.stack([lse, lse], -1)[..., 0]
    found = [_OPS.attention_backward(grad, q, k, v, out, each, None, True, 0.125) for each in (lse, with_gaps)]
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_what_is_left_to_pytorch() -> None:
    q, k, v, _ = operands((1, 2, 2, 4, 4, 32))
    assert not has_attention_kernel(q.double(), k.double(), v.double(), None)
    assert not has_attention_kernel(q, k.float(), v.float(), None)
    assert not has_attention_kernel(*(t[..., :24] for t in (q, k, v)), None)
    assert not has_attention_kernel(q, k, v, torch.zeros(4, 4))
    assert not has_attention_kernel(q, k[:, :, :0], v[:, :, :0], None)


def test_a_second_gradient_is_refused(level: str) -> None:
    if not (ops.extension and ops.extension.has_attention("torch.bfloat16")):
        pytest.skip("PyTorch's operator is used at this level")
    q, k, v, _ = operands((1, 1, 1, 4, 4, 32))
    y = ops.attention(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match="attention cannot be differentiated twice"):
        torch.autograd.grad(y.sum(), q, create_graph=True)


def test_opcheck() -> None:
    q, k, v, grad = operands((2, 4, 2, 9, 9, 32))
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    out, lse = _OPS.attention(q, k, v, mask, True, 0.5)
    seed = torch.tensor(5)
    torch.library.opcheck(_OPS.attention, (q, k, v, mask, True, 0.5, 0.1, seed))
    torch.library.opcheck(_OPS.attention_backward, (grad, q, k, v, out, lse, mask, True, 0.5, 0.1, seed))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": (4, 9, 32)}, ValueError, r"q must be \[batch, heads, tokens, size\], found"),
        ({"k": (2, 2, 9, 64)}, ValueError, r"k must be \[2, heads, tokens, 32\] for q"),
        ({"v": (2, 2, 8, 32)}, ValueError, r"v must be \[2, 2, 9, 32\] like k, found"),
        (dict.fromkeys("kv", (2, 3, 9, 32)), ValueError, "must be a multiple of those of k, found 3"),
        ({"mask": (1, 1, 9, 9)}, TypeError, "mask must be torch.bool, found"),
        ({"dropout_p": 0.5}, ValueError, "dropout_p=0.5 needs a seed, found none"),
    ],
    ids=str,
)
def test_checks(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v, _ = operands((2, 4, 2, 9, 9, 32))
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "mask": None, "causal": False, "scale": 1.0}
    given |= {n: torch.zeros(x, dtype=torch.bfloat16) if isinstance(x, tuple) else x for n, x in change.items()}
    for call in (_OPS.attention, Attention):  # the kernel's checks and the reference's
        with pytest.raises(error, match=message):
            call(**given)
    if "mask" not in change:
        with pytest.raises(ValueError, match="mask must broadcast to"):
            _OPS.attention(q, k, v, torch.zeros(1, 1, 8, 9, dtype=torch.bool), False, 1.0)
        with pytest.raises(TypeError, match=r"k must be .* like q, found"):
            _OPS.attention(q, k.float(), v, None, False, 1.0)


def test_lse_on_another_device_is_refused() -> None:
    q, k, v, grad = operands((1, 1, 1, 4, 4, 32))
    for call in (_OPS.attention_backward, AttentionBackward):
        with pytest.raises(ValueError, match="attention_backward: lse must be on cpu like q, found meta"):
            call(grad, q, k, v, q, torch.zeros(1, 1, 4, device="meta"), None, False, 1.0)
