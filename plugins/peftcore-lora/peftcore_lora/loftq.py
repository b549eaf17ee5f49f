"""LoftQ's start for a base in any 4-bit format (Li et al. 2023, arXiv 2310.08659).

s B A = the r largest singular parts of W - Q, for the dense weight W and its quantized values Q: LoftQ's first step,
after which Q stays as it is. The start is a part of the adapter: it is saved, and means something on this base only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peftcore.plugin import PeftcoreError, nearest, other_adapter, validation, warn, weight_format
from peftcore_lora.layers import LoraLinear


@torch.no_grad()
def loftq_start(
    model: nn.Module, dense: nn.Module | Mapping[str, Tensor], *, adapter: str = "default"
) -> dict[str, float]:
    """Start a LoRA adapter at what quantization took from the weights.

    Args:
        model: a model in 4 bits with a LoRA adapter that was not trained.
        dense: the model before it was quantized, or its `state_dict()`, such as an open safetensors file's tensors. One
            weight is read at a time.
        adapter: name of the adapter.

    Returns:
        The share of the quantization error that is left, ‖W - Q - s B A‖ / ‖W - Q‖, by path.

    Raises:
        PeftcoreError: the adapter is not such a LoRA or was trained, a dense weight is missing or does not fit, or no
            adapted layer is quantized. The adapter is left unchanged.
    """
    found = other_adapter(model, adapter)
    layers = {path: each for path, each in found.modules.items() if type(each) is LoraLinear}
    validation.require(
        bool(layers), f"loftq_start needs LoRA on linear layers, and adapter '{adapter}' ({found.method}) has none"
    )
    for path, each in layers.items():
        validation.require(
            not each.lora_B.any(),
            f"adapter '{adapter}' has been trained: B at '{path}' is not zero. Call loftq_start after apply, with "
            "init_lora_weights=True",
        )
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    left: dict[str, float] = {}
    for path, each in layers.items():
        module = model.get_submodule(path)
        quantized = weight_format(module).read(module).detach().float()
        lost = _dense_weight(dense, path, quantized).to(quantized.device) - quantized
        if not lost.any():
            continue
        a, b = _largest_parts(lost, len(each.lora_A))
        left[path] = ((lost - b @ a).norm() / lost.norm()).item()
        starts[path] = a / each.full_scale**0.5, b / each.full_scale**0.5
    validation.require(bool(starts), "the adapted layers have the dense weights: loftq_start needs a base in 4 bits")
    for path, (a, b) in starts.items():
        layers[path].lora_A.copy_(a)
        layers[path].lora_B.copy_(b)
    others = [path for path in found.modules if path not in layers]
    if others:
        warn(f"loftq_start is for linear layers: {len(others)} others ('{others[0]}') keep the start that they have")
    return left


def _largest_parts(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A `[r, in]` and B `[out, r]`, equally large, whose product is the best approximation of rank r."""
    out_width, width = weight.shape
    gram = weight @ weight.T if out_width <= width else weight.T @ weight
    vectors = torch.linalg.eigh(gram)[1][:, -r:]
    other = vectors.T @ weight if out_width <= width else weight @ vectors
    root = other.norm(dim=1 if out_width <= width else 0).clamp_min(torch.finfo(other.dtype).tiny).sqrt()
    if out_width <= width:
        return other / root[:, None], vectors * root
    return vectors.T * root[:, None], other / root


def _dense_weight(dense: nn.Module | Mapping[str, Tensor], path: str, like: Tensor) -> Tensor:
    """Return the dense weight `[out, in]` of the layer at `path`, fp32."""
    name = f"{path}.weight"
    if isinstance(dense, nn.Module):
        modules = dict(dense.named_modules())
        if path not in modules:
            raise PeftcoreError(f"the dense model has no module '{path}'{nearest(path, modules)}")
        weight = weight_format(modules[path]).read(modules[path]).detach().float()
    elif name in dense:
        weight = dense[name].detach().float()
        if weight.shape != like.shape and weight.dim() == 2:
            weight = weight.T  # a Conv1D's
    else:
        raise PeftcoreError(f"the dense weights lack '{name}'{nearest(name, dense)}. Pass those of the same model")
    validation.require(
        weight.shape == like.shape,
        f"the dense weight '{name}' has shape {list(weight.shape)}, but the layer needs {list(like.shape)}",
    )
    return weight
