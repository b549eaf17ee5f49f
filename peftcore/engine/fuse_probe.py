"""A probe that shows whether a model's own loss and gradients are the same with fused operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.adaptation.counted_dropout import CountedDropout
from peftcore.adaptation.fused_forward import own_forwards
from peftcore.engine.lazy_probe import left_unchanged

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
