"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = W x + scale · B A x, with W frozen and A, B thin.

            y [out]
            |
           (+)----------------.
            |                 |  · scale = lora_alpha / r
      .-----+-----.       .---+---.
      |           |       |   B   |  [out, r], zero at the start
      |     W     |       '---+---'
      |  [out,in] |           |  [r]
      |  (frozen) |       .---+---.
      |           |       |   A   |  [r, in], random at the start
      '-----+-----'       '---+---'
            |                 |  dropout
            '--------+--------'
                  x [in]

Trained: r · (in + out) numbers instead of in · out. `merged` adds scale · B A to W: no cost at inference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore
from peftcore import ops, targets, validation


@dataclass(frozen=True)
class LoraConfig:
    """The fields and defaults bear the names of Hugging Face PEFT's `LoraConfig`.

    Args:
        r: rank of the update. lora_alpha: the update is scaled by lora_alpha / r, with use_rslora by
            lora_alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).
        lora_dropout: probability with which an input of A is dropped in training.
        target_modules, exclude_modules, layers_to_transform, layers_pattern: see `peftcore.targets.select`.
        rank_pattern, alpha_pattern: r and lora_alpha of single modules, `{regex for the path's end: value}`.
        modules_to_save: modules trained whole. None: a classifier's head, which pre-training did not train.
        ensure_weight_tying: what is tied to one of them (the head to the embedding) is trained with it, as one
            weight. False: apart. PEFT's default is False.
        init_lora_weights: True (A Kaiming-uniform, B zero), "gaussian" (A normal with std 1/r, B zero), or
            False (both random: the adapter changes the model from the start).
        bias: which biases are trained too: "none", "all", or "lora_only" (those of adapted modules).
        fan_in_fan_out: written for PEFT, which wants it True for GPT-2; here a layer's layout is read off the layer.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = targets.ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] | None = None
    ensure_weight_tying: bool = True
    use_rslora: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True
    bias: Literal["none", "all", "lora_only"] = "none"
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        validation.check_types(self)
        for r in (self.r, *self.rank_pattern.values()):
            validation.positive_whole(r=r)
        validation.probability(lora_dropout=self.lora_dropout)

    def resolved(self, model: nn.Module, architecture: peftcore.Architecture) -> LoraConfig:
        """The choices that depend on the model made explicit, so that a saved config means the same anywhere."""
        chosen, config = selected(model, self, architecture), self
        if self.target_modules == targets.ALL_LINEAR:
            config = replace(config, target_modules=targets.minimal_suffixes(model, chosen))
        return replace(config, fan_in_fan_out=any(map(targets.is_conv1d, chosen.values())))


class Lora(nn.Module):
    """What the kinds of layer share: two factors, their scale, their dropout. Subclasses say how B A acts."""

    def __init__(self, config: LoraConfig, path: str, a_shape: Sequence[int], b_shape: Sequence[int]) -> None:
        super().__init__()
        r = targets.pattern_value(config.rank_pattern, path, config.r)
        alpha = targets.pattern_value(config.alpha_pattern, path, config.lora_alpha)
        self.scale = alpha / (math.sqrt(r) if config.use_rslora else r)
        self.dropout = nn.Dropout(config.lora_dropout)  # a module: trainers find those, to switch dropout off
        self.lora_A = nn.Parameter(torch.empty(r, *a_shape))
        self.lora_B = nn.Parameter(torch.zeros(b_shape[0], r, *b_shape[1:]))
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[0]}, scale={self.scale:g}"

    def delta(self) -> Tensor:
        """scale · B A in the layout of the layer's weight, fp32."""
        return (self.scale * self.lora_B.float()) @ self.lora_A.float()

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.delta()


class LoraLinear(Lora):
    """nn.Linear and transformers' Conv1D. A `[r, in]`, B `[out, r]`; x `[..., in]` -> y `[..., out]`."""

    def forward(self, base: Any, x: Tensor) -> Tensor:
        p = self.dropout.p if self.training else 0.0
        operands = base.linear_operands(x)
        if operands is not None:
            return ops.lora_linear(x, *operands, self.lora_A, self.lora_B, self.scale, p)
        y = base(x)
        x = self.dropout(x)
        s = self.scale * F.linear(x, self.lora_A.to(x.dtype))  # [..., r]
        return y + F.linear(s, self.lora_B.to(x.dtype))

    @staticmethod
    def per_sample(adapters: list[LoraLinear], index: Tensor, base: Any, x: Tensor) -> Tensor:
        """Without gradients: one pass over the base for all."""
        operands, a, b = base.linear_operands(x), [m.lora_A for m in adapters], [m.lora_B for m in adapters]
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *a, *b))
        if operands is None or trains or any(m.training and m.dropout.p for m in adapters):
            return NotImplemented
        return ops.lora_linear_per_sample(x, *operands, a, b, [m.scale for m in adapters], index)


class LoraConv(Lora):
    """nn.Conv1d and nn.Conv2d: A convolves with the layer's kernel to r channels, B mixes them pointwise."""

    def forward(self, base: Any, x: Tensor) -> Tensor:
        y = base(x)
        x = self.dropout(x)
        s = base.module._conv_forward(x, self.lora_A.to(x.dtype), None)  # as the layer strides, pads and dilates
        mix = F.conv1d if self.lora_A.dim() == 3 else F.conv2d
        return y + self.scale * mix(s, self.lora_B.to(x.dtype))

    def delta(self) -> Tensor:
        return self.scale * torch.einsum("or,ri...->oi...", self.lora_B.flatten(1).float(), self.lora_A.float())


class LoraEmbedding(Lora):
    """nn.Embedding: A `[r, vocabulary]` is looked up, B `[dim, r]` maps to the embedding."""

    def forward(self, base: Any, tokens: Tensor) -> Tensor:
        y = base(tokens)
        s = F.embedding(tokens, self.lora_A.T, base.module.padding_idx)  # [..., r]
        return y + self.scale * F.linear(s, self.lora_B).to(y.dtype)

    def delta(self) -> Tensor:
        return super().delta().T  # [vocabulary, dim]


def adapter_for(path: str, module: nn.Module, config: LoraConfig) -> Lora:
    """The LoRA of one layer."""
    if isinstance(module, nn.Embedding):
        adapter = LoraEmbedding(config, path, [module.num_embeddings], [module.embedding_dim])
        if config.init_lora_weights is not False:  # as in the paper's code and PEFT: here A is zero, B normal
            nn.init.zeros_(adapter.lora_A)
            nn.init.normal_(adapter.lora_B)
        return adapter
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        groups, kernel = module.groups, module.kernel_size
        validation.require(groups == 1, f"'{path}' is a convolution in {groups} groups, which LoRA cannot adapt")
        return LoraConv(config, path, [module.in_channels, *kernel], [module.out_channels, *(1 for _ in kernel)])
    width, out_width = targets.sizes(module)
    return LoraLinear(config, path, [width], [out_width])


def selected(model: nn.Module, config: LoraConfig, architecture: peftcore.Architecture) -> dict[str, nn.Module]:
    """The layers that the config means, by path, of those that LoRA can adapt."""
    others = (nn.Embedding, nn.Conv1d, nn.Conv2d)
    return targets.select_by(
        config, model, architecture, supported=lambda module: targets.is_linear(module) or isinstance(module, others)
    )


def place(model: nn.Module, config: LoraConfig, architecture: peftcore.Architecture) -> list[Any]:
    chosen = selected(model, config, architecture)
    placements = [peftcore.Around(path, adapter_for(path, module, config)) for path, module in chosen.items()]
    if config.bias == "none":
        return placements
    return [*placements, targets.biases(model, None if config.bias == "all" else chosen)]


def tensor_name(placement: Any, name: str) -> str:
    """PEFT keeps A and B of a linear in modules of their own, those of an embedding as plain parameters."""
    if isinstance(getattr(placement, "adapter", None), LoraEmbedding):
        name = name.replace("lora_", "lora_embedding_")
    elif isinstance(placement, peftcore.Around):
        name = f"{name}.weight"
    return peftcore.tensor_name(placement, name)


def read_tensors(tensors: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """With bias="all" PEFT writes the biases of modules_to_save, and those they replace, a second time."""
    return {n: t for n, t in tensors.items() if ".modules_to_save." not in n and ".original_module." not in n}


@peftcore.hookimpl
def peftcore_methods() -> list[peftcore.Method]:
    rules = peftcore.StateRules(
        peft_type="LORA",
        tensor_name=tensor_name,
        read_tensors=read_tensors,
        ignored_fields=frozenset({"megatron_core", "qalora_group_size"}),  # settings of features that are off
    )
    return [peftcore.Method("lora", LoraConfig, place, rules)]
