"""VB-LoRA (Li et al. 2024, arXiv 2405.15179): y = W x + B A x, where A and B are composed from one bank of vectors.

    bank [h, b]      Each piece of b numbers in a row of A, or a column of B, has h logits. The piece is the sum of
      |  top k       the vectors with the k largest logits, weighted by their softmax.
      v
    A [r, in]  B [out, r]

The bank, shared by all layers, and the logits are trained. As in the paper no factor is zero, so the start changes the
model slightly. With `save_only_topk_weights` a file has k weights and indices per piece instead of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peftcore_lora.layers import LowRankLinear
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from peftcore import plugin
from peftcore.plugin import (
    Architecture,
    Around,
    Fields,
    Method,
    Placement,
    StateRules,
    Tensors,
    hookimpl,
    targets,
    validation,
    warn,
)

peftcore_api = ">=3.0,<4"

# Shortest vectors that `all-linear` chooses. With shorter ones there are far more logits than LoRA has parameters.
SHORTEST = 32
MISSING = -1e4  # logit of vectors that are not in a file with save_only_topk_weights


@dataclass(frozen=True)
class VBLoRAConfig(targets.LayersConfig):
    """Config with the field names of Hugging Face PEFT's `VBLoRAConfig`; the other fields are LoRA's.

    Args:
        num_vectors, vector_length: size of the bank. The length must divide inputs and outputs of all layers. Where
            it does not, `all-linear` uses the greatest common divisor if that is at least 32, and warns.
        topk: number of vectors in a piece's sum.
        save_only_topk_weights: save small files that cannot be trained further.
        init_vector_bank_bound, init_logits_std: bound of the uniform bank, and standard deviation of the logits.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    bias: Literal["none", "all", "vblora_only"] = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {name: getattr(self, name) for name in ("r", "num_vectors", "vector_length", "topk")}
        validation.positive_whole(**sizes)
        validation.probability(vblora_dropout=self.vblora_dropout)
        message = f"topk={self.topk} is above num_vectors={self.num_vectors}. Choose a smaller topk"
        validation.require(self.topk <= self.num_vectors, message)

    def misfit(self, path: str, module: nn.Module) -> str | None:
        sizes = targets.sizes(module)
        common = math.gcd(self.vector_length, *sizes)
        if common == self.vector_length:
            return None
        reason = f"vector_length={self.vector_length} must divide inputs and outputs of '{path}': {sizes}"
        choice = str(common) if common >= SHORTEST else "another length"
        return f"{reason}. Choose {choice}, or exclude the layer: exclude_modules=[...]"

    def resolved(self, model: nn.Module, architecture: Architecture) -> VBLoRAConfig:
        """Return the config with a length that divides the sizes of the layers of `all-linear`."""
        config = self
        if self.target_modules == "all-linear":
            length = self.vector_length
            for layer in targets.select_by(self, model, architecture).values():
                sizes = targets.sizes(layer)
                if min(sizes) >= SHORTEST:  # smaller layers fit no length, and are refused
                    length = math.gcd(length, *sizes)
            if SHORTEST <= length < self.vector_length:
                warn(
                    f"vector_length={self.vector_length} does not divide the sizes of all layers; "
                    f"vector_length={length} is used instead"
                )
                config = replace(self, vector_length=length)
        return targets.LayersConfig.resolved(config, model, architecture)


class Bank(nn.Module):
    """Bank `[num_vectors, vector_length]`, shared by all layers."""

    def __init__(self, config: VBLoRAConfig) -> None:
        super().__init__()
        bound = config.init_vector_bank_bound
        values = torch.empty(config.num_vectors, config.vector_length).uniform_(-bound, bound)
        self.vblora_vector_bank = nn.Parameter(values)


class VBLoRA(LowRankLinear):
    """Logits `[r, in / b, h]` of A and `[out / b, r, h]` of B."""

    def __init__(self, config: VBLoRAConfig, bank: Bank, width: int, out_width: int) -> None:
        super().__init__(dropout=config.vblora_dropout)
        self.topk, self.bank, self.lacks_logits = config.topk, bank, config.save_only_topk_weights
        r, h, b = config.r, config.num_vectors, config.vector_length
        self.vblora_logits_A = nn.Parameter(config.init_logits_std * torch.randn(r, width // b, h))
        self.vblora_logits_B = nn.Parameter(config.init_logits_std * torch.randn(out_width // b, r, h))

    def extra_repr(self) -> str:
        return f"r={len(self.vblora_logits_A)}, topk={self.topk}"

    def pair(self) -> tuple[Tensor, Tensor]:
        if self.lacks_logits and self.training and not is_dynamo_compiling():
            message = (
                "an adapter saved with save_only_topk_weights has no logits to train. Load a full file, or call eval()"
            )
            validation.require(bool((self.vblora_logits_A[0, 0] > MISSING).all()), message)
        bank = self.bank.vblora_vector_bank.to(self.vblora_logits_A.device)
        a, b = (self.pieces(logits, bank) for logits in (self.vblora_logits_A, self.vblora_logits_B))
        return a.flatten(1), b.transpose(1, 2).flatten(0, 1)

    def pieces(self, logits: Tensor, bank: Tensor) -> Tensor:
        """Return pieces `[.., b]` for logits `[.., h]`."""
        largest, index = logits.topk(self.topk, dim=-1)
        return (largest.softmax(-1)[..., None] * bank[index]).sum(-2)


def place(model: nn.Module, config: VBLoRAConfig, architecture: Architecture) -> list[Placement]:
    layers = {path: targets.sizes(module) for path, module in config.selected(model, architecture).items()}
    bank = Bank(config)
    placements = [Around(path, VBLoRA(config, bank, *sizes)) for path, sizes in layers.items()]
    return [*placements, *targets.trained_biases(model, config.bias, layers)]


def parameter_groups(adapters: Mapping[str, Any], config: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return a parameter group for the bank with a tenth of the logits' learning rate, as in the authors' training."""
    bank = next(iter(adapters.values())).bank.vblora_vector_bank
    return [{"params": [bank], "lr": lr / 10, "weight_decay": weight_decay}]


def tensor_name(placement: Any, name: str) -> str:
    """Name the bank without a layer, since the file contains it once."""
    if name.startswith("bank."):
        return f"base_model.{name.removeprefix('bank.')}"
    return plugin.tensor_name(placement, name)


def index_dtype(num_vectors: int) -> torch.dtype:
    """Return PEFT's dtype for indices into a bank: the smallest that is large enough."""
    if num_vectors < 1 << 8:
        return torch.uint8
    if num_vectors < 1 << 15:
        return torch.int16
    return torch.int32 if num_vectors < 1 << 31 else torch.int64


def write(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Write the indices of each piece's k largest logits, and their weights but the last, which is 1 - their sum."""
    if not fields["save_only_topk_weights"]:
        return tensors, fields
    written, dtype = {}, index_dtype(fields["num_vectors"])
    for name, tensor in tensors.items():
        if ".vblora_logits_" in name:
            largest, index = tensor.topk(fields["topk"], dim=-1)
            written[f"{name}_topk_indices"] = index.to(dtype)
            written[f"{name}_topk_weights"] = largest.softmax(-1)[..., :-1].contiguous()
        else:
            written[name] = tensor
    return written, fields


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    """Compute logits whose softmax gives the file's weights."""
    completed = {name: t for name, t in tensors.items() if not name.endswith(("_topk_indices", "_topk_weights"))}
    for name, stored_weights in tensors.items():
        if name.endswith("_topk_weights"):
            name = name.removesuffix("_topk_weights")
            weights = torch.cat([stored_weights, 1 - stored_weights.sum(-1, keepdim=True)], dim=-1).clamp(min=1e-30)
            logits = weights.new_full((*weights.shape[:-1], fields["num_vectors"]), MISSING)
            completed[name] = logits.scatter(-1, tensors[f"{name}_topk_indices"].long(), weights.log())
    return completed, fields


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules(peft_type="VBLORA", tensor_name=tensor_name, read=read, write=write)
    groups = parameter_groups
    return [Method("vblora", VBLoRAConfig, place, rules, parameter_groups=groups, learning_rate=1e-2)]
