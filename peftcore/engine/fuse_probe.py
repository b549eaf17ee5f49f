"""A probe that shows whether a model's own loss and gradients are the same with fused operators.

`CountedDropout` gives the model's own forward the masks of `ops.dropout` and `ops.attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from peftcore.adaptation.fused_forward import own_forwards
from peftcore.engine.lazy_probe import left_unchanged
from peftcore.ops.dropout import factor, keep_mask, new_seed

_MOST = 1 << 24  # numbers whose gradients are compared
# Largest differences, relative to the loss and to the norm of the gradient: in 16 bits deep models amplify rounding.
_LOSS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
_GRADIENT = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}


def difference_when_fused(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Return how far loss and gradients of a fused model are from its own, or None if they agree within rounding.

    The loss and gradients of trainable parameters, those nearest to the inputs, are computed both ways, with the same
    random numbers and masks of dropout. Gradients of parameters, buffers and modes are left as they were. Call it in
    the autocast of the training.

    Args:
        model: after `fuse`, in any mode.
        inputs: arguments of the model's forward with `labels`: a few rows.
    """
    parameters: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad and sum(p.numel() for p in parameters) + parameter.numel() <= _MOST:
            parameters.append(parameter)
    with left_unchanged(model):
        model.train()
        found = _step(model, inputs, parameters)
        with own_forwards():
            wanted = _step(model, inputs, parameters)
    device, dtype = wanted[0].device.type, next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    loss = float(wanted[0])
    of_loss = abs(float(found[0]) - loss) / max(abs(loss), 1e-6)
    of_gradient = float((found[1] - wanted[1]).norm() / wanted[1].norm().clamp(min=1e-30))
    if not of_loss <= _LOSS.get(dtype, 1e-4) or not of_gradient <= _GRADIENT.get(dtype, 1e-3):  # type: ignore[arg-type]
        return (
            f"the loss of a few rows differs by {of_loss:.1e} with them, its gradient by {of_gradient:.1e}, relatively"
        )
    return None


def _step(model: nn.Module, inputs: Mapping[str, Any], parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss, and its gradients in one vector."""
    with torch.random.fork_rng(), torch.enable_grad(), CountedDropout():
        torch.manual_seed(0)
        loss: Tensor = model(**inputs).loss
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()
    parts = [gradient.flatten().float() for gradient in gradients if gradient is not None]
    return loss.detach().float(), torch.cat(parts) if parts else loss.new_zeros(0, dtype=torch.float32)


_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class CountedDropout(TorchFunctionMode):
    """Block in which `F.dropout` and the dropout of `scaled_dot_product_attention` draw seeds as fused modules do."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return what `func` returns, with another mask."""
        named = kwargs or {}
        if func is F.dropout:
            return _dropout(*args, **named)
        if func is F.scaled_dot_product_attention:
            return _attention(**dict(zip(_ARGUMENTS, args, strict=False)), **named)
        return func(*args, **named)


def _factors(shape: torch.Size, p: float, x: Tensor) -> Tensor:
    seed = new_seed(x)
    keep = keep_mask(shape[:-1].numel(), shape[-1], p, seed, x.device).view(shape)
    return keep * factor(1.0, p, seed)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or inplace or not 0 < p < 1 or input.dim() == 0 or not input.is_floating_point():
        return F.dropout(input, p, training, inplace)
    return (input * _factors(input.shape, p, input)).to(input.dtype)


def _attention(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
    dropout_p, attn_mask, scale = named.get("dropout_p", 0.0), named.get("attn_mask"), named.get("scale")
    if not 0 < dropout_p < 1 or query.dim() != 4 or query.shape[0] != key.shape[0]:
        return F.scaled_dot_product_attention(query, key, value, **named)
    groups = query.shape[1] // key.shape[1]
    k, v = (t.repeat_interleave(groups, 1).float() for t in (key, value))
    scores = query.float() @ k.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if named.get("is_causal"):
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    p = scores.softmax(-1).nan_to_num(0)  # of queries that see no key
    return (p * _factors(p.shape, dropout_p, query) @ v).to(query.dtype)
