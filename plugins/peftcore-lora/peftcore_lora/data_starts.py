"""Starts computed from data, and subtracted: CorDA from the inputs X of a layer, LoRA-GA from its gradient G.

corda     W C = U S Vᵀ, C = Xᵀ X + damp, s B A = U_r S_r V_rᵀ C⁻¹       (Yang et al. 2024, arXiv 2406.05223)
          r largest parts ("ipm": learn the new task), or the r smallest ("kpm": preserve knowledge about these X)
lora_ga   G = U S Vᵀ, A of some right, B of other left singular vectors    (Wang et al. 2024, arXiv 2407.05000)
          so that the first step of B A approximates that of W
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftcore.plugin import PeftcoreError, gradients_of, inputs_of, targets, validation, weight_format
from peftcore_lora.config import nested

AT_ONCE = 16  # layers whose X'X or G are in memory at a time


@dataclass(frozen=True)
class CordaConfig:
    """Field `corda_method` of Hugging Face PEFT's `CordaConfig`; files of intermediate results are not supported."""

    corda_method: Literal["ipm", "kpm"] = "ipm"

    def __post_init__(self) -> None:
        validation.check_types(self)


@dataclass(frozen=True)
class LoraGAConfig:
    """Config with the field names of Hugging Face PEFT's `LoraGAConfig`.

    Args:
        direction: choice of A and B among the first 2 r singular vectors: "ArB2r" (A the first r, B the second r),
            "A2rBr" (the reverse), "ArBr" (A the odd, B the even ones), "random" (the same random r).
        scale: scale of B: "stable" (fourth root of out over the root of stable_gamma), "weight_svd" (as large as W),
            "gd_scale" (A and B divided by the scale), "unit".
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
    method, batches, paths = nested(CordaConfig, "corda_config", fields).corda_method, list(batches), list(adapters)
    for first in range(0, len(paths), AT_ONCE):
        sums: dict[str, Tensor] = {}
        counts = dict.fromkeys(paths, 0)

        def add(path: str, x: Tensor, batch: Any, sums: Any = sums, counts: Any = counts) -> None:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if isinstance(mask, Tensor) and mask.shape == x.shape[:-1]:
                x = x[mask.bool()]
            rows = x.reshape(-1, x.shape[-1]).float()
            rows = rows / rows.max().abs()
            product = rows.T @ rows
            sums[path] = product if path not in sums else sums[path].add_(product)
            counts[path] += 1

        inputs_of(model, paths[first : first + AT_ONCE], batches, add)
        for path, total in sums.items():
            module, r = model.get_submodule(path), len(adapters[path].lora_A)
            weight = weight_format(module).read(module).detach().float()
            damped, inverse = invertible(path, total / counts[path])
            u, values, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
            v = vh @ inverse
            part = slice(0, r) if method == "ipm" else slice(len(values) - r, None)
            root = (values[part] / adapters[path].full_scale).sqrt()
            yield path, root[:, None] * v[part], u[:, part] * root


def invertible(path: str, product: Tensor) -> tuple[Tensor, Tensor]:
    """Return X'X with enough added to its diagonal to be invertible, and the inverse."""
    eye, mean, damp = torch.eye(len(product), device=product.device), product.diagonal().mean(), 0.01
    while damp < 1e3:
        damped = product + damp * mean * eye
        inverse, failed = torch.linalg.inv_ex(damped)
        if not failed and (damped @ inverse - eye).norm() < 0.05:
            return damped, inverse
        damp *= 2
    raise PeftcoreError(f"init_lora_weights='corda': the inputs of '{path}' are zero, or not finite. Check the batches")


def lora_ga(
    model: nn.Module, adapters: Mapping[str, Any], fields: Mapping[str, Any], batches: Iterable[Any]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (path, A, B) of each layer, fp32."""
    config, found = nested(LoraGAConfig, "lora_ga_config", fields), dict[str, tuple[Tensor, Tensor]]()

    def take(name: str, gradient: Tensor) -> None:
        path = name.removesuffix(".weight")
        module = model.get_submodule(path)
        weight = weight_format(module).read(module).detach().float()
        transposed = gradient.shape != weight.shape or targets.is_conv1d(module)
        found[path] = of_gradient(gradient.T if transposed else gradient, weight, adapters[path], config)

    gradients_of(model, [f"{path}.weight" for path in adapters], list(batches), take, at_once=AT_ONCE)
    for path, (a, b) in found.items():
        yield path, a, b


def of_gradient(gradient: Tensor, weight: Tensor, adapter: Any, config: LoraGAConfig) -> tuple[Tensor, Tensor]:
    r, scale = len(adapter.lora_A), adapter.full_scale
    validation.require(
        2 * r <= min(gradient.shape),
        f"init_lora_weights='lora_ga' needs 2 r singular vectors, and a weight {list(weight.shape)} has "
        f"{min(gradient.shape)}: r={r} is too large. Choose at most {min(gradient.shape) // 2}",
    )
    u, values, v = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
    chosen = {"ArB2r": (range(r), range(r, 2 * r)), "A2rBr": (range(r, 2 * r), range(r))}
    chosen |= {"ArBr": (range(1, 2 * r, 2), range(0, 2 * r, 2))}
    mixed = torch.randperm(2 * r)[:r].tolist()
    of_a, of_b = (torch.tensor(list(each)) for each in chosen.get(config.direction, (mixed, mixed)))
    a, b = v[:, of_a].T, u[:, of_b] * values[of_b]
    if config.scale == "stable":
        b = b * len(weight) ** 0.25 / config.stable_gamma**0.5
    elif config.scale == "weight_svd" and values[of_b[0]] > 0:
        b = b * torch.svd_lowrank(weight, q=r, niter=4)[1][0] / values[of_b[0]]
    elif config.scale == "gd_scale":
        a, b = a / scale, b / scale
    return a, b
