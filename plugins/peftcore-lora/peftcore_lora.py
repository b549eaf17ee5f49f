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
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore
from peftcore import ops, targets, validation
from peftcore.adaptation.adapted import base_modules
from peftcore.adaptation.class_swap import original_class
from peftcore.merging import probe

KNOWN_PEFT = (0, 21, 2)  # up to this release it is known what PEFT computes of an attention's file


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

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta(), bias


class LoraLinear(Lora):
    """nn.Linear and transformers' Conv1D. A `[r, in]`, B `[out, r]`; x `[..., in]` -> y `[..., out]`."""

    def forward(self, base: Any, x: Tensor) -> Tensor:
        p = self.dropout.p if self.training else 0.0
        operands = None if x.is_nested else base.linear_operands(x)
        if operands is not None:
            weight, bias = operands
            return ops.lora_linear(x, weight, bias, self.lora_A, self.lora_B, self.scale, p)
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
        weight, bias = operands
        return ops.lora_linear_per_sample(x, weight, bias, a, b, [m.scale for m in adapters], index)


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
    """nn.Embedding: A `[r, vocabulary]` is looked up, B `[dim, r]` maps to the embedding.

    Subclasses that multiply what they look up by their `embed_scale` (Gemma, BART) do so with B A, too.
    """

    def forward(self, base: Any, tokens: Tensor) -> Tensor:
        y, scale = base(tokens), embed_scale(base.module)
        if tokens.is_floating_point():  # shares of each entry, as Ovis has them
            s = F.linear(tokens, self.lora_A.to(tokens.dtype)).to(self.lora_B.dtype)
        else:
            s = F.embedding(tokens, self.lora_A.T, base.module.padding_idx)  # [..., r]
        return y + (self.scale * F.linear(s, self.lora_B) * scale).to(y.dtype)

    def delta(self) -> Tensor:
        return super().delta().T  # [vocabulary, dim]


class OnWeight(Lora):
    """For layers that do more than their product: their own forward, which reads W + scale · B A. Without dropout."""

    per_sample = None
    whole_batch = True

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        return base.on_weights({"weight": self.changed})(*args, **kwargs)

    def changed(self, weight: Tensor) -> Tensor:
        return weight + self.delta().to(weight.dtype)


class LoraLinearOnWeight(OnWeight, LoraLinear):  # type: ignore[misc]  # without LoraLinear's per_sample
    """A router that gives a choice beside its logits, a product in groups."""


class LoraConvOnWeight(OnWeight, LoraConv):
    """A convolution that pads, or transposes, its input by itself."""


class LoraAttention(OnWeight):
    """nn.MultiheadAttention: A `[r, E]`, B `[3 E, r]` for `in_proj_weight`, and a pair of their own for `out_proj`.

    To `out_proj` PEFT adds scale · B A twice (see `KNOWN_PEFT`). Files mean that, so it is done here, too.
    """

    def __init__(self, config: LoraConfig, path: str, width: int) -> None:
        super().__init__(config, path, [width], [3 * width])
        self.out_proj = OnWeight(config, path, [width], [width])
        self.out_proj.scale *= 2

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        changes = {"in_proj_weight": self.changed, "out_proj.weight": self.out_proj.changed}
        return base.on_weights(changes)(*args, **kwargs)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + torch.cat([self.delta(), self.out_proj.delta()]), bias  # [4 E, E]


def adapter_for(path: str, module: nn.Module, config: LoraConfig) -> Lora:
    """The LoRA of one layer."""
    validation.require(
        not any(p is not None and p.is_complex() for p in module._parameters.values()),
        f"'{path}' ({original_class(module).__name__}) has complex weights, which LoRA cannot adapt",
    )
    if isinstance(module, nn.MultiheadAttention):
        one = module.in_proj_weight is not None
        validation.require(
            one,
            f"'{path}' is an attention whose keys or values have a width of their own (kdim, vdim), which LoRA "
            f"cannot adapt. Exclude its projection: exclude_modules=['{path}.out_proj']",
        )
        return LoraAttention(config, path, module.embed_dim)
    if isinstance(module, nn.Embedding):
        validation.require(
            looks_up(module),
            f"'{path}' ({original_class(module).__name__}) does more than look its input up, which LoRA cannot adapt. "
            "Take it out of target_modules",
        )
        adapter = LoraEmbedding(config, path, [module.num_embeddings], [module.embedding_dim])
        if config.init_lora_weights is not False:  # as in the paper's code and PEFT: here A is zero, B normal
            nn.init.zeros_(adapter.lora_A)
            nn.init.normal_(adapter.lora_B)
        return adapter
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        groups, kernel = module.groups, module.kernel_size
        validation.require(groups == 1, f"'{path}' is a convolution in {groups} groups, which LoRA cannot adapt")
        plain = has_forward_of(module, nn.Conv1d) or has_forward_of(module, nn.Conv2d)
        validation.require(
            plain or is_linear_in_weight(module),
            f"'{path}' ({original_class(module).__name__}) does more with its weight than convolve, which LoRA cannot "
            "adapt. Take it out of target_modules",
        )
        kind: type[Lora] = LoraConv if plain else LoraConvOnWeight
        return kind(config, path, [module.in_channels, *kernel], [module.out_channels, *(1 for _ in kernel)])
    width, out_width = targets.sizes(module)
    kind = LoraLinear if adds_to_product(module) else LoraLinearOnWeight
    return kind(config, path, [width], [out_width])


def embed_scale(module: nn.Embedding) -> Tensor | float:
    """The factor of an embedding's output, in the dtype in which the layer multiplies by it."""
    scale = getattr(module, "embed_scale", None)
    return 1.0 if scale is None else scale.to(module.weight.dtype) if isinstance(scale, Tensor) else scale


# Whether B A may be added to what a layer gives, as PEFT does it, is seen on the layer: classes are many.


def looks_up(module: nn.Embedding) -> bool:
    """Does it give rows of its weight, times `embed_scale`?"""
    if module.max_norm is not None or len(list(base_modules(module))) > 1:
        return False
    if has_forward_of(module, nn.Embedding) or module.weight.is_meta:
        return True
    tokens = torch.arange(module.num_embeddings, device=module.weight.device)[None, -3:]
    found = probe.own_output(module, tokens)
    wanted = F.embedding(tokens, module.weight.detach()) * embed_scale(module)
    is_same = isinstance(found, Tensor) and found.shape == wanted.shape
    return is_same and torch.allclose(found.float(), wanted.float(), rtol=0.02, atol=1e-6)


def adds_to_product(module: nn.Module) -> bool:
    """Does a linear layer give one tensor `[..., out]`? Of packed weights every layer does."""
    if not isinstance(module, nn.Linear) or has_forward_of(module, nn.Linear) or not is_dense(module.weight):
        return True
    found = probe.own_output(module, module.weight.new_ones(2, module.in_features))
    return isinstance(found, Tensor) and found.shape == (2, module.out_features)


def is_linear_in_weight(module: nn.Conv1d | nn.Conv2d) -> bool:
    """Does the output of a convolution of a class of its own grow with the weight? PEFT's factors are of that class."""
    spatial = [2 * k * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    weight, shape = module.weight, [1, module.in_channels, *spatial]
    for axes in (shape, [shape[0], *shape[2:], shape[1]]):  # channels last, as some heads have it
        x = torch.linspace(-1, 1, math.prod(axes), device=weight.device).view(axes).to(weight.dtype)
        outputs = [probe.own_output(module, x, weight=factor * weight.detach()) for factor in (0, 1, 2)]
        if all(output is not None for output in outputs):
            zero, one, two = (output[0] if isinstance(output, tuple) else output for output in outputs)
            return module.weight.is_meta or torch.allclose(two - zero, 2 * (one - zero), rtol=0.05, atol=1e-4)
    return False


def has_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    return original_class(module).forward is kind.forward


def is_dense(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.itemsize > 1


def selected(model: nn.Module, config: LoraConfig, architecture: peftcore.Architecture) -> dict[str, nn.Module]:
    """The layers that the config means, by path, of those that LoRA can adapt."""
    others = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)
    return targets.select_by(
        config, model, architecture, supported=lambda module: targets.is_linear(module) or isinstance(module, others)
    )


def place(model: nn.Module, config: LoraConfig, architecture: peftcore.Architecture) -> list[Any]:
    chosen = selected(model, config, architecture)
    placements = [peftcore.Around(path, adapter_for(path, module, config)) for path, module in chosen.items()]
    on_weight = [placement.path for placement in placements if isinstance(placement.adapter, OnWeight)]
    if config.lora_dropout and on_weight:
        warnings.warn(
            f"lora_dropout={config.lora_dropout} does not act at {len(on_weight)} of {len(placements)} modules, where "
            f"the weight itself is changed, such as '{on_weight[0]}'",
            stacklevel=2,
        )
    if config.bias == "none":
        return placements
    whole = [path for path, module in chosen.items() if isinstance(module, nn.MultiheadAttention)]
    validation.require(
        not whole,
        f"bias={config.bias!r} is not known beside '{whole[0] if whole else None}', an nn.MultiheadAttention, "
        "whose biases have other names. Choose bias='none'",
    )
    return [*placements, targets.biases(model, None if config.bias == "all" else chosen)]


def tensor_name(placement: Any, name: str) -> str:
    """PEFT keeps A and B of a linear in modules of their own, those of an embedding as plain parameters."""
    if isinstance(getattr(placement, "adapter", None), LoraEmbedding):
        name = name.replace("lora_", "lora_embedding_")
    elif isinstance(placement, peftcore.Around):
        name = f"base_layer.{name}.weight" if name.startswith("out_proj.") else f"{name}.weight"
    return peftcore.tensor_name(placement, name)


def read_tensors(tensors: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """With bias="all" PEFT writes the biases of modules_to_save, and those they replace, a second time."""
    return {n: t for n, t in tensors.items() if ".modules_to_save." not in n and ".original_module." not in n}


# Layers of dense and shared blocks that PEFT takes for the experts of old files, by the kind of model that transformers
# converts these for; and layers whose weights Mamba's kernels read without calling them, which it refuses.
TAKEN_FOR_EXPERTS = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}
MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
READ_BY_KERNELS = {"out_proj", "conv1d"}


def unreadable(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The adapted modules that PEFT misreads (mixtures of experts), refuses (Mamba) or cannot run (routers)."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    names = set(READ_BY_KERNELS) if kind in MAMBA else set()
    conversions = sys.modules.get("transformers.conversion_mapping")  # models are built by way of it
    if conversions is not None:
        alike = {"mixtral": "mixtral", **getattr(conversions, "_MODEL_TO_CONVERSION_PATTERN", {})}
        names |= TAKEN_FOR_EXPERTS.get(alike.get(str(kind), ""), set())
    return [p for p in paths if p.rpartition(".")[2] in names or not adds_to_product(model.get_submodule(p))]


def refused(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> str | None:
    """Whether a PEFT yet to come adds the change of an attention's `out_proj` once or twice is not known."""
    there = next((name for name in tensors if ".base_layer.out_proj.lora_B" in name), None)
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(fields.get("peft_version") or "0.0.0"))
    if there is None or version is None or tuple(map(int, version.groups())) <= KNOWN_PEFT:
        return None
    return (
        f"it was written by PEFT {fields['peft_version']}, and '{there}' is of an nn.MultiheadAttention. PEFT up to "
        f"{'.'.join(map(str, KNOWN_PEFT))} adds scale · B A to out_proj twice; of later ones it is not known here. If "
        "that one does so, too, drop peft_version from adapter_config.json; if it adds it once, halve this tensor, too"
    )


@peftcore.hookimpl
def peftcore_methods() -> list[peftcore.Method]:
    rules = peftcore.StateRules(
        peft_type="LORA",
        tensor_name=tensor_name,
        read_tensors=read_tensors,
        unreadable=unreadable,
        refused=refused,
    )
    return [peftcore.Method("lora", LoraConfig, place, rules)]
