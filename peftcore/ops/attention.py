"""Attention, softmax(c q kᵀ) v, and its gradients.

    lse = log Σ exp(S),  P = exp(S - lse),  out = P v           S = c q kᵀ, and -inf for masked keys
    dP = dout vᵀ,  dS = c P ∘ (dP - Σ dout ∘ out)
    dq = dS k,  dk = dSᵀ q,  dv = Pᵀ dout

Dropout multiplies P by D = keep / (1 - p): out = (D ∘ P) v, dP = D ∘ (dout vᵀ), dv = (D ∘ P)ᵀ dout. The dropout mask is
generated for P as a matrix [batch · heads · queries, keys], and generated again in the backward pass (dropout.py).

The results equal those of PyTorch's `scaled_dot_product_attention`, which takes 1.1 to 1.9 times as long in fp32 with
AVX2, and several times as long with dropout or in 16 bits. Sums are fp32. With bf16 dot products, P and dS are rounded
to bf16 before they are multiplied; otherwise all products are fp32. q, k, v, out and lse (one number per query and
head) are saved for the gradient, which recomputes S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.ops._extension import extension
from peftcore.ops._library import define_by
from peftcore.ops.calling import as_non_view, has_active_transform, operator_for
from peftcore.ops.dropout import check_dropout, factor, keep_mask, seed_of_call
from peftcore.ops.weight import check_dtype, require

_OPS = torch.ops.peftcore
_DEVICES = ("cpu", "meta")
_HEAD_SIZE_MULTIPLE, _MOST_KEYS, _LARGEST_HEAD = 32, 4096, 256


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    check_dtype(q.dtype, op)
    require(q.dim() == 4, op, f"q must be [batch, heads, tokens, size], found {list(q.shape)}")
    for name, t in (("k", k), ("v", v)):
        _check_like(op, q, name, t)
    require(v.shape == k.shape, op, f"v must be {list(k.shape)} like k, found {list(v.shape)}")
    fits = k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    require(fits, op, f"the {q.shape[1]} heads of q must be a multiple of those of k, found {k.shape[1]}")
    if mask is None:
        return
    if mask.dtype is not torch.bool:
        raise TypeError(f"{op}: mask must be torch.bool, found {mask.dtype}")
    expected = [*q.shape[:3], k.shape[2]]
    fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, expected, strict=True))
    require(fits, op, f"mask must broadcast to {expected}, found {list(mask.shape)}")
    require(mask.device == q.device, op, f"mask must be on {q.device} like q, found {mask.device}")


def _check_like(op: str, q: Tensor, name: str, t: Tensor) -> None:
    if t.dtype is not q.dtype:
        raise TypeError(f"{op}: {name} must be {q.dtype} like q, found {t.dtype}")
    fits = t.dim() == 4 and t.shape[0] == q.shape[0] and t.shape[3] == q.shape[3]
    found_shape = f"found {list(t.shape)}"
    require(fits, op, f"{name} must be [{q.shape[0]}, heads, tokens, {q.shape[3]}] for q, {found_shape}")
    require(t.device == q.device, op, f"{name} must be on {q.device} like q, found {t.device}")


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = q.float() @ _repeat_heads(k, q).transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores


def _repeat_heads(t: Tensor, q: Tensor) -> Tensor:
    return t.float().repeat_interleave(q.shape[1] // t.shape[1], 1)


def _dropout_factors(q: Tensor, k: Tensor, p: float, seed: Tensor | None) -> Tensor | float:
    if seed is None or not p:
        return 1.0
    shape = (*q.shape[:3], k.shape[2])
    keep = keep_mask(q.shape[:3].numel(), k.shape[2], p, seed, q.device).view(shape)
    return keep * factor(1.0, p, seed)


def _by_tokens(t: Tensor) -> Tensor:
    """Return an empty tensor like t, laid out in memory as [batch, tokens, heads, size]."""
    return t.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3])).transpose(1, 2)


@dataclass
class Attention:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def __post_init__(self) -> None:
        _check("attention", self.q, self.k, self.v, self.mask)
        check_dropout("attention", self.q, self.dropout_p, self.seed)

    def compute(self) -> tuple[Tensor, Tensor]:
        scores = _scores(self.q, self.k, self.mask, self.causal, self.scale)
        lse = scores.logsumexp(3)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # queries without a visible key
        p = (scores - lse[..., None]).exp() * _dropout_factors(self.q, self.k, self.dropout_p, self.seed)
        out = p @ _repeat_heads(self.v, self.q)
        return _by_tokens(self.q).copy_(out), lse

    def empty(self) -> tuple[Tensor, Tensor]:
        return _by_tokens(self.q), self.q.new_empty(self.q.shape[:3], dtype=torch.float32)


@dataclass
class AttentionBackward:
    grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def __post_init__(self) -> None:
        op, shape = "attention_backward", list(self.q.shape)
        _check(op, self.q, self.k, self.v, self.mask)
        for name, t in (("grad", self.grad), ("out", self.out)):
            _check_like(op, self.q, name, t)
            require(list(t.shape) == shape, op, f"{name} must be {shape} like q, found {list(t.shape)}")
        if self.lse.dtype is not torch.float32:
            raise TypeError(f"{op}: lse must be torch.float32, found {self.lse.dtype}")
        require(self.lse.device == self.q.device, op, f"lse must be on {self.q.device} like q, found {self.lse.device}")
        require(list(self.lse.shape) == shape[:3], op, f"lse must be {shape[:3]}, found {list(self.lse.shape)}")
        check_dropout(op, self.q, self.dropout_p, self.seed)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, grad = self.q, self.k, self.grad.float()
        p = (_scores(q, k, self.mask, self.causal, self.scale) - self.lse[..., None]).exp()
        delta = (grad * self.out.float()).sum(3, keepdim=True)
        dropout_factors = _dropout_factors(q, k, self.dropout_p, self.seed)
        ds = p * (dropout_factors * (grad @ _repeat_heads(self.v, q).transpose(2, 3)) - delta) * self.scale

        def sum_groups(t: Tensor) -> Tensor:
            return t.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1])).sum(2)

        dk, dv = ds.transpose(2, 3) @ q.float(), (dropout_factors * p).transpose(2, 3) @ grad
        dq = ds @ _repeat_heads(k, q)
        return _by_tokens(q).copy_(dq), _by_tokens(k).copy_(sum_groups(dk)), _by_tokens(k).copy_(sum_groups(dv))

    def empty(self) -> tuple[Tensor, Tensor, Tensor]:
        return _by_tokens(self.q), _by_tokens(self.k), _by_tokens(self.k)


define_by(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, float dropout_p=0.0, "
    "Tensor? seed=None) -> (Tensor out, Tensor lse)",
    Attention,
)
define_by(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, bool causal, "
    "float scale, float dropout_p=0.0, Tensor? seed=None) -> (Tensor dq, Tensor dk, Tensor dv)",
    AttentionBackward,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        numbers: tuple[bool, float, float],
    ) -> Tensor:
        out, lse = operator_for("attention", seed)(q, k, v, mask, *numbers, seed)
        ctx.save_for_backward(q, k, v, out, lse, mask, seed)
        ctx.numbers = numbers
        return as_non_view(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask, seed = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError(
                "attention cannot be differentiated twice (create_graph=True). "
                "Use F.scaled_dot_product_attention with the math backend instead"
            )
        gradients = operator_for("attention_backward", seed)(grad, q, k, v, out, lse, mask, *ctx.numbers, seed)
        return (
            *(g if needs_grad else None for g, needs_grad in zip(gradients, ctx.needs_input_grad, strict=False)),
            None,
            None,
            None,
        )


def has_attention_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Return whether the extension has a kernel for these tensors and PyTorch's operator would accept them.

    Meta tensors count as CPU tensors.
    """
    if extension is None or not _shapes_have_kernel(q, k, v):
        return False
    return (
        q.dtype is k.dtype is v.dtype
        and q.device.type == k.device.type == v.device.type
        and q.device.type in _DEVICES
        and (mask is None or _mask_has_kernel(mask))
        and extension.has_attention(str(q.dtype))
    )


def _shapes_have_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape != v.shape or q.numel() == 0:
        return False
    batch, heads, _, size = q.shape
    key_batch, key_heads, keys, key_size = k.shape
    return (
        (batch, size) == (key_batch, key_size)
        and size % _HEAD_SIZE_MULTIPLE == 0
        and size <= _LARGEST_HEAD
        and 0 < keys <= _MOST_KEYS
        and key_heads > 0
        and heads % key_heads == 0
    )


def _mask_has_kernel(mask: Tensor) -> bool:
    return mask.dtype is torch.bool and mask.device.type in _DEVICES and 2 <= mask.dim() <= 4


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return softmax(scale · q kᵀ) v.

    Args:
        q: `[batch, heads, queries, size]`; fp32, fp16 or bf16.
        k, v: `[batch, key heads, keys, size]` in q's dtype; the heads of q are a multiple of the key heads.
        mask: bool, broadcastable to `[batch, heads, queries, keys]`; False hides a key from a query. The result is 0
            for queries without a visible key.
        causal: query i attends only to keys 0 to i.
        scale: factor of q kᵀ; None means 1 / √size.
        dropout_p, seed: dropout of the attention probabilities, as in `dropout`.

    Returns:
        `[batch, heads, queries, size]` in q's dtype, with gradients for q, k and v.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes of the arguments do not match. RuntimeError: the result of a
            kernel is differentiated twice.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    if has_active_transform() or not (dropout_p or has_attention_kernel(q, k, v, mask)):
        if causal and mask is not None:
            mask = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal=causal and mask is None, scale=scale, enable_gqa=gqa
        )
    seed = seed_of_call(q, seed) if dropout_p else None
    numbers = causal, scale, dropout_p
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, mask, seed, numbers)  # type: ignore[no-untyped-call]
    out: Tensor = operator_for("attention", seed)(q, k, v, mask, *numbers, seed)[0]
    return out
