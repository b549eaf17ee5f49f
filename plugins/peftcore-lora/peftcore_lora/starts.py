"""Initial A and B for `init_lora_weights`, computed from the frozen weight W [out, in]; s is the scale.

Initialisations from data are in `eva.py` and `data_starts.py`.

    pissa       s B A = the best approximation of W of rank r       (Meng et al. 2024, arXiv 2404.02948)
    olora       B = the first r columns of Q, A = rows of R, W = Q R   (Büyükakyüz 2024, arXiv 2406.01775)
    mica        B = left singular vectors of the r smallest singular values, frozen; A = 0   (arXiv 2604.01694)
    orthogonal  random, with orthogonal rows in A and columns in B such that B A = 0

Where s B A is not zero, PEFT subtracts it from W. peftcore leaves W unchanged and keeps the initial factors B0 A0,
frozen: y = W x + s (B A - B0 A0) x. The file has a LoRA of rank 2 r, and removing the adapter restores W bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.plugin import targets, validation, weight_format
from peftcore_lora import data_starts, eva
from peftcore_lora.config import LoraConfig, is_subtracted
from peftcore_lora.layers import LoraFromStart, LoraLinear


@torch.no_grad()
def initialize(model: nn.Module, adapters: Mapping[str, Any], config: LoraConfig, batches: Any) -> LoraConfig | None:
    """Initialise all adapters by `config.init_lora_weights`. Return the new config if that changes it (EVA's ranks)."""
    start = str(config.init_lora_weights)
    adapters = {path: adapter for path, adapter in adapters.items() if hasattr(adapter, "lora_A")}
    for path, adapter in adapters.items():
        validation.require(
            isinstance(adapter, LoraLinear),
            f"init_lora_weights={start!r} is only for linear layers, and '{path}' is not one. Leave it out of "
            "target_modules, or choose init_lora_weights=True",
        )
    validation.require(
        batches is not None or start not in FROM_DATA,
        f"init_lora_weights={start!r} needs data. Pass an iterable of model inputs, such as a DataLoader: "
        "peftcore.apply(..., batches=...)",
    )
    if start == "eva":
        return eva.initialize(model, adapters, config, batches)
    if start == "corda":
        factors = data_starts.corda(model, adapters, config.corda_config or {}, batches)
    elif start == "lora_ga":
        factors = data_starts.lora_ga(model, adapters, config.lora_ga_config or {}, batches)
    else:
        factors = factors_from_weights(model, adapters, start)
    for path, a, b in factors:
        adapter = adapters[path]
        adapter.lora_A.copy_(a)
        adapter.lora_B.copy_(b)
        if isinstance(adapter, LoraFromStart):
            adapter.start_A.copy_(adapter.lora_A)
            adapter.start_B.copy_(adapter.lora_B)
    return None


def factors_from_weights(
    model: nn.Module, adapters: Mapping[str, Any], start: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (path, A, B) of each layer, computed from its weight."""
    for path, adapter in adapters.items():
        module, r = model.get_submodule(path), len(adapter.lora_A)
        weight = weight_format(module).read(module).detach().float()
        validation.require(
            not weight.is_meta,
            f"init_lora_weights={start!r} needs the values of '{path}', which is on the meta device. Load the "
            "weights first",
        )
        validation.require(
            r <= min(weight.shape),
            f"init_lora_weights={start!r}: r={r} is above the rank of '{path}' {list(weight.shape)}. "
            f"Choose a smaller r: rank_pattern={{'{path}': {min(weight.shape)}}}",
        )
        yield path, *STARTS[start.partition("_niter_")[0]](weight, r, adapter.full_scale, start)


def pissa(weight: Tensor, r: int, scale: float, start: str) -> tuple[Tensor, Tensor]:
    """Return A and B from the exact SVD; "pissa_niter_N": from N iterations of a randomised SVD (Halko et al. 2009)."""
    iterations = start.partition("_niter_")[2]
    if iterations:
        u, values, v = torch.svd_lowrank(weight, q=r, niter=int(iterations))
        vh = v.T
    else:
        u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:r] / scale).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def olora(weight: Tensor, r: int, scale: float, start: str) -> tuple[Tensor, Tensor]:
    q, triangular = torch.linalg.qr(weight)
    return triangular[:r], q[:, :r]


def mica(weight: Tensor, r: int, scale: float, start: str) -> tuple[Tensor, Tensor]:
    u, _, _ = torch.linalg.svd(weight, full_matrices=False)
    return weight.new_zeros(r, weight.shape[1]), u[:, -r:]


def orthogonal(weight: Tensor, r: int, scale: float, start: str) -> tuple[Tensor, Tensor]:
    validation.require(r % 2 == 0, f"init_lora_weights='orthogonal' needs an even r, found {r}")
    q, _ = torch.linalg.qr(torch.randn(r, r, device=weight.device))
    out_width, width = weight.shape
    a = q[0::2].T @ torch.randn(r // 2, width, device=weight.device) / 10
    return a, torch.randn(out_width, r // 2, device=weight.device) @ q[1::2] / 10


RECOMPUTABLE = ("pissa", "olora")  # these depend on the weight alone, and are the same each time
FROM_DATA = ("eva", "corda", "lora_ga")
STARTS = {"pissa": pissa, "olora": olora, "mica": mica, "orthogonal": orthogonal}

# A file has A, B and the initial A0, B0 as one LoRA of rank 2 r: [A; A0] and [B, -B0].


def write_config(fields: dict[str, Any]) -> dict[str, Any]:
    fields = {**fields, "eva_config": None, "corda_config": None, "lora_ga_config": None}
    if fields["init_lora_weights"] not in (True, False, "gaussian", "mica"):
        # PEFT would run any other initialisation when it loads the file, and change the base weights.
        fields["init_lora_weights"] = True
    return scale_rank(fields, 2) if fields.get("frozen_start") else fields


def read_config(fields: dict[str, Any]) -> dict[str, Any]:
    return scale_rank(fields, 0.5) if fields.get("frozen_start") else fields


def scale_rank(fields: dict[str, Any], factor: float) -> dict[str, Any]:
    """Return the fields with the ranks multiplied by `factor` and the alphas changed to give the same scale."""
    alpha_factor = factor**0.5 if fields.get("use_rslora") else factor
    r, lora_alpha = round(fields.get("r", 8) * factor), fields.get("lora_alpha", 8) * alpha_factor
    ranks = {name: round(value * factor) for name, value in (fields.get("rank_pattern") or {}).items()}
    alphas = {name: value * alpha_factor for name, value in (fields.get("alpha_pattern") or {}).items()}
    return {**fields, "r": r, "lora_alpha": lora_alpha, "rank_pattern": ranks, "alpha_pattern": alphas}


def write_start(tensors: dict[str, Tensor], frozen_start: bool) -> dict[str, Tensor]:
    """Replace the four factors of each layer by [A; A0] and [B, -B0]."""
    disk_tensors = {name: tensor for name, tensor in tensors.items() if not re.search(r"\.start_[AB]\.", name)}
    for name in tensors if frozen_start else ():
        if ".start_A." in name:
            a, b = name.replace(".start_A.", ".lora_A."), name.replace(".start_A.", ".lora_B.")
            disk_tensors[a] = torch.cat([tensors[a], tensors[name]])
            disk_tensors[b] = torch.cat([tensors[b], -tensors[name.replace(".start_A.", ".start_B.")]], dim=1)
    return disk_tensors


def read_start(model: nn.Module, tensors: dict[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """Split a file's factors into A, B, A0 and B0.

    PEFT's files with a recomputable initialisation have A and B alone, since PEFT changed W: A0 and B0 are computed
    from W again.
    """
    factors, start = dict(tensors), fields.get("init_lora_weights")
    if fields.get("frozen_start"):
        for name, tensor in tensors.items():
            if name.endswith(".lora_A.weight"):
                factors[name], factors[name.replace(".lora_A.", ".start_A.")] = tensor.chunk(2)
            if name.endswith(".lora_B.weight"):
                trained_b, start_b = tensor.chunk(2, dim=1)
                factors[name], factors[name.replace(".lora_B.", ".start_B.")] = trained_b, -start_b
    elif start in RECOMPUTABLE:
        for name, tensor in tensors.items():
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            if name.endswith(".lora_A.weight"):
                r = len(tensor)
                alpha = targets.pattern_value(fields.get("alpha_pattern") or {}, path, fields.get("lora_alpha", 8))
                scale = alpha / (r**0.5 if fields.get("use_rslora") else r)
                a, b = STARTS[start](targets.dense_weight(model, path).float(), r, scale, start)
                factors[name.replace(".lora_A.", ".start_A.")], factors[name.replace(".lora_A.", ".start_B.")] = a, b
    return factors


def refusal_reason(fields: Mapping[str, Any]) -> str | None:
    """Return the reason why a file cannot be read, if PEFT initialised it in a way that cannot be recomputed."""
    start = str(fields.get("init_lora_weights"))
    if start in RECOMPUTABLE or not (is_subtracted(start) or start == "loftq"):
        return None
    if start == "loftq":
        advice = (
            "Ask its author to merge it in PEFT into the base that it was trained on (merge_and_unload), and use the "
            "merged model. Or train on a 4-bit base: method qlora"
        )
    else:
        advice = (
            "Ask its author to save it as plain LoRA: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...). Or train again: peftcore.apply(model, 'lora', "
            f"init_lora_weights={start!r}) does not change the base's weights"
        )
    return (
        f"it was trained with init_lora_weights={start!r}, for which PEFT changes the base weights by values that "
        f"are not in the file, so it computes something else on the original base. {advice}"
    )
