"""A probe that shows whether a model's own loss is the same with lazy logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.engine.lazy_head import has_lazy_logits, lazy_logits
from peftcore.errors import PeftcoreError
from peftcore.observation import detect

# Largest differences, relative to the loss and to the norm of the gradient: each way rounds the gradient of the logits
# and its product with the head's weight once.
_LOSS = 1e-4
_LARGE = 1 << 20
_GRADIENT = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def why_not_lazy(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Return why the model's loss of `inputs` should not be computed with lazy logits, or None.

    The loss and the gradient of the head's input are computed both ways, with the same random numbers. Gradients of
    parameters, buffers and lazy logits are left as they were. Call it in the autocast of the training.

    Args:
        model: in any mode.
        inputs: arguments of the model's forward with `labels`: a few rows.
    """
    if has_lazy_logits(model):
        return None
    with left_unchanged(model):
        try:
            lazy_logits(model)
            found = _lazily(model.train(), inputs)
            lazy_logits(model, enabled=False)
            wanted = _plainly(model, inputs)
        except PeftcoreError as error:
            return str(error)
        finally:
            if has_lazy_logits(model):
                lazy_logits(model, enabled=False)
    if found is None or wanted is None:
        return "its loss reads them, or no gradient passes the head"
    loss, gradient = float(wanted[0]), wanted[1].float()
    device = wanted[1].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else wanted[1].dtype
    off = abs(float(found[0]) - loss) / max(abs(loss), 1e-6), float((found[1] - gradient).norm() / gradient.norm())
    if not off[0] <= _LOSS or not off[1] <= _GRADIENT.get(dtype, 1e-3):
        return f"the loss of a few rows differs by {off[0]:.1e} with them, its gradient by {off[1]:.1e}, relatively"
    return None


@contextmanager
def left_unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the modes of modules and the values of buffers after the block."""
    training = {module: module.training for module in model.modules()}
    # Large ones are quantized weights, which no forward changes.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.numel() <= _LARGE}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        return model(**inputs)


def _lazily(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return loss and gradient of the head's input, or None if they are not computed without logits."""
    outputs = _outputs(model, inputs)
    recipe = getattr(outputs.logits, "recipe", None)
    if recipe is None or recipe.result is not None or not recipe.head.bypassed:
        return None
    (gradient,) = torch.autograd.grad(outputs.loss, recipe.head.hidden)
    return outputs.loss.detach(), gradient


def _plainly(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    seen: list[Tensor] = []
    head = model.get_submodule(str(detect(model).output_head))
    with head.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        loss = _outputs(model, inputs).loss
    (gradient,) = torch.autograd.grad(loss, seen[-1])
    return loss.detach(), gradient
