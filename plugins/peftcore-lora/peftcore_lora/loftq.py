"""LoftQ initialisation for a base in any 4-bit format (Li et al. 2023, arXiv 2310.08659).

s B A = the best approximation of W - Q of rank r, for the dense weight W and its quantized values Q. This is LoftQ's
first step; LoftQ would then quantize W - s B A, while Q stays as it is here. A and B are saved with the adapter, which
therefore only fits this quantized base.
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
    """Initialise a LoRA adapter from the quantization error W - Q.

    Args:
        model: a 4-bit model with a LoRA adapter that has not been trained.
        dense: the model before quantization, or its `state_dict()`; the tensors of an open safetensors file also work.
            One weight is read at a time.
        adapter: name of the adapter.

    Returns:
        The share of the quantization error that remains, ‖W - Q - s B A‖ / ‖W - Q‖, by path.

    Raises:
        PeftcoreError: the adapter has no LoRA on linear layers or has been trained, a dense weight is missing or has
            another shape, or no adapted layer is quantized. The adapter is left unchanged.
    """
    placed_adapter = other_adapter(model, adapter)
    layers = {path: layer for path, layer in placed_adapter.modules.items() if type(layer) is LoraLinear}
    validation.require(
        bool(layers),
        f"loftq_start needs LoRA on linear layers, and adapter '{adapter}' ({placed_adapter.method}) has none",
    )
    for path, layer in layers.items():
        validation.require(
            not layer.lora_B.any(),
            f"adapter '{adapter}' has been trained: B at '{path}' is not zero. Call loftq_start after apply, with "
            "init_lora_weights=True",
        )
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    residuals: dict[str, float] = {}
    for path, layer in layers.items():
        module = model.get_submodule(path)
        quantized = weight_format(module).read(module).detach().float()
        error = _dense_weight(dense, path, quantized).to(quantized.device) - quantized
        if not error.any():
            continue
        a, b = _low_rank_factors(error, len(layer.lora_A))
        residuals[path] = ((error - b @ a).norm() / error.norm()).item()
        starts[path] = a / layer.full_scale**0.5, b / layer.full_scale**0.5
    validation.require(
        bool(starts), "the adapted layers have the dense weights, without a quantization error. Use a 4-bit base"
    )
    for path, (a, b) in starts.items():
        layers[path].lora_A.copy_(a)
        layers[path].lora_B.copy_(b)
    other_paths = [path for path in placed_adapter.modules if path not in layers]
    if other_paths:
        warn(
            f"loftq_start only changes linear layers: {len(other_paths)} other layers ('{other_paths[0]}') keep "
            "their initial values"
        )
    return residuals


def _low_rank_factors(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A `[r, in]` and B `[out, r]` of equal norms, whose product is the best approximation of rank r."""
    out_width, width = weight.shape
    tiny = torch.finfo(weight.dtype).tiny
    # The eigenvectors of the smaller of W Wᵀ and Wᵀ W are singular vectors of W, and faster to compute than an SVD.
    if out_width <= width:
        u = torch.linalg.eigh(weight @ weight.T)[1][:, -r:]
        scaled_v = u.T @ weight
        root = scaled_v.norm(dim=1).clamp_min(tiny).sqrt()
        return scaled_v / root[:, None], u * root
    v = torch.linalg.eigh(weight.T @ weight)[1][:, -r:]
    scaled_u = weight @ v
    root = scaled_u.norm(dim=0).clamp_min(tiny).sqrt()
    return v.T * root[:, None], scaled_u / root


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
            weight = weight.T  # GPT-2's Conv1D stores [in, out]
    else:
        raise PeftcoreError(f"the dense weights lack '{name}'{nearest(name, dense)}. Pass weights of the same model")
    validation.require(
        weight.shape == like.shape,
        f"the dense weight '{name}' has shape {list(weight.shape)}, but the layer needs {list(like.shape)}",
    )
    return weight
