"""y = x Wᵀ + bias + S Bᵀ with S = c (keep ∘ x) Aᵀ, and its gradients; W is frozen, dense or in 4 bits.

    forward     S [M, r]                                   c = scale / (1 - p)
                y = (x Wᵀ + bias) + S Bᵀ
    backward    T = c dy B                                 [M, r]
                dx = dy W + keep ∘ (T A)
                dA = Tᵀ (keep ∘ x),  dB = dyᵀ S,  dbias = the sum of dy over all rows

Kept for the gradient are x and S, which is thin. `keep`, the dropout mask, is never stored: Philox gives it again from
a seed, the row and the column (see `keep_mask`), the same bits on every device.

A, B, S and T are fp32 beside a 16-bit x, never rounded to it: in fp16 a T of small gradients would vanish, and in bf16
dA would be off by 2e-3. y and dx are rounded once, or twice where the library makes the base's product; dA and dB leave
in the dtype of A and B.

One operator adds for several adapters at once, one to a sample: `lora_linear_per_sample` (Punica, arXiv 2310.18547).

Whole blocks are not fused (q, k and v, or gate and up, share x): all of LoRA adds 9 % to a training step of a 135M
Llama shape, and its passes over x, which alone could be shared, are a fraction of that.

The gradient is an `autograd.Function` over operators without autograd of their own: the layers of a model pay for
every microsecond (see linear_4bit.py). It cannot be differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.ops._library import define
from peftcore.ops._philox import LOW, philox
from peftcore.ops.nf4 import _NESTED, DTYPES, NestedScales, _check_dequantize, _check_tensor, _value

_OPS = torch.ops.peftcore


class PackedWeight(NamedTuple):
    """A weight `[out_features, in]` in 4 bits, as `quantize_4bit` packs it and `linear_4bit` reads it."""

    packed: Tensor
    absmax: Tensor
    code: Tensor
    out_features: int
    blocksize: int = 64
    nested: NestedScales | None = None


# --- dropout ----------------------------------------------------------------------------------------------------------


def _threshold(p: float) -> int:
    """Of 65536 equally likely numbers, how many drop an element."""
    return min(round(p * 65536), 65535)


def keep_mask(rows: int, columns: int, p: float, seed: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Which elements of x `[rows, columns]` dropout keeps, bool: the bits that every kernel generates.

    Philox4x32-7 (Salmon et al. 2011) of counter (column // 8, row mod 2³², row >> 32, 0) and key `seed` gives eight
    16-bit numbers, low half first, for eight columns; those below round(65536 p) drop theirs. So p is exact to 2⁻¹⁷.
    """
    row = torch.arange(rows, device=device).view(-1, 1)
    column = torch.arange(-(-columns // 8), device=device).expand(rows, -1)
    counter = (column, (row & LOW).expand_as(column), (row >> 32).expand_as(column), torch.zeros_like(column))
    numbers = philox(counter, int(seed), rounds=7).flatten(1)
    return numbers[:, :columns] >= _threshold(p)


def _matrix(t: Tensor) -> Tensor:
    """[all leading dimensions, last]."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """keep ∘ x, of a matrix."""
    return x if seed is None or not p else x.where(keep_mask(*x.shape, p, seed, x.device), 0)


def _wide(x: Tensor) -> torch.dtype:
    """In which A, B, S and T are."""
    return torch.promote_types(x.dtype, torch.float32)


def _factor(scale: float, p: float, seed: Tensor | None) -> float:
    """c."""
    return scale if seed is None else scale * 65536 / (65536 - _threshold(p))


# --- checks: the same conditions and exception types as csrc/lora/arguments.h -----------------------------------------


def _out_features(op: str, b: Tensor) -> int:
    _value(b.dim() == 2, op, f"b must have two dimensions, found {list(b.shape)}")
    return b.shape[0]


def _check_factors(op: str, x: Tensor, a: Tensor, b: Tensor, out_features: int, names: tuple[str, str]) -> None:
    for name, t in zip(names, (a, b), strict=True):
        if not t.is_floating_point():
            raise TypeError(f"{op}: {name} must be of a floating-point dtype, found {t.dtype}")
        _value(t.device == x.device, op, f"{name} must be on {x.device} like x, found {t.device}")
        _value(t.dim() == 2, op, f"{name} must have two dimensions, found {list(t.shape)}")
    r = a.shape[0]
    _value(a.shape[1] == x.shape[-1], op, f"{names[0]} must be [r, {x.shape[-1]}] for x, found {list(a.shape)}")
    _value(b.shape == (out_features, r), op, f"{names[1]} must be [{out_features}, {r}], found {list(b.shape)}")


def _check_linear(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, quantized: tuple[Any, ...]
) -> None:
    if x.dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"{op}: only float32, float16 and bfloat16 (and float64) are supported, found {x.dtype}")
    _value(x.dim() > 0, op, "x must have at least one dimension, found a scalar")
    absmax, code, blocksize, *nested = quantized
    if absmax is not None:
        _value(code is not None, op, "a packed weight needs absmax and code, found no code")
        _check_tensor(weight, torch.uint8, x.device, op, "packed")
        _check_dequantize(weight, absmax, code, blocksize, (out_features, x.shape[-1]), x.dtype, *nested)
    else:
        if weight.dtype != x.dtype:
            raise TypeError(f"{op}: weight must be {x.dtype} like x, found {weight.dtype}")
        _value(weight.device == x.device, op, f"weight must be on {x.device} like x, found {weight.device}")
        wanted = (out_features, x.shape[-1])
        _value(weight.shape == wanted, op, f"weight must be {list(wanted)}, found {list(weight.shape)}")
    if bias is not None:
        _value(bias.shape == (out_features,), op, f"bias must be [{out_features}], found {list(bias.shape)}")
        if bias.dtype != x.dtype:
            raise TypeError(f"{op}: bias must be {x.dtype} like x, found {bias.dtype}")
        _value(bias.device == x.device, op, f"bias must be on {x.device} like x, found {bias.device}")


def _check_gradient(op: str, grad: Tensor, s: Tensor, x: Tensor, out_features: int, r: int) -> None:
    for name, t, dtype in (("grad", grad, x.dtype), ("s", s, _wide(x))):
        if t.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {dtype} for x of {x.dtype}, found {t.dtype}")
        _value(t.device == x.device, op, f"{name} must be on {x.device} like x, found {t.device}")
    wanted = [*x.shape[:-1], out_features]
    _value(list(grad.shape) == wanted, op, f"grad must be {wanted}, found {list(grad.shape)}")
    rows = x.shape[:-1].numel()
    _value(s.shape == (rows, r), op, f"s must be [{rows}, {r}], found {list(s.shape)}")


def _check_dropout(op: str, p: float, seed: Tensor | None) -> None:
    _value(0 <= p < 1, op, f"dropout_p must be in [0, 1), found {p}")
    if seed is None:
        _value(p == 0, op, f"dropout_p={p} needs a seed, found none")
    else:
        if seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed must be torch.int64, found {seed.dtype}")
        _value(seed.numel() == 1, op, f"seed must hold 1 element, found {seed.numel()}")
        _value(seed.device.type in ("cpu", "meta"), op, f"seed must be on cpu, found {seed.device}")


# --- references -------------------------------------------------------------------------------------------------------


def _base(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, quantized: tuple[Any, ...]) -> Tensor:
    """x Wᵀ + bias."""
    absmax, code, blocksize, *nested = quantized
    if absmax is None:
        return F.linear(x, weight, bias)
    return _OPS.linear_4bit(x, weight, absmax, code, blocksize, out_features, bias, *nested)


@torch.no_grad()
def _lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    blocksize: int = 64,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> tuple[Tensor, Tensor]:
    op, out = "lora_linear", _out_features("lora_linear", b)
    quantized = (absmax, code, blocksize, nested_absmax, nested_code, nested_offset, nested_blocksize)
    _check_linear(op, x, weight, bias, out, quantized)
    _check_factors(op, x, a, b, out, ("a", "b"))
    _check_dropout(op, dropout_p, seed)
    y, wide = _matrix(_base(x, weight, bias, out, quantized)), _wide(x)
    s = _dropped(_matrix(x), dropout_p, seed).to(wide) @ a.to(wide).T * _factor(scale, dropout_p, seed)
    return (y + s @ b.to(wide).T).to(x.dtype).view(*x.shape[:-1], out), s


def _fake_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    blocksize: int = 64,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> tuple[Tensor, Tensor]:
    op, out = "lora_linear", _out_features("lora_linear", b)
    quantized = (absmax, code, blocksize, nested_absmax, nested_code, nested_offset, nested_blocksize)
    _check_linear(op, x, weight, bias, out, quantized)
    _check_factors(op, x, a, b, out, ("a", "b"))
    _check_dropout(op, dropout_p, seed)
    return x.new_empty((*x.shape[:-1], out)), x.new_empty((x.shape[:-1].numel(), a.shape[0]), dtype=_wide(x))


@torch.no_grad()
def _lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    needs: Sequence[bool],
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    blocksize: int = 64,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> tuple[Tensor, Tensor, Tensor]:
    quantized = (absmax, code, blocksize, nested_absmax, nested_code, nested_offset, nested_blocksize)
    _check_backward(grad, x, s, weight, a, b, dropout_p, seed, quantized)
    columns, wide = x.shape[-1], _wide(x)
    rows = _matrix(grad).to(wide)
    dx, da, db = x.new_empty(0), a.new_empty(0), b.new_empty(0)
    t = rows @ b.to(wide) * _factor(scale, dropout_p, seed)  # [M, r]
    if needs[0]:
        if absmax is None:
            dx = grad @ weight
        else:
            dx = _OPS.linear_4bit_backward(grad, weight, *quantized[:3], columns, *quantized[3:])
        dx = (_matrix(dx) + _dropped(t @ a.to(wide), dropout_p, seed)).to(x.dtype).view(x.shape)
    if needs[1]:
        da = (t.T @ _dropped(_matrix(x), dropout_p, seed).to(wide)).to(a.dtype)
    if needs[2]:
        db = (rows.T @ s).to(b.dtype)
    return dx, da, db


def _check_backward(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    quantized: tuple[Any, ...],
) -> None:
    op = "lora_linear_backward"
    out = _out_features(op, b)
    _check_linear(op, x, weight, None, out, quantized)
    _check_factors(op, x, a, b, out, ("a", "b"))
    _check_gradient(op, grad, s, x, out, a.shape[0])
    _check_dropout(op, dropout_p, seed)


def _fake_lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    needs: Sequence[bool],
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    blocksize: int = 64,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> tuple[Tensor, ...]:
    quantized = (absmax, code, blocksize, nested_absmax, nested_code, nested_offset, nested_blocksize)
    _check_backward(grad, x, s, weight, a, b, dropout_p, seed, quantized)
    shapes = [t.shape if needed else (0,) for t, needed in zip((x, a, b), needs, strict=True)]
    return x.new_empty(shapes[0]), a.new_empty(shapes[1]), b.new_empty(shapes[2])


def _check_per_sample(
    x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], index: Tensor, out: int
) -> None:
    op = "lora_linear_per_sample"
    sizes = f"{len(a)}, {len(b)} and {len(scales)}"
    _value(len(a) == len(b) == len(scales), op, f"a, b and scales must be of one length, found {sizes}")
    for i, factors in enumerate(zip(a, b, strict=True)):
        _check_factors(op, x, *factors, out, (f"a[{i}]", f"b[{i}]"))
    if index.dtype != torch.int64:
        raise TypeError(f"{op}: index must be torch.int64, found {index.dtype}")
    wanted = f"index must be [{x.shape[0]}], one for each sample of x"
    _value(index.shape == x.shape[:1], op, f"{wanted}, found {list(index.shape)}")


@torch.no_grad()
def _lora_linear_per_sample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    index: Tensor,
    out_features: int,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    blocksize: int = 64,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> Tensor:
    quantized = (absmax, code, blocksize, nested_absmax, nested_code, nested_offset, nested_blocksize)
    _check_linear("lora_linear_per_sample", x, weight, bias, out_features, quantized)
    _check_per_sample(x, a, b, scales, index, out_features)
    found = index.tolist()
    for i in found:
        _value(-1 <= i < len(a), "lora_linear_per_sample", f"index must be -1 (none) to {len(a) - 1}, found {i}")
    y, wide = _base(x, weight, bias, out_features, quantized), _wide(x)
    for i in sorted(set(found) - {-1}):
        rows = index == i
        s = F.linear(x[rows].to(wide), a[i].to(wide)) * scales[i]
        y[rows] = (y[rows] + F.linear(s, b[i].to(wide))).to(x.dtype)
    return y


def _fake_lora_linear_per_sample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    index: Tensor,
    out_features: int,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    blocksize: int = 64,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_blocksize: int = 256,
) -> Tensor:
    quantized = (absmax, code, blocksize, nested_absmax, nested_code, nested_offset, nested_blocksize)
    _check_linear("lora_linear_per_sample", x, weight, bias, out_features, quantized)
    _check_per_sample(x, a, b, scales, index, out_features)
    return x.new_empty((*x.shape[:-1], out_features))


_QUANTIZED = f"Tensor? absmax=None, Tensor? code=None, int blocksize=64, {_NESTED}"
_DROPOUT = "float dropout_p=0.0, Tensor? seed=None"

define(
    f"lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, {_DROPOUT}, {_QUANTIZED}) "
    "-> (Tensor y, Tensor s)",
    _lora_linear,
    _fake_lora_linear,
)
define(
    "lora_linear_backward(Tensor grad, Tensor x, Tensor s, Tensor weight, Tensor a, Tensor b, bool[3] needs, "
    f"float scale, {_DROPOUT}, {_QUANTIZED}) -> (Tensor dx, Tensor da, Tensor db)",
    _lora_linear_backward,
    _fake_lora_linear_backward,
)
define(
    "lora_linear_per_sample(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, float[] scales, "
    f"Tensor index, SymInt out_features, {_QUANTIZED}) -> Tensor",
    _lora_linear_per_sample,
    _fake_lora_linear_per_sample,
)


# --- what users call --------------------------------------------------------------------------------------------------


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
        *quantized: Any,
    ) -> Tensor:
        # Kernels are for the dtypes of training; float64 is for checking gradients.
        forward = _lora_linear if x.dtype is torch.float64 else _OPS.lora_linear
        y, s = forward(x, weight, bias, a, b, scale, dropout_p, seed, *quantized)
        tensors = quantized[:2] + quantized[3:6]
        ctx.save_for_backward(x, s, weight, a, b, seed, *tensors)
        ctx.numbers = scale, dropout_p, quantized[2:3], quantized[6:]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "lora_linear cannot be differentiated twice (create_graph=True). Compute x @ W.T + "
                "scale * (x @ A.T) @ B.T from differentiable operators instead"
            )
        x, s, weight, a, b, seed, *tensors = ctx.saved_tensors
        scale, dropout_p, blocksize, nested_blocksize = ctx.numbers
        need_x, need_bias, *need_factors = ctx.needs_input_grad[:4]
        dx = da = db = bias_grad = None
        needs = [need_x, *need_factors]
        if any(needs):
            backward = _lora_linear_backward if x.dtype is torch.float64 else _OPS.lora_linear_backward
            quantized = (*tensors[:2], *blocksize, *tensors[2:], *nested_blocksize)
            found = backward(grad, x, s, weight, a, b, needs, scale, dropout_p, seed, *quantized)
            dx, da, db = (g if needed else None for g, needed in zip(found, needs, strict=True))
        if need_bias:
            bias_grad = _matrix(grad).sum(0)
        return dx, bias_grad, da, db, *(None for _ in ctx.needs_input_grad[4:])


def _refuse_capture(x: Tensor) -> None:
    """A CUDA graph would keep the seed that the host drew once, and drop the same elements at every replay."""
    if x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "lora_linear: dropout cannot be captured in a CUDA graph, every replay of which would drop the same "
            "elements. Set dropout to 0, or leave the step outside the graph"
        )


def _operands(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...]]:
    """(x, weight, bias, what reads a packed weight), cast as autocast says."""
    device, quantized = x.device.type, ()
    if device != "meta" and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        if isinstance(weight, Tensor):
            weight = weight.to(x.dtype)
    if not isinstance(weight, Tensor):
        weight, absmax, code, _, blocksize, nested = weight
        quantized = (absmax, code, blocksize, *(nested or ()))
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return x, weight, bias, quantized


def lora_linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + bias + scale · (dropout(x) Aᵀ) Bᵀ.

    Args:
        x: fp32, fp16, bf16 or float64 `[..., in]`; under autocast it is cast as for `F.linear`.
        weight: `[out, in]` in x's dtype (under autocast in any), or a `PackedWeight`. It gets no gradient.
        bias: `[out]`, cast to x's dtype.
        a, b: `[r, in]` and `[out, r]` in any floating-point dtype, used as fp32 (beside a float64 x as float64);
            their gradients have their own.
        dropout_p: probability with which an element of x is dropped before A, to a multiple of 1/65536.
        seed: int64 `[]` on CPU, which decides the elements (see `keep_mask`). Drawn from PyTorch's generator where
            there is dropout and none is given, so that `torch.manual_seed` and checkpointing hold.

    Returns:
        `[..., out]` in x's dtype (autocast's, where it is on), with gradients for x, bias, a and b.

    Raises:
        TypeError, ValueError: an argument that does not fit the others. RuntimeError: differentiated twice.
    """
    x, weight, bias, quantized = _operands(x, weight, bias)
    if not dropout_p:
        seed = None
    elif seed is None:
        _refuse_capture(x)
        seed = torch.randint(2**63 - 1, (), device="cpu")
    if torch.is_grad_enabled() and (
        a.requires_grad or x.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _LoraLinear.apply(x, bias, a, b, weight, scale, dropout_p, seed, *quantized)
    forward = _lora_linear if x.dtype is torch.float64 else _OPS.lora_linear
    return forward(x, weight, bias, a, b, scale, dropout_p, seed, *quantized)[0]


def lora_linear_per_sample(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    index: Tensor,
) -> Tensor:
    """x Wᵀ + bias, and for each sample i of x the adapter `index[i]` of several added. Without gradients.

    Args:
        x, weight, bias: as for `lora_linear`; x is `[samples, ..., in]`.
        a, b, scales: of each adapter, `[r, in]`, `[out, r]` and a number; ranks may differ.
        index: int64 `[samples]` on x's device; -1 for a sample that gets no adapter.

    Returns:
        `[samples, ..., out]`.
    """
    out_features = weight.out_features if isinstance(weight, PackedWeight) else weight.shape[0]
    x, weight, bias, quantized = _operands(x, weight, bias)
    per_sample = _lora_linear_per_sample if x.dtype is torch.float64 else _OPS.lora_linear_per_sample
    return per_sample(x, weight, bias, a, b, scales, index, out_features, *quantized)
