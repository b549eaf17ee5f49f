"""Detect adapters that would get no gradient or a wrong one from the frozen model."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import nn

from peftcore.engine.attachments import AdapterAttachments
from peftcore.errors import PeftcoreError, warn
from peftcore.model import modules_without_gradients, observe
from peftcore.model.base_modules import base_modules, base_parameters, original_class, original_forward
from peftcore.plugin.layers import has_scaled_float8, is_bitsandbytes, is_linear, is_unknown_linear, is_wrapped, sizes


def refuse_without_gradient(model: nn.Module, attachments: AdapterAttachments, trains: bool) -> None:
    """Raise a PeftcoreError if adapters would get no gradient, or a wrong one.

    Args:
        trains: whether the adapters will be trained; if not, a blocked gradient only causes a warning.

    Raises:
        PeftcoreError: an adapter would be inside a `torch.autograd.Function` whose input requires no gradient; another
            library's linear layer passes no gradient to its input; or the model runs an adapted module under
            `torch.no_grad`.
    """
    if trains:
        _refuse_no_grad(model, attachments)
    _refuse_in_function(model, attachments)
    _keep_gradients_of_bitsandbytes(model)
    blocked = _blocking_product(model)
    if blocked is not None:
        path, kind = blocked
        problem = (
            f"'{path}' ({kind}) passes no gradient or a wrong gradient to its input, so adapters before it would not "
            "train correctly"
        )
        if trains:
            raise PeftcoreError(
                f"{problem}. Call peftcore.quantize(model) before apply, which keeps the 4-bit values"
                if is_bitsandbytes(model.get_submodule(path.removesuffix(".weight")))
                else (
                    f"{problem}. Quantize only weights, not activations, or use peftcore's 4-bit formats: "
                    "peftcore.quantize(model)"
                )
            )
        warn(f"{problem}. The adapter can be used for inference but not trained")


def _refuse_no_grad(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Refuse adapters at modules that the model runs under `torch.no_grad` (indexers of DeepSeek's sparse attention).

    Trained base parameters there only cause a warning, since methods select them by kind, such as all biases.
    """
    idle = modules_without_gradients(model)
    reason = f"{type(model).__name__} runs it under torch.no_grad, so it gets no gradient"
    for path in attachments.paths:
        if path in idle:
            raise PeftcoreError(
                f"{attachments.method.name} cannot train an adapter on '{path}': {reason}. Leave it out of "
                f"target_modules, or exclude it: exclude_modules=['{path.rpartition('.')[2]}']"
            )
    untrainable = [name for name in attachments.trained if name.rpartition(".")[0] in idle]
    if untrainable:
        suffix = f" and {len(untrainable) - 1} more" if len(untrainable) > 1 else ""
        warn(f"{attachments.method.name} does not train '{untrainable[0]}'{suffix}: {reason}")


def _refuse_in_function(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Refuse layers inside a `torch.autograd.Function` (as in Reformer) unless its input requires gradients."""
    function_paths = observe(model).in_function
    if not function_paths or getattr(model, "_require_grads_hooks", None):
        return
    paths = [*attachments.paths, *(name.rpartition(".")[0] for name in attachments.trained)]
    blocked_path = next((path for path in paths if path in function_paths), None)
    if blocked_path is None:
        return
    place = f"{type(model).__name__} runs '{blocked_path}' inside a torch.autograd.Function"
    if hasattr(model, "enable_input_require_grads"):
        raise PeftcoreError(
            f"{place}, where parameters get no gradient unless an input requires gradients. Before apply, call "
            "model.enable_input_require_grads()"
        )
    warn(f"{place}, where parameters get no gradient unless the inputs have requires_grad=True")


def _keep_gradients_of_bitsandbytes(model: nn.Module) -> None:
    """Prevent bitsandbytes' 4-bit layers on the CPU from packing their weight for a kernel without a backward pass.

    On a CPU with AVX512-BF16, bitsandbytes 0.49 and later packs the weight in the first call in eval mode and then uses
    that kernel in training too: adapters before the layer would miss a part of the gradient.
    """
    for _, module in base_modules(model):
        if module.__dict__.get("support_avx512bf16_for_cpu") and is_bitsandbytes(module):
            cast(Any, module).support_avx512bf16_for_cpu = False


def _blocking_product(model: nn.Module) -> tuple[str, str] | None:
    """Return (path, class of the weight or layer) of a linear layer with a missing or wrong input gradient, or None.

    One layer of each kind is run, among linear layers whose weight another library has wrapped, packed or scaled.
    """
    checked_kinds: set[tuple[type, type, bool]] = set()
    for path, module in base_modules(model):
        product = _foreign_product(path, module)
        if product is None:
            continue
        kind = original_class(module), type(module._parameters.get("weight")), is_bitsandbytes(module)
        if kind not in checked_kinds and not _passes_gradient(model, module):
            return product
        checked_kinds.add(kind)
    return None


def _foreign_product(path: str, module: nn.Module) -> tuple[str, str] | None:
    """Return (path, class of the weight or layer) if another library computes this linear layer, else None."""
    weight: Any = module._parameters.get("weight")
    is_plain = weight is None or (type(weight) is nn.Parameter and weight.itemsize > 1)
    if is_plain and (isinstance(module, nn.Linear) or not hasattr(module, "in_features")):
        return None
    if is_unknown_linear(module) or has_scaled_float8(module):
        return path, type(module).__name__
    if weight is None or type(weight) is nn.Parameter or not is_linear(module):
        return None
    if (is_bitsandbytes(module) and _is_packed(weight)) or is_wrapped(weight):
        return f"{path}.weight", type(weight).__name__
    return None


def _is_packed(weight: Any) -> bool:
    """Return whether bitsandbytes has packed a weight for its CPU kernel."""
    # Shards and dense weights have no `quant_state`.
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _passes_gradient(model: nn.Module, module: nn.Module) -> bool:
    """Return whether the input gradient of a layer agrees with finite differences."""
    forward, weight = partial(original_forward(module), module), module._parameters.get("weight")
    dtype = torch.float32 if weight is None else weight.dtype
    if not dtype.is_floating_point or dtype.itemsize == 1:
        floating = (p.dtype for _, p in base_parameters(model) if p.is_floating_point() and p.itemsize > 1)
        dtype = next(floating, torch.float32)
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    width = module.in_features if is_unknown_linear(module) else sizes(module)[0]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 32, cast(int, width), generator=generator).to(device, dtype)
    if rows.is_meta:
        return True
    with torch.enable_grad():
        x, step = rows[0].requires_grad_(), rows[1]
        try:
            y = forward(x).flatten(1).float()
        except Exception:
            return True  # a call of the model raises the error
        weights = torch.randn(y.shape[1], generator=generator).to(device)
        try:
            (gradient,) = torch.autograd.grad((y @ weights).sum(), x)
        except (RuntimeError, NotImplementedError):  # not a function of x, or not differentiable
            return False
    with torch.no_grad():
        observed = (forward(x + step).flatten(1).float() - y) @ weights
        expected = (gradient.float() * step.float()).sum(1)
    return bool(observed.norm() == 0) or bool(torch.cosine_similarity(observed, expected, dim=0) > 0.7)
