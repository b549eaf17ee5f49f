"""Initial A and B computed from data: CorDA uses the inputs X of a layer, LoRA-GA its gradient G.

corda     W C = U S Vᵀ, C = Xᵀ X + damp, s B A = U_r S_r V_rᵀ C⁻¹       (Yang et al. 2024, arXiv 2406.05223)
          r largest components ("ipm": learn the new task), or the r smallest ("kpm": preserve knowledge about these X)
lora_ga   G = U S Vᵀ, A from some right, B from other left singular vectors    (Wang et al. 2024, arXiv 2407.05000)
          so that the first step of B A approximates a step of W

Both give a B A that is not zero, so the initial B0 A0 is subtracted (see `starts.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftcore.plugin import PeftcoreError, gradients_of, inputs_of, targets, validation, weight_format
from peftcore_lora.config import nested_config

LAYERS_PER_PASS = 16  # each pass over the data holds XᵀX or G of this many layers in memory


@dataclass(frozen=True)
class CordaConfig:
    """Config with the field `corda_method` of Hugging Face PEFT's `CordaConfig`, without its cache files."""

    corda_method: Literal["ipm", "kpm"] = "ipm"

    def __post_init__(self) -> None:
        validation.check_types(self)


@dataclass(frozen=True)
class LoraGAConfig:
    """Config with the field names of Hugging Face PEFT's `LoraGAConfig`.

    Args:
        direction: which of the first 2 r singular vectors A and B get: "ArB2r" (A the first r, B the second r),
            "A2rBr" (the reverse), "ArBr" (A the odd, B the even ones), "random" (both the same r at random).
        scale: "stable" (B times out^(1/4) / stable_gamma^(1/2)), "weight_svd" (B with the largest singular value of
            W), "gd_scale" (A and B divided by the adapter's scale), "unit" (unchanged).
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: float = 16

    def __post_init__(self) -> None:
        validation.check_types(self)


def corda(
    model: nn.Module, adapters: Mapping[str, Any], fields: Mapping[str, Any], batches: Iterable[Any]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (path, A, B) of each layer, fp32."""
    method = nested_config(CordaConfig, "corda_config", fields).corda_method
    batches, paths = list(batches), list(adapters)
    for start in range(0, len(paths), LAYERS_PER_PASS):
        sums: dict[str, Tensor] = {}
        counts = dict.fromkeys(paths, 0)

        def add_inputs(path: str, x: Tensor, batch: Any, sums: Any = sums, counts: Any = counts) -> None:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if isinstance(mask, Tensor) and mask.shape == x.shape[:-1]:
                x = x[mask.bool()]
            rows = x.reshape(-1, x.shape[-1]).float()
            rows = rows / rows.max().abs()  # as in PEFT
            product = rows.T @ rows
            sums[path] = product if path not in sums else sums[path].add_(product)
            counts[path] += 1

        inputs_of(model, paths[start : start + LAYERS_PER_PASS], batches, add_inputs)
        for path, total in sums.items():
            module, r = model.get_submodule(path), len(adapters[path].lora_A)
            weight = weight_format(module).read(module).detach().float()
            covariance, inverse = make_invertible(path, total / counts[path])
            u, values, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
            v = vh @ inverse
            components = slice(0, r) if method == "ipm" else slice(len(values) - r, None)
            root = (values[components] / adapters[path].full_scale).sqrt()
            yield path, root[:, None] * v[components], u[:, components] * root


def make_invertible(path: str, product: Tensor) -> tuple[Tensor, Tensor]:
    """Add to the diagonal of XᵀX `[in, in]` until it can be inverted in fp32; return the sum and its inverse.

    Raises:
        PeftcoreError: no addition suffices, since X is zero or not finite.
    """
    eye, mean, damp = torch.eye(len(product), device=product.device), product.diagonal().mean(), 0.01
    while damp < 1e3:
        covariance = product + damp * mean * eye
        inverse, error_code = torch.linalg.inv_ex(covariance)
        if not error_code and (covariance @ inverse - eye).norm() < 0.05:
            return covariance, inverse
        damp *= 2
    raise PeftcoreError(f"init_lora_weights='corda': the inputs of '{path}' are zero, or not finite. Check the batches")


def lora_ga(
    model: nn.Module, adapters: Mapping[str, Any], fields: Mapping[str, Any], batches: Iterable[Any]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (path, A, B) of each layer, fp32."""
    config = nested_config(LoraGAConfig, "lora_ga_config", fields)
    factors: dict[str, tuple[Tensor, Tensor]] = {}

    def compute_factors(name: str, gradient: Tensor) -> None:
        path = name.removesuffix(".weight")
        module = model.get_submodule(path)
        weight = weight_format(module).read(module).detach().float()
        is_transposed = gradient.shape != weight.shape or targets.is_conv1d(module)
        gradient = gradient.T if is_transposed else gradient
        factors[path] = factors_from_gradient(gradient, weight, adapters[path], config)

    weights = [f"{path}.weight" for path in adapters]
    gradients_of(model, weights, list(batches), compute_factors, at_once=LAYERS_PER_PASS)
    for path, (a, b) in factors.items():
        yield path, a, b


def factors_from_gradient(
    gradient: Tensor, weight: Tensor, adapter: Any, config: LoraGAConfig
) -> tuple[Tensor, Tensor]:
    """Return A `[r, in]` and B `[out, r]`, for the gradient and the weight `[out, in]`."""
    r, scale = len(adapter.lora_A), adapter.full_scale
    validation.require(
        2 * r <= min(gradient.shape),
        f"init_lora_weights='lora_ga' needs 2 r singular vectors: r={r} is too large for a weight "
        f"{list(weight.shape)}, which has {min(gradient.shape)}. Choose at most {min(gradient.shape) // 2}",
    )
    u, values, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    random = torch.randperm(2 * r)[:r]
    even, odd = torch.arange(0, 2 * r, 2), torch.arange(1, 2 * r, 2)
    first, second = torch.arange(r), torch.arange(r, 2 * r)
    indices = {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (odd, even), "random": (random, random)}
    a_indices, b_indices = indices[config.direction]
    a, b = v[:, a_indices].T, u[:, b_indices] * values[b_indices]
    if config.scale == "stable":
        b = b * len(weight) ** 0.25 / config.stable_gamma**0.5
    elif config.scale == "weight_svd" and values[b_indices[0]] > 0:
        b = b * torch.svd_lowrank(weight, q=r, niter=4)[1][0] / values[b_indices[0]]
    elif config.scale == "gd_scale":
        a, b = a / scale, b / scale
    return a, b
