"""Detection of adapters that would get no gradient, or a wrong one, because of how the frozen model computes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcore.adaptation.base_modules import base_modules, original_class, original_forward
from peftcore.engine.placing import Placed
from peftcore.errors import PeftcoreError, warn
from peftcore.layers import is_bitsandbytes, is_linear, is_wrapped, sizes
from peftcore.observation import observe


def refuse_without_gradient(model: nn.Module, placed: Placed, trains: bool) -> None:
    """Raise a PeftcoreError if adapters would get no gradient, or a wrong one.

    Args:
        trains: whether the adapters are to be trained; if not, a gradient that is cut off is only a warning.

    Raises:
        PeftcoreError: adapters would be inside a `torch.autograd.Function` whose input requires no gradient, or the
            product with a weight that another library has wrapped or packed passes none to its input.
    """
    _refuse_in_function(model, placed)
    _keep_gradients_of_bitsandbytes(model)
    cut = _cut_off(model)
    if cut is not None:
        path, weight = cut
        what = (
            f"the product with '{path}.weight' ({type(weight).__name__}) gives its input no gradient, so adapters "
            "before it learn nothing, or only from a part of their effect"
        )
        if trains:
            raise PeftcoreError(
                f"{what}. Before apply, call peftcore.quantize(model), which keeps its bits"
                if is_bitsandbytes(model.get_submodule(path))
                else f"{what}. Quantize the weights without the inputs, or use 4 bits of peftcore: peftcore.quantize"
            )
        warn(f"{what}: it can be used but not trained")


def _refuse_in_function(model: nn.Module, placed: Placed) -> None:
    """Refuse layers in a `torch.autograd.Function` (Reformer's), which learn only if its input requires gradients."""
    inside = observe(model).in_function
    if not inside or getattr(model, "_require_grads_hooks", None):
        return
    paths = [*(each.path for each in placed.attached), *(name.rpartition(".")[0] for name in placed.trained)]
    lost = next((path for path in paths if path in inside), None)
    if lost is None:
        return
    what = f"{type(model).__name__} runs '{lost}' inside a torch.autograd.Function, so what is trained there gets no "
    if hasattr(model, "enable_input_require_grads"):
        raise PeftcoreError(
            f"{what}gradient unless an input requires one. Before apply, call model.enable_input_require_grads()"
        )
    warn(f"{what}gradient unless the inputs have requires_grad=True")


def _keep_gradients_of_bitsandbytes(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers on the CPU from packing their weight for a kernel without a derivative.

    Since 0.49 they do so in their first call in eval mode on a CPU with AVX512-BF16, and use that kernel in training
    from then on: adapters before them would learn from a part of the gradient.
    """
    for _, module in base_modules(model):
        if module.__dict__.get("support_avx512bf16_for_cpu") and is_bitsandbytes(module):
            cast(Any, module).support_avx512bf16_for_cpu = False


def _cut_off(model: nn.Module) -> tuple[str, Tensor] | None:
    """Return (path, weight) of a linear layer whose wrapped weight passes no gradient; one of each kind is run."""
    seen = set()
    for path, module in base_modules(model):
        weight: Any = module._parameters.get("weight")
        if weight is None or type(weight) is nn.Parameter:
            continue
        packed = is_bitsandbytes(module) and _is_packed(weight)
        if not (packed or is_wrapped(weight)) or not is_linear(module):
            continue
        kind = original_class(module), type(weight), packed
        if kind not in seen and not _lets_through(module, weight):
            return path, weight
        seen.add(kind)
    return None


def _is_packed(weight: Any) -> bool:
    """Return whether bitsandbytes has packed a weight for its CPU kernel; a shard or a dense weight has no state."""
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _lets_through(module: nn.Module, weight: Tensor) -> bool:
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    with torch.enable_grad():
        x = torch.ones(2, sizes(module)[0], dtype=dtype, device=weight.device, requires_grad=True)
        try:
            y = original_forward(module)(module, x)
        except Exception:
            return True  # a call of the model raises the error
        try:
            return bool(torch.autograd.grad(y.float().sum(), x)[0].isfinite().any())
        except (RuntimeError, NotImplementedError):  # not a function of x, or without a derivative
            return False
